"""Compares our files with those of llama.cpp's own programs, key by key, tensor by tensor, byte by byte.

    python scripts/compare_llama_cpp.py CHECKPOINT                  convert_hf_to_gguf.py, its types
    python scripts/compare_llama_cpp.py CHECKPOINT --quantize       llama-quantize, all mixtures as NAME@llama.cpp
    python scripts/compare_llama_cpp.py CHECKPOINT --type Q4_K_M    some of either
    python scripts/compare_llama_cpp.py --write-golden              record what llama.cpp writes for the tiny checkpoint

llama-quantize is run without and with an importance matrix of random numbers; for mixtures that it refuses otherwise,
the matrix has entries for weights that are never evaluated too. Every difference is printed; those in MEANT are
explained in docs/exactness.md. Exit code 1 if there is any other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import gguf3n
from gguf3n.recipes import ImageRows
from workshop import checkpoints, llama_cpp_tools
from workshop.comparison import GOLDEN, NEEDY, OURS, TYPES, describe, differences, meant, random_importances
from workshop.snapshots import FTYPES


def compare(source: Path, quant: str, directory: Path) -> int:
    """Convert with both, print the differences; returns how many are not meant."""
    theirs, ours = directory / "theirs.gguf", directory / "ours.gguf"
    llama_cpp_tools.run(llama_cpp_tools.convert_command(source, theirs, quant.lower()))
    recipe = replace(gguf3n.find_recipe(OURS.get(quant, quant)), image_rows=ImageRows.LLAMA_CPP)
    gguf3n.convert(source, recipe, ours, force=True)
    facts = describe(ours)
    found = differences(facts, describe(theirs))
    unmeant = [difference for difference in found if meant(quant, difference[0]) is None]
    n_equal = sum(name.startswith("tensor") and name.endswith("/bytes") for name in facts) - len(
        {name.rpartition("/")[0] for name, *_ in found if name.startswith("tensor")}
    )
    print(f"{quant}: {n_equal} tensors equal to the byte, {len(found)} differences, {len(unmeant)} not meant")
    for why in dict.fromkeys(filter(None, (meant(quant, name) for name, *_ in found))):
        print(f"  {sum(meant(quant, name) == why for name, *_ in found)} x {why}")
    for name, mine, other in unmeant:
        print(f"  {name}: ours {str(mine)[:100]}, llama.cpp {str(other)[:100]}")
    for path in (theirs, ours):
        path.unlink()
    return len(unmeant)


def compare_quantize(source: Path, quants: Sequence[str], directory: Path) -> int:
    """Quantize with both, with and without importances; returns how many tensors differ in type or bytes."""
    full, theirs, ours, file = (directory / name for name in ("full.gguf", "theirs.gguf", "ours.gguf", "imatrix.npz"))
    gguf3n.convert(source, "BF16@llama.cpp", full)  # the comparison with the converter proves that it writes the same
    n_different = 0
    for quant in quants:
        for guided in (False, True):
            if quant in NEEDY and not guided:
                continue
            imatrix = random_importances(source, complete=quant in NEEDY) if guided else None
            if imatrix is not None:
                np.savez(file, **{name: entry.quant_weights for name, entry in imatrix.entries.items()})
            command = llama_cpp_tools.quantize_command(full, theirs, quant, imatrix=file if guided else None)
            llama_cpp_tools.run(command)
            gguf3n.convert(source, f"{quant}@llama.cpp", ours, imatrix=imatrix, force=True)
            facts = describe(ours)
            found = [
                difference
                for difference in differences(facts, describe(theirs))
                if difference[0].startswith("tensor") or "general.file_type" in difference[0]
            ]
            n_tensors = sum(name.startswith("tensor") and name.endswith("/bytes") for name in facts)
            print(f"{quant}{' with importances' * guided}: {n_tensors} tensors, {len(found)} differences", flush=True)
            for name, mine, other in found[:10]:
                print(f"  {name}: ours {mine}, llama-quantize {other}")
            n_different += len(found)
            theirs.unlink()
            ours.unlink()
    return n_different


def write_golden() -> None:
    """Record what llama.cpp's converter writes for the tiny checkpoint."""
    golden = {"provenance": f"convert_hf_to_gguf.py of llama-cpp-python {llama_cpp_tools.VERSION}", "types": {}}
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "tiny"
        checkpoints.make(source, checkpoints.Options())
        for quant in TYPES:
            path = Path(name) / "theirs.gguf"
            llama_cpp_tools.run(llama_cpp_tools.convert_command(source, path, quant.lower()))
            golden["types"][quant] = describe(path)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, indent=0) + "\n", encoding="utf-8")
    print(GOLDEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="a checkpoint directory")
    parser.add_argument("--quantize", action="store_true", help="compare with llama-quantize")
    parser.add_argument("--type", action="append", choices=FTYPES, help="repeatable; all by default")
    parser.add_argument("--write-golden", action="store_true", help="record llama.cpp's side for the tests")
    options = parser.parse_args()
    if options.write_golden:
        write_golden()
    elif options.source is None:
        parser.error("name a checkpoint directory")
    else:
        with tempfile.TemporaryDirectory(dir=".") as directory:
            if options.quantize:
                unmeant = compare_quantize(options.source, options.type or FTYPES, Path(directory))
            else:
                unmeant = sum(compare(options.source, quant, Path(directory)) for quant in options.type or TYPES)
        sys.exit(unmeant > 0)


if __name__ == "__main__":
    main()
