"""Colour for a person at a terminal; plain text of eighty columns for everything else. Nothing is printed elsewhere.

    say           lines of a result, to stdout
    tell          lines for the person, to stderr
    say_exactly   a text of a file that a program may want as it is
    annotate      a finding, as GitHub Actions reads it

Each line is one line, in characters that do nothing to a terminal, and is no command to what reads a log.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import textwrap

from gguf3n.outside import inert, printable

PIPE_COLUMNS = 80

STYLES = {"bold": "1", "dim": "2", "red": "1;31", "yellow": "33", "green": "32", "blue": "36"}

_PAINTED = re.compile(rf"(\x1b\[(?:0|{'|'.join(STYLES.values())})m)")


def paint(text: str, style: str, *, is_error: bool = False) -> str:
    """The text in a style of STYLES. Why: no colour where NO_COLOR is set (no-color.org) or nobody looks."""
    text = printable(text)
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if _in_colour(is_error=is_error) else text


def _in_colour(*, is_error: bool = False) -> bool:
    stream = sys.stderr if is_error else sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say(*lines: str) -> None:
    """Prints lines of a result."""
    for line in lines:
        print(_harmless(line, in_colour=_in_colour()))


def tell(*lines: str) -> None:
    """Prints lines on stderr."""
    for line in lines:
        print(_harmless(line, in_colour=_in_colour(is_error=True)), file=sys.stderr)


def _harmless(line: str, *, in_colour: bool) -> str:
    if not in_colour:
        return inert(printable(line))
    return "".join(part if _PAINTED.fullmatch(part) else inert(printable(part)) for part in _PAINTED.split(line))


def say_exactly(text: str) -> None:
    """Prints a text of a file as it is to a file or a program; harmless to a terminal or a log that CI keeps."""
    if sys.stdout.isatty() or (os.environ.get("CI") and not _is_file()):
        say(*text.removesuffix("\n").expandtabs().split("\n"))
    else:
        print(text, end="")


def _is_file() -> bool:
    try:
        return stat.S_ISREG(os.fstat(sys.stdout.fileno()).st_mode)
    except OSError:
        return False


def annotate(severity: str, title: str, file: str, message: str) -> None:
    """Source: workflow commands of GitHub Actions, whose values are percent-encoded."""
    name = _encoded(file).replace(":", "%3A").replace(",", "%2C")
    print(f"::{severity} file={name},title={title}::{_encoded(message)}")


def _encoded(text: str) -> str:
    return "%0A".join(printable(line).replace("%", "%25") for line in text.split("\n"))


def line_width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((PIPE_COLUMNS, 24)).columns if sys.stdout.isatty() else PIPE_COLUMNS


def cut(text: str, width: int) -> str:
    """At most `width` printable characters, with a mark where some are missing."""
    text = printable(text)
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def filled(text: str, indent: int = 2) -> list[str]:
    """Lines of the terminal's width, indented, later ones more."""
    first = " " * indent
    return textwrap.wrap(printable(text), line_width(), initial_indent=first, subsequent_indent=first + "  ") or [""]
