"""Puts what scripts generate into the pages of docs/, between markers."""

from __future__ import annotations

import sys

from workshop.places import DOCS

RECIPES = DOCS / "quantizations.md"
MMPROJ = DOCS / "mmproj.md"
QUALITY = DOCS / "quality.md"


def filled(page: str, marker: str, content: str) -> str:
    """The text of a page with other content between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    begin, end = f"<!-- {marker}:begin -->\n", f"<!-- {marker}:end -->\n"
    head, opened, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        sys.exit(f"no markers {begin.strip()} and {end.strip()} in the page")
    return head + begin + content + end + tail
