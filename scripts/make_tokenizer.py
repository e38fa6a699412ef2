"""Trains the small tokenizer of the fixtures: Gemma's vocabulary in miniature, 1,024 pieces.

    python scripts/make_tokenizer.py [-o fixtures/tokenizer]

What is in it stands in workshop/small_tokenizer.py. The files are the same to the byte in every run with one version of
sentencepiece (written with 0.2.3).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from workshop.places import FIXTURES
from workshop.small_tokenizer import BEYOND_PIECES, tokenizer_files, train


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=FIXTURES / "tokenizer", metavar="DIR")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, contents in tokenizer_files(train(), BEYOND_PIECES).items():
        (arguments.output / name).write_bytes(contents)
        print(f"{arguments.output / name}: {len(contents)} bytes")


if __name__ == "__main__":
    main()
