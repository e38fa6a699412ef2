"""How commands print: sizes, aligned columns, progress, errors. Plain text unless a person watches a terminal."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gguf3n.errors import Gguf3nError
from gguf3n.pipeline import Progress

LINE_EVERY_SHARE = 0.1
"""How often a run that nobody watches prints a line of progress."""


def human_bytes(n: float) -> str:
    """As in "4.23 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    raise AssertionError


def shape_text(shape: Sequence[int]) -> str:
    """As in "2048 x 8192", numpy order."""
    return " x ".join(map(str, shape))


def columns(rows: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    """Lines of aligned columns.

    Args:
        align: one of "<" and ">" for each column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True))
        yield "  ".join(cells).rstrip()


def print_json(value: Any) -> None:
    """The machine-readable result, the only thing on stdout.

    JSON has no infinity or NaN: they become strings. ASCII only, so that it can be parsed whatever the locale.
    """
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value


def print_error(error: Gguf3nError, *, as_json: bool) -> None:
    """An error in full on stderr; with --json also as the result."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text.assemble(("error: ", "bold red"), str(error)))
    if as_json:
        print_json(error.as_dict())


def print_note(label: str, text: str, *, quiet: bool) -> None:
    """Something a user should know, on stderr."""
    if not quiet:
        print(f"{label}: {text}", file=sys.stderr)


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A bar with bytes, rate and time left on a terminal, lines elsewhere; both on stderr."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _rich_bar() as update:
            yield update
    else:
        yield _progress_lines()


@contextmanager
def _rich_bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    with Bar(
        BarColumn(bar_width=None),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        expand=True,
    ) as bar:
        task = bar.add_task("bytes", total=None)
        yield lambda state: bar.update(task, completed=state.done_bytes, total=state.total_bytes)


def _progress_lines() -> Callable[[Progress], None]:
    printed = 0.0

    def update(state: Progress) -> None:
        nonlocal printed
        share = state.done_bytes / max(state.total_bytes, 1)
        if share < 1 and share < printed + LINE_EVERY_SHARE:
            return
        if printed == 1:
            return
        printed = share
        rate = state.done_bytes / max(state.seconds, 1e-9)
        left = (state.total_bytes - state.done_bytes) / max(rate, 1e-9)
        print(
            f"{math.floor(100 * share):3d}%  {human_bytes(state.done_bytes)} of {human_bytes(state.total_bytes)}  "
            f"{human_bytes(rate)}/s  {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return update


@contextmanager
def steps_bar(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """For work in named steps: a bar for each on a terminal, lines elsewhere; both on stderr.

    What it gives is called with a step's name, how much of it is done and how much there is.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _rich_steps() as update:
            yield update
    else:
        yield _step_lines()


@contextmanager
def _rich_steps() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    tasks: dict[str, TaskID] = {}
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        expand=True,
    ) as bar:

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step)
            bar.update(tasks[step], completed=done, total=total)

        yield update


def _step_lines() -> Callable[[str, int, int], None]:
    printed: dict[str, tuple[float, float]] = {}

    def update(step: str, done: int, total: int) -> None:
        share = done / max(total, 1)
        last, started = printed.setdefault(step, (0.0, time.monotonic()))
        if last == 1 or (share < 1 and share < last + LINE_EVERY_SHARE):
            return
        printed[step] = (share, started)
        seconds = time.monotonic() - started
        left = f"  {seconds / share - seconds:.0f} s left" if share < 1 else f"  {seconds:.0f} s"
        print(f"{step}  {math.floor(100 * share):3d}%{left}", file=sys.stderr, flush=True)

    return update
