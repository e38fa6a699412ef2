"""How commands print: sizes, aligned columns, JSON, notes and errors. Plain text unless a person watches a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from gguf3n.cli.paint import paint, tell
from gguf3n.errors import Gguf3nError
from gguf3n.outside import inert_json, masked


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
    print(inert_json(json.dumps(_finite(value), indent=2, allow_nan=False)))


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
    first, *others = str(error).split("\n")
    tell(f"{paint('error: ', 'red', is_error=True)}{first}", *others)
    if as_json:
        print_json(error.as_dict())


def print_note(label: str, text: str, *, quiet: bool) -> None:
    """Something a user should know, on stderr."""
    if not quiet:
        first, *others = masked(text).split("\n")
        tell(f"{label}: {first}", *(f"  {line}" for line in others))
