"""Compares our mmproj files with those of llama.cpp's converter, byte by byte.

    python scripts/compare_mmproj.py CHECKPOINT       all types of the converter, then our recipes against them
    python scripts/compare_mmproj.py --write-golden   record what the converter writes for the tiny checkpoint

The converter can't write Gemma 3n's mmproj file as it is; workshop/mended_converter.py says what is mended. Exit code 1
if a file of the converter's types is not the same to the byte. What our recipes do otherwise stands in docs/mmproj.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import gguf3n
from workshop import checkpoints, llama_cpp_tools
from workshop.comparison import describe, differences
from workshop.mmproj_comparison import GOLDEN, THEIR_TYPES, convert_ours, convert_theirs, digest


def compare(source: Path, quant: str, directory: Path) -> bool:
    """Convert with both, print what differs; returns whether the files are the same."""
    theirs, ours = directory / "theirs.gguf", directory / "ours.gguf"
    convert_theirs(source, quant, theirs)
    convert_ours(source, quant, ours)
    same = digest(theirs) == digest(ours)
    print(f"{quant}: {theirs.stat().st_size:,} bytes, {'the same file' if same else 'NOT the same'}")
    for name, mine, other in differences(describe(ours), describe(theirs)):
        print(f"  {name}: ours {str(mine)[:100]}, llama.cpp {str(other)[:100]}")
    gguf3n.convert(source, output=ours, mmproj=quant, force=True)
    found = differences(describe(ours), describe(theirs))
    counts = Counter((mine, other) for name, mine, other in found if name.endswith("/type"))
    others = [name for name, *_ in found if not name.endswith("/type")]
    print(f"  our recipe: {', '.join(f'{n} x {mine} for {other}' for (mine, other), n in counts.items())}", *others)
    return same


def write_golden() -> None:
    """Record what llama.cpp's converter writes for the tiny checkpoint."""
    golden = {"provenance": f"convert_hf_to_gguf.py --mmproj of llama-cpp-python {llama_cpp_tools.VERSION}, mended"}
    with tempfile.TemporaryDirectory() as name:
        source, path = Path(name) / "tiny", Path(name) / "theirs.gguf"
        checkpoints.make(source, checkpoints.Options(multimodal=True))
        for quant in THEIR_TYPES:
            convert_theirs(source, quant, path)
            golden[quant] = digest(path)
    GOLDEN.write_text(json.dumps(golden, indent=2) + "\n", encoding="utf-8")
    print(GOLDEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="a checkpoint directory with vision and audio")
    parser.add_argument("--type", action="append", choices=THEIR_TYPES, help="repeatable; all by default")
    parser.add_argument("--write-golden", action="store_true", help="record llama.cpp's side for the tests")
    options = parser.parse_args()
    if options.write_golden:
        write_golden()
    elif options.source is None:
        parser.error("name a checkpoint directory")
    else:
        with tempfile.TemporaryDirectory(dir=".") as directory:
            same = [compare(options.source, quant, Path(directory)) for quant in options.type or THEIR_TYPES]
        sys.exit(not all(same))


if __name__ == "__main__":
    main()
