"""Progress on stderr: a bar for each stage where a person watches a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gguf3n.cli.console import human_bytes
from gguf3n.cli.paint import tell
from gguf3n.outside import printable
from gguf3n.progress import OnProgress, Progress

LINE_EVERY_SHARE = 0.1
"""How often a run that nobody watches prints a line of progress."""


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[OnProgress | None]:
    """What shows progress; None where nobody wants to see it."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


def amount(progress: Progress) -> str:
    """How much is done, and how fast: as in "1.20 GiB of 8.31 GiB, 512.00 MiB/s"; nothing but for bytes."""
    if progress.unit != "bytes":
        return ""
    rate = human_bytes(progress.done / max(progress.seconds, 1e-9))
    return f"{human_bytes(progress.done)} of {human_bytes(progress.total)}, {rate}/s"


@contextmanager
def _bars() -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    tasks: dict[str, TaskID] = {}
    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        expand=True,
    ) as bar:

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(printable(progress.stage), amount="")
            bar.update(tasks[progress.stage], completed=progress.done, total=progress.total, amount=amount(progress))

        yield show


def _lines() -> OnProgress:
    printed: dict[str, float] = {}

    def show(progress: Progress) -> None:
        share, last = progress.share, printed.get(progress.stage, 0.0)
        if last == 1 or (share < 1 and share < last + LINE_EVERY_SHARE):
            return
        printed[progress.stage] = share
        left = progress.seconds / share - progress.seconds if share else 0.0
        parts = [
            progress.stage,
            f"{math.floor(100 * share):3d}%",
            amount(progress),
            f"{left:.0f} s left" if share < 1 else f"{progress.seconds:.0f} s",
        ]
        tell("  ".join(filter(None, parts)))

    return show
