"""Colour for a person at a terminal; plain text of eighty columns for everything else."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata

PIPE_COLUMNS = 80

STYLES = {"bold": "1", "dim": "2", "red": "1;31", "yellow": "33", "green": "32", "blue": "36"}


def paint(text: str, style: str) -> str:
    """The text in a style of STYLES. Why: no colour where NO_COLOR is set (no-color.org) or nobody looks."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m"


def line_width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((PIPE_COLUMNS, 24)).columns if sys.stdout.isatty() else PIPE_COLUMNS


def printable(text: str) -> str:
    """Without characters that a file could steer a terminal with, such as escapes and changes of direction."""
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cf") else c for c in text)


def cut(text: str, width: int) -> str:
    """At most `width` printable characters, with a mark where some are missing."""
    text = printable(text)
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def filled(text: str, indent: int = 2) -> str:
    """Lines of the terminal's width, indented, later ones more."""
    first = " " * indent
    return textwrap.fill(printable(text), line_width(), initial_indent=first, subsequent_indent=first + "  ")
