"""Sizes as people write them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gguf3n.errors import UsageError

UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 1024.0, "MIB": 1024.0**2, "GIB": 1024.0**3}
COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9}


def parse_bytes(text: str | None, option: str) -> float | None:
    """As in "2.5GB" or "2.5GiB"; None for an option that is not given. Raises: UsageError."""
    return None if text is None else _number(text, option, UNITS, "as 2.5GB or 2.5GiB")


def parse_count(text: str | None, option: str) -> float | None:
    """As in "2.5B" or "900M"; None for an option that is not given. Raises: UsageError."""
    return None if text is None else _number(text, option, COUNTS, "as 2.5B or 900M")


def _number(text: str, option: str, units: Mapping[str, float], expected: str) -> float:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?) ?([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in units or not float(match[1]):
        raise UsageError(f"{option} {text!r}: no size", expected=expected)
    return float(match[1]) * units[match[2]]
