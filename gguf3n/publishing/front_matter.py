"""The YAML at the top of a card: what it says, and changing a key without touching what people wrote around it.

---
license: gemma
---
# The card
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf3n.gemma3n.metadata import check_front_matter

FENCE = "---"
TOP_LEVEL = re.compile(r"^[^\s#-][^:]*:", re.MULTILINE)


def split(text: str) -> tuple[str | None, str]:
    """The front matter without its fences, None where there is none, and what stands below it."""
    lines = text.splitlines(keepends=True)
    if not lines or lines[0].rstrip() != FENCE:
        return None, text
    for i, line in enumerate(lines[1:], 1):
        if line.rstrip() == FENCE:
            return "".join(lines[1:i]), "".join(lines[i + 1 :])
    return None, text


def parse(text: str) -> dict[str, Any]:
    """What a card's front matter says; nothing where there is none.

    Raises: ValueError for what is no YAML, no mapping, or too much of it.
    """
    import yaml

    front, _ = split(text)
    if front is None:
        return {}
    try:
        check_front_matter(f"{FENCE}\n{front}{FENCE}")
        said = yaml.safe_load(front)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if said is None:
        return {}
    if not isinstance(said, dict):
        raise ValueError("not keys and values")
    return said


def with_values(text: str, values: Mapping[str, Any]) -> str:
    """The card with these keys: those that are there with another value are replaced in place, new ones stand last.

    Raises: ValueError, as `parse`.
    """
    said = parse(text)
    front, body = split(text)
    lines = (front or "").splitlines(keepends=True)
    for key, value in values.items():
        if key in said and said[key] == value:
            continue
        block = _block(key, value)
        start = next((i for i, line in enumerate(lines) if re.match(rf"['\"]?{re.escape(key)}['\"]?\s*:", line)), None)
        if start is None:
            lines.append(block)
            continue
        end = start + 1
        while end < len(lines) and not TOP_LEVEL.match(lines[end]) and not lines[end].startswith("#"):
            end += 1
        lines[start:end] = [block]
    separator = "" if front is not None or not body else "\n"
    return f"{FENCE}\n{''.join(lines)}{FENCE}\n{separator}{body}"


def _block(key: str, value: Any) -> str:
    import yaml

    dumped: str = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=10_000)
    return dumped
