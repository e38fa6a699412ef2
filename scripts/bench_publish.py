"""Times six recipes of three small models: in one process, on one worker and on two, and by llama.cpp's two programs.

    python scripts/bench_publish.py --scratch /tmp

The models are of random weights, made in the run. "here" reads each model once for all its files; a worker reads it
for each file. llama.cpp's side, where LLAMA_CPP_DIR is set (see workshop/llama_cpp_tools.py), is the converter once for
each model and llama-quantize for each recipe, one after another. Nothing is uploaded. Times are wall-clock, of one run
each; starting the workers is part of theirs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gguf3n.publishing.dask_executor import run_on_dask
from gguf3n.publishing.jobs import Jobs, ModelJob, run_here
from workshop import checkpoints, llama_cpp_tools
from workshop.timing import machine, measure

RECIPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M")
N_MODELS = 3


def timed(call: Callable[[], object]) -> float:
    """Units: seconds."""
    started = time.monotonic()
    call()
    return time.monotonic() - started


def theirs(sources: list[Path], directory: Path) -> float:
    """Seconds of the two programs in sequence."""
    total = 0.0
    for source in sources:
        full = directory / "theirs-BF16.gguf"
        total += measure(llama_cpp_tools.convert_command(source, full, "bf16"), full, keep=True).seconds
        for recipe in RECIPES:
            output = directory / f"theirs-{recipe}.gguf"
            total += measure(llama_cpp_tools.quantize_command(full, output, recipe, 0), output).seconds
        full.unlink()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(), help="where files are written; here by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        directory = Path(name)
        sources = [directory / f"model{number}" for number in range(N_MODELS)]
        for number, source in enumerate(sources):
            checkpoints.make(source, checkpoints.Options(seed=number))
        models = tuple(
            ModelJob(str(source), f"me/{source.name}-GGUF", RECIPES, despite_findings=True) for source in sources
        )
        jobs = Jobs(directory / "published", models, upload=False)
        ways: dict[str, Callable[[], object]] = {
            "here": lambda: run_here(jobs),
            "one worker": lambda: run_on_dask(jobs, workers=1),
            "two workers": lambda: run_on_dask(jobs, workers=2),
        }
        run_here(jobs)  # compiles what is not compiled yet
        print(f"{len(RECIPES)} recipes of {N_MODELS} models, {machine()}, {os.cpu_count()} processors")
        for way, run in ways.items():
            shutil.rmtree(jobs.directory)
            print(f"{way:12} {timed(run):7.1f} s", flush=True)
        if os.environ.get("LLAMA_CPP_DIR"):
            print(f"{'llama.cpp':12} {theirs(sources, directory):7.1f} s")
        else:
            print("llama.cpp's programs: not measured, LLAMA_CPP_DIR is not set", file=sys.stderr)


if __name__ == "__main__":
    main()
