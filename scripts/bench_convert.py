"""Times our conversion against llama.cpp's two programs, on the same checkpoint in the same run.

    python scripts/make_checkpoint.py --size e2b -o /tmp/e2b
    python scripts/bench_convert.py /tmp/e2b --type Q8_0 --type Q4_0 --type BF16

Theirs is convert_hf_to_gguf.py to BF16, then llama-quantize; ours is TYPE@llama.cpp, which has the same bytes in every
tensor. BF16 is set against a plain copy of the checkpoint's bytes as well. Each command is a process of its own; time
is wall-clock, memory the peak resident size of the process. Files are removed as soon as they are measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from workshop import llama_cpp_tools
from workshop.timing import Figure, copy_command, measure, median, together


def ours(source: Path, quant: str, directory: Path, threads: int | None) -> Figure:
    output = directory / "ours.gguf"
    command = [
        sys.executable,
        "-m",
        "gguf3n",
        "convert",
        str(source),
        "-q",
        f"{quant}@llama.cpp",
        "-o",
        str(output),
        "--quiet",
    ]
    return measure([*command, *(["--threads", str(threads)] if threads else [])], output)


def theirs(source: Path, quants: list[str], directory: Path, threads: int | None) -> dict[str, Figure]:
    """The converter once, then llama-quantize for each type."""
    full = directory / "theirs-BF16.gguf"
    first = measure(llama_cpp_tools.convert_command(source, full, "bf16"), full, keep=True)
    figures = {"BF16": first}
    for quant in quants:
        if quant != "BF16":
            output = directory / f"theirs-{quant}.gguf"
            command = llama_cpp_tools.quantize_command(full, output, quant, threads or 0)
            figures[quant] = together([first, measure(command, output)])
    full.unlink()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkpoint directory")
    parser.add_argument("--type", action="append", help="repeatable; Q8_0, Q4_0 and BF16 by default")
    parser.add_argument("--runs", type=int, default=1, help="of each side; medians are printed")
    parser.add_argument("--threads", type=int, help="of both sides; their defaults without")
    parser.add_argument("--scratch", type=Path, default=Path(), help="where files are written; here by default")
    options = parser.parse_args()
    quants = [quant.upper() for quant in options.type or ["Q8_0", "Q4_0", "BF16"]]
    llama_cpp_tools.converter()
    llama_cpp_tools.quantizer_python()
    source_files = sorted(options.source.glob("*.safetensors"))
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        directory = Path(name)
        mine: dict[str, list[Figure]] = {quant: [] for quant in quants}
        other: dict[str, list[Figure]] = {quant: [] for quant in quants}
        copies = []
        for _ in range(options.runs):
            if "BF16" in quants:
                target = directory / "copy"
                copy_commands = [copy_command(file, target) for file in source_files]
                copies.append(together([measure(command, target) for command in copy_commands]))
            for quant in quants:
                mine[quant].append(ours(options.source, quant, directory, options.threads))
            for quant, figure in theirs(options.source, quants, directory, options.threads).items():
                if quant in other:
                    other[quant].append(figure)
    for quant in quants:
        a, b = median(mine[quant]), median(other[quant])
        print(f"{quant:5} gguf3n     {a}")
        print(f"{quant:5} llama.cpp  {b}")
        print(f"{quant:5} ratio      {b.seconds / a.seconds:7.1f} x  {b.peak_bytes / a.peak_bytes:6.1f} x less memory")
    if copies:
        copy = median(copies)
        print(f"copy             {copy}")
        print(f"BF16 / copy      {median(mine['BF16']).seconds / copy.seconds:7.2f} x the time of a plain copy")


if __name__ == "__main__":
    main()
