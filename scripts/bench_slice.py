"""Times slices and adapters against what they can be held against: a plain copy, a plain conversion.

    python scripts/make_checkpoint.py --size mid-e4b -o /tmp/e4b
    python scripts/bench_slice.py /tmp/e4b --slice E2B

`gguf3n slice` is set against a copy of the bytes that it writes; `convert` with --slice and with --adapter (LoRA of
rank 16 for every matrix of the layers, made here) against `convert` alone. Each command is a process of its own; time
is wall-clock, memory the peak resident size of the process. The sides take turns; files are removed once measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gguf3n.gemma3n.source import open_checkpoint
from workshop.timing import Figure, copy_command, machine, measure, median, together

RANK = 16


def make_adapter(source: Path, directory: Path) -> Path:
    """An adapter in PEFT's layout."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, tensor in open_checkpoint(source).tensors.items():
        if ".layers." in name and len(tensor.shape) == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            n_outputs, n_inputs = tensor.shape
            arrays[f"{module}.lora_A.weight"] = 0.01 * rng.standard_normal((RANK, n_inputs), np.float32)
            arrays[f"{module}.lora_B.weight"] = 0.01 * rng.standard_normal((n_outputs, RANK), np.float32)
    directory.mkdir()
    save_file(arrays, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return directory


def gguf3n(*words: object) -> list[str]:
    return [sys.executable, "-m", "gguf3n", *map(str, words), "--quiet"]


def slice_and_copy(source: Path, named: str, directory: Path) -> tuple[Figure, Figure]:
    """The slice as a checkpoint, and a copy of its files."""
    target = directory / "slice"
    ours = measure(gguf3n("slice", source, named, "-o", target), target, keep=True)
    copied = directory / "copy"
    copies = [measure(copy_command(file, copied), copied) for file in sorted(target.iterdir())]
    shutil.rmtree(target)
    return ours, together(copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint of E4B's shape")
    parser.add_argument("--slice", default="E2.98B-block", help="its name")
    parser.add_argument("--type", default="Q8_0", help="what is converted to")
    parser.add_argument("--runs", type=int, default=3, help="of each side; medians are printed")
    parser.add_argument("--scratch", type=Path, help="where files are written; the usual place by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        directory = Path(name)
        adapter = make_adapter(options.source, directory / "adapter")
        sides = {
            "plain": (),
            "--slice": ("--slice", options.slice),
            "--slice --no-pad": ("--slice", options.slice, "--no-pad"),
            "--adapter": ("--adapter", adapter),
        }
        figures: dict[str, list[Figure]] = {side: [] for side in (*sides, "slice", "copy")}
        for _ in range(options.runs):
            for side, words in sides.items():
                output = directory / "x.gguf"
                command = gguf3n("convert", options.source, "-q", options.type, "-o", output, *words)
                figures[side].append(measure(command, output))
            for side, figure in zip(
                ("slice", "copy"), slice_and_copy(options.source, options.slice, directory), strict=True
            ):
                figures[side].append(figure)
    medians = {side: median(found) for side, found in figures.items()}
    print(f"{machine()}, {options.slice}, {options.type}, medians of {options.runs}")
    for side in sides:
        ratio = medians[side].seconds / medians["plain"].seconds
        print(f"convert {side:17} {medians[side]}   {medians[side].file_bytes / 1e9:.2f} GB   {ratio:.2f} x")
    print(f"slice                     {medians['slice']}   {medians['slice'].seconds / medians['copy'].seconds:.2f} x")
    print(f"copy                      {medians['copy']}")


if __name__ == "__main__":
    main()
