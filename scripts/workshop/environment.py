"""A virtual environment with this package in it, for the scripts that a newcomer runs. Standard library only."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from workshop.places import ROOT

ALONE = {"dev": ("timm", "torchvision")}
"""What an extra takes besides, without what it depends on. Why: torchvision asks for a torch of its own build, with
gigabytes of CUDA; the tests need none of its operators (engines/torchvision_operators.py)."""


def make_environment(extra: str) -> Path:
    """Make .venv where it is missing and install the package with an extra; returns its Python."""
    directory = ROOT / ".venv"
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"making {directory}", flush=True)
        venv.create(directory, with_pip=True)
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    pinned = ("--constraint", ROOT / "constraints.txt")
    run(*install, *pinned, "--editable", f"{ROOT}[{extra}]")
    if extra in ALONE:
        run(*install, *pinned, "--no-deps", *ALONE[extra])
    return python


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a command and leave with its exit code if it fails."""
    words = [str(word) for word in command]
    shown = [Path(words[0]).name, *words[1:]]
    if "-c" not in words:
        print("$", *(word.removeprefix(f"{ROOT}{os.sep}") for word in shown), flush=True)
    done = subprocess.run(words, cwd=cwd, check=False)
    if done.returncode:
        sys.exit(done.returncode)
