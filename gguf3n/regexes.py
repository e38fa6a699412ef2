"""Regular expressions of a recipe or an adapter: only those that come to an end soon, whatever the name.

Python's `re` tries every way in which an expression can match before it gives up, and nothing can stop it meanwhile. So
the ways are counted beforehand, from above, as the product of what each part can do with the longest name:
a character can match in one way, `.*` in as many ways as there are lengths, `(a|b)` in two, `(.*)*` in more than there
are atoms. Four `.*` one after another are allowed, a repeat of a repeat of any length is not.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

NEW_HOME = sys.version_info >= (3, 11)
parser: Any = importlib.import_module("re._parser" if NEW_HOME else "sre_parse")
codes: Any = importlib.import_module("re._constants" if NEW_HOME else "sre_constants")
"""What `re` itself reads expressions with."""

MAX_NAME = 64
"""GGML_MAX_NAME of ggml.h: no tensor's name is longer."""
MAX_WAYS = 1 << 28
"""Most of them end at the first character that differs: the worst expression allowed takes a hundredth of a second a
name."""
MAX_LENGTH = 1000


def check_regex(pattern: str, longest: int = MAX_NAME) -> None:
    """See that an expression matches soon, or fails to.

    Args:
        longest: characters of the longest name that it is held against.

    Raises: ValueError for what is no regular expression, or may take for ever to match.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"{len(pattern):,} characters, more than {MAX_LENGTH:,}")
    try:
        re.compile(pattern)
        n_ways = _ways(parser.parse(pattern), longest)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if n_ways > MAX_WAYS:
        raise ValueError("too many ways to match: repeats inside of repeats, or too many one after another")


def _ways(parts: Any, longest: int) -> int:
    """In how many ways a sequence can match the beginning of a name, at most; any number above MAX_WAYS is as good."""
    n_ways = 1
    for code, argument in parts:
        n_ways = min(n_ways * _ways_of(code, argument, longest), MAX_WAYS + 1)
    return n_ways


def _ways_of(code: Any, argument: Any, longest: int) -> int:
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT) or code is getattr(codes, "POSSESSIVE_REPEAT", None):
        least, most, item = argument
        each = _ways(item, longest)
        least, most = min(int(least), longest), min(int(most), longest)
        return most - least + 1 if each == 1 else min(sum(each**n for n in range(least, most + 1)), MAX_WAYS + 1)
    if code is codes.BRANCH:
        return sum(_ways(each, longest) for each in argument[1])
    if code is codes.SUBPATTERN:
        return _ways(argument[-1], longest)
    if code in (codes.ASSERT, codes.ASSERT_NOT):
        return _ways(argument[1], longest)
    if code is getattr(codes, "ATOMIC_GROUP", None):
        return _ways(argument, longest)
    if code is codes.GROUPREF_EXISTS:
        return sum(_ways(each, longest) for each in argument[1:] if each is not None)
    return 1  # characters, sets of them, places, and what a group has matched
