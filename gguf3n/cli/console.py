"""How commands print: sizes, aligned columns, JSON, notes and errors. Plain text unless a person watches a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

from gguf3n.cli.paint import paint, tell
from gguf3n.errors import Gguf3nError
from gguf3n.outside import inert_json, masked

PIECES_AT_ONCE = 1 << 14
"""Of JSON, for one call of the stream."""


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

    JSON has no infinity or NaN: they become strings. ASCII only, so that it can be parsed whatever the locale. Arrays
    of a file are written as they are read, however large.

    Exact: as `json.dumps` with an indent of 2.
    """
    pieces = chain(_json(value, "\n"), "\n")
    while some := "".join(islice(pieces, PIECES_AT_ONCE)):
        sys.stdout.write(some)


def _json(value: Any, line: str) -> Iterator[str]:
    """JSON, a piece at a time.

    Args:
        line: its end, and the indent of the next.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        yield _scalar(value)
        return
    inner = line + "  "
    before = inner
    if isinstance(value, Mapping):
        yield "{"
        for name, item in value.items():
            key = _scalar(name if isinstance(name, str) else _scalar(name))
            yield f"{before}{key}: "
            yield from _json(item, inner)
            before = "," + inner
        yield f"{line}}}" if before != inner else "}"
        return
    yield "["
    for item in value:
        yield before
        if isinstance(item, int | float | str):
            yield _scalar(item)
        else:
            yield from _json(item, inner)
        before = "," + inner
    yield f"{line}]" if before != inner else "]"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return inert_json(json.dumps(value))
    if isinstance(value, float):
        return float.__repr__(value) if math.isfinite(value) else json.dumps(str(value))
    return json.dumps(value)


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
