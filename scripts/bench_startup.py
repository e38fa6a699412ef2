"""How long a word of help takes, beside Python's own start and, where they are installed, uv and hf.

    python scripts/bench_startup.py              five turns
    python scripts/bench_startup.py --turns 20

All take turns, so that a busy machine slows all; each figure is a median, the ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from functools import partial

from workshop.timing import machine, seconds

PYTHON = [sys.executable, "-c", "pass"]
OURS = [sys.executable, "-m", "gguf3n"]
COMMANDS = {
    "python -c pass": PYTHON,
    "gguf3n --version": [*OURS, "--version"],
    "gguf3n --help": [*OURS, "--help"],
    "gguf3n recipes list": [*OURS, "recipes", "list"],
}
OTHERS = {"uv --version": ["uv", "--version"], "hf version": ["hf", "version"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    commands = COMMANDS | {name: words for name, words in OTHERS.items() if shutil.which(words[0])}
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for words in commands.values():  # once before it counts: files are read from the disk, Python compiles
        _run(words)
    for _ in range(turns):
        for name, words in commands.items():
            samples[name].append(seconds(partial(_run, words), 1))
    print(f"{machine()}; {turns} turns")
    plain = samples["python -c pass"]
    for name, found in samples.items():
        ratio = statistics.median(one / base for one, base in zip(found, plain, strict=True))
        print(f"{name:20} {statistics.median(found):6.3f} s {ratio:6.2f}")
    for name in OTHERS.keys() - commands.keys():
        print(f"{name:20} not installed")


def _run(words: list[str]) -> None:
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
