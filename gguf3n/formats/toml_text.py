"""TOML from a user, as Python reads it, but never for long: recipes and slices are written in it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from gguf3n.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QUOTED = r"\"[^\"]*\"|'[^']*'"
MAX_DOTS = 64
"""In a line, outside of strings. tomllib takes a minute for a key of 32,000 parts."""


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """The values of a file.

    Args:
        origin: the file's name, for messages.

    Raises: UsageError with the line.
    """
    for number, line in logical_lines(text):
        if re.sub(QUOTED, "", line).partition("#")[0].count(".") > MAX_DOTS:
            raise UsageError(f"{origin}, line {number}: a key of too many parts", expected=f"at most {MAX_DOTS}")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # not TOML; a number of too many digits; nested too deep
        match = re.search(r"\(at line (\d+), column \d+\)", str(error))
        where = f", line {match[1]}" if match else ""
        raise UsageError(f"{origin}{where}: not TOML", found=str(error)) from error


def logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that can hold a key or a header: not those inside multi-line strings."""
    inside: str | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if inside is None:
            yield number, line
        for quotes in re.findall(r'"""|\'\'\'', line):
            if inside is None:
                inside = quotes
            elif inside == quotes:
                inside = None
