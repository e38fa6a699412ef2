"""Coverage-guided fuzzing of everything that reads a GGUF file it does not trust: reader, lint, repair.

    pip install atheris
    python scripts/fuzz_gguf.py CORPUS -runs=1000000 -max_len=8192
    python scripts/fuzz_gguf.py CORPUS -max_total_time=600 -jobs=2        any option of libFuzzer

CORPUS is a directory; sound small files are put there where it is empty. An input fails if anything but an error of
ours comes out, if it takes longer than a second, or if it makes Python allocate more than 64 MB. The file that fails is
kept as crash-* or timeout-*; give its path instead of CORPUS to run it again.

Inputs are mutated as bytes by libFuzzer, and as a file by `mutate` of workshop/fuzzing.py.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from workshop.fuzzing import mutate, seeds, test_one_input


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.5:
        return mutate(data, rng)[:max_size]
    return bytes(atheris.Mutate(data, max_size))


def main(corpus: Path | None) -> None:
    if corpus is not None and not corpus.is_file():
        corpus.mkdir(parents=True, exist_ok=True)
        if not any(corpus.iterdir()):
            for number, data in enumerate(seeds()):
                (corpus / f"seed-{number}").write_bytes(data)
    atheris.Setup(sys.argv, test_one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="?", metavar="CORPUS")
    known, _ = parser.parse_known_args()  # the others are libFuzzer's
    import atheris

    with atheris.instrument_imports(include=["gguf3n"]):
        import gguf3n.formats.gguf_draft
        import gguf3n.formats.gguf_reader
        import gguf3n.inspection.repair  # noqa: F401
    main(known.corpus)
