"""Compares our files with those of llama.cpp's own programs, key by key, tensor by tensor, byte by byte.

    python scripts/compare_llama_cpp.py CHECKPOINT                  convert_hf_to_gguf.py, its types
    python scripts/compare_llama_cpp.py CHECKPOINT --quantize       llama-quantize, all mixtures as NAME@llama.cpp
    python scripts/compare_llama_cpp.py CHECKPOINT --type Q4_K_M    some of either
    python scripts/compare_llama_cpp.py --write-golden              record what llama.cpp writes for the tiny checkpoint

llama-quantize is run without and with an importance matrix of random numbers; for mixtures that it refuses otherwise,
the matrix has entries for weights that are never evaluated too. Every difference is printed; those in MEANT are
explained in the README. Exit code 1 if there is any other.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp_tools
import make_checkpoint
import numpy as np
from make_recipe_snapshots import FTYPES

import gguf3n
from gguf3n.formats.imatrix import Entry, ImportanceMatrix
from gguf3n.gemma3n.tensors import Storage

GOLDEN = Path(__file__).resolve().parent.parent / "fixtures" / "llama_cpp" / "tiny.json"
TYPES = ("F32", "F16", "BF16", "Q8_0")
"""What convert_hf_to_gguf.py writes."""

OURS = {"Q8_0": "Q8_0@llama.cpp"}
"""Our name where the plain one means something else."""

NEEDY = ("IQ3_XXS", "IQ3_XS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S")
"""What llama-quantize refuses without an entry for every matrix."""

MEANT: tuple[tuple[str, str, str], ...] = (
    (
        "Q8_0",
        "tensor */type",
        "convert_hf_to_gguf.py quantizes AltUp, LAuReL and per-layer projection matrices to Q8_0; "
        "llama-quantize, the published files and we keep them 16-bit",
    ),
)
"""Differences we want: type written, pattern of the difference, reason."""


def describe(path: Path) -> dict[str, Any]:
    """A file as comparable facts: keys with type and value, tensors with shape, type and digest of their bytes."""
    gguf = gguf3n.open_gguf(path)
    facts: dict[str, Any] = {}
    for key in gguf.keys.values():
        value = gguf.value(key.name)
        text = json.dumps(value)
        facts[f"key {key.name}/type"] = key.type_name
        facts[f"key {key.name}/value"] = text if len(text) < 400 else hashlib.sha256(text.encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        for tensor in gguf.tensors.values():
            digest = hashlib.sha256()
            file.seek(tensor.offset)
            left = tensor.n_bytes
            while left:
                data = file.read(min(left, 1 << 24))
                digest.update(data)
                left -= len(data)
            facts[f"tensor {tensor.name}/shape"] = list(tensor.shape)
            facts[f"tensor {tensor.name}/type"] = tensor.qtype.name
            facts[f"tensor {tensor.name}/bytes"] = digest.hexdigest()[:16]
    return facts


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(fact, ours, theirs) of all that differs. Bytes of tensors whose types differ are not compared."""
    found = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if ours.get(name) == theirs.get(name):
            continue
        subject, _, fact = name.rpartition("/")
        if fact == "bytes" and ours.get(f"{subject}/type") != theirs.get(f"{subject}/type"):
            continue
        found.append((name, ours.get(name), theirs.get(name)))
    return found


def meant(quant: str, name: str) -> str | None:
    """The reason of a difference we want."""
    return next((why for when, pattern, why in MEANT if when == quant and fnmatch.fnmatchcase(name, pattern)), None)


def compare(source: Path, quant: str, directory: Path) -> int:
    """Convert with both, print the differences; returns how many are not meant."""
    theirs, ours = directory / "theirs.gguf", directory / "ours.gguf"
    llama_cpp_tools.run(llama_cpp_tools.convert_command(source, theirs, quant.lower()))
    gguf3n.convert(source, OURS.get(quant, quant), ours, force=True)
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


def random_importances(source: Path, *, complete: bool) -> ImportanceMatrix:
    """An entry for each matrix of a layer, where wanted also for those that are never evaluated."""
    rng = np.random.default_rng(0)
    entries = {
        tensor.name: Entry(rng.chisquare(2, (1, tensor.n_per_row)).astype(np.float32), np.ones(1, np.float32))
        for tensor in gguf3n.read_source(source).tensors
        if tensor.storage is Storage.QUANTIZABLE and tensor.bid is not None and (tensor.evaluated or complete)
    }
    return ImportanceMatrix(Path("random"), entries)


def compare_quantize(source: Path, quants: Sequence[str], directory: Path) -> int:
    """Quantize with both, with and without importances; returns how many tensors differ in type or bytes."""
    full, theirs, ours, file = (directory / name for name in ("full.gguf", "theirs.gguf", "ours.gguf", "imatrix.npz"))
    gguf3n.convert(source, "BF16", full)  # the comparison with the converter proves that it writes the same
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
        make_checkpoint.make(source, make_checkpoint.Options())
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
