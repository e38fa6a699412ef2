"""The same bytes on another processor: every type quantized for aarch64, under qemu-user, and here.

    python scripts/compare_aarch64.py DIRECTORY                              every type, generic aarch64
    python scripts/compare_aarch64.py DIRECTORY Q4_K IQ3_S --cpu apple-m1 --cpu neoverse-v1

Needs Debian or one of its kin, and its qemu-user. A Python for aarch64 is put into DIRECTORY, with the kernels that it
compiles: under emulation these take about a minute a type and processor. The rows are those of tests/quants. Exit code
1 if a byte differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from gguf3n.quants import QUANTIZERS
from workshop import emulation
from workshop.places import ROOT

MIX = ("-m", "tests.quants.quantize_mix", "--not-huge")
"""Why not huge: their scales are no numbers, and the sign of those is the processor's; they are refused before."""


def type_name(word: str) -> str:
    """The name of a type that is written."""
    if word not in {qtype.name for qtype in QUANTIZERS}:
        raise argparse.ArgumentTypeError(f"no type that is written: {word}")
    return word


def here(output: Path, types: list[str]) -> dict[str, np.ndarray]:
    """What this machine makes."""
    subprocess.run([sys.executable, *MIX, str(output), *types], cwd=ROOT, check=True)
    return dict(np.load(output))


def there(directory: Path, cpu: str, output: Path, types: list[str]) -> dict[str, np.ndarray]:
    """What the emulated processor makes."""
    emulation.run_python(directory, cpu, *MIX, str(output), *types)
    return dict(np.load(output))


def compare(cpu: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    """Print a line a type and mode; whether all bytes are the same."""
    modes = [name for name in ours if name != "registers"]
    print(f"{cpu}: {len(modes)} types and modes")
    n_different = 0
    for name in modes:
        n_wrong = int((ours[name] != theirs[name]).sum())
        n_different += bool(n_wrong)
        print(f"  {name:18} {ours[name].size:9,} bytes  {f'{n_wrong:,} DIFFER' if n_wrong else 'the same'}")
    return not n_different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("types", nargs="*", type=type_name, metavar="TYPE")
    parser.add_argument("--cpu", action="append", choices=emulation.CPUS, help="default: generic")
    options = parser.parse_args()
    emulation.check_tools()
    directory = options.directory.resolve()
    emulation.make_python(directory)
    with tempfile.TemporaryDirectory() as temporary:
        ours = here(Path(temporary, "here.npz"), options.types)
        same = [
            compare(cpu, ours, there(directory, cpu, Path(temporary, f"{cpu}.npz"), options.types))
            for cpu in options.cpu or ["generic"]
        ]
    sys.exit(not all(same))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]} failed with {error.returncode}, so not everything was compared")
