"""What a measurement of speed needs: the machine's name, the time of a call, time and memory of a process."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COPY = (
    "import sys\n"
    "with open(sys.argv[1], 'rb', buffering=0) as source, open(sys.argv[2], 'wb', buffering=0) as target:\n"
    "    while data := source.read(1 << 24): target.write(data)\n"
)


@dataclass(frozen=True)
class Figure:
    """Units: seconds of wall-clock time, bytes of peak resident memory, bytes of the file written."""

    seconds: float
    peak_bytes: int
    file_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.seconds:7.1f} s   {self.peak_bytes / 1e9:6.2f} GB peak"


def machine() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def seconds(call: Callable[[], object], repeat: int) -> float:
    """Seconds of one of `repeat` calls."""
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def measure(command: list[str], output: Path, *, keep: bool = False) -> Figure:
    """Run a command; leaves with its output if it fails."""
    os.sync()
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        elapsed = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{' '.join(command)}\n{log.read().decode(errors='replace')[-3000:]}")
    figure = Figure(elapsed, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output.stat().st_size)
    if not keep:
        output.unlink()
    return figure


def copy_command(source: Path, target: Path) -> list[str]:
    """A process that copies a file as plainly as can be."""
    return [sys.executable, "-c", COPY, str(source), str(target)]


def together(figures: list[Figure]) -> Figure:
    """Commands that run one after the other: times add up, the larger peak counts."""
    return Figure(sum(f.seconds for f in figures), max(f.peak_bytes for f in figures), figures[-1].file_bytes)


def median(figures: list[Figure]) -> Figure:
    """The median of times, the largest peak."""
    return Figure(
        statistics.median(f.seconds for f in figures), max(f.peak_bytes for f in figures), figures[-1].file_bytes
    )
