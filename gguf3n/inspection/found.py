"""What a check yields: a place in a file, and what is wrong there."""

from __future__ import annotations

from typing import NamedTuple

FILE = "the file"
HEADER = "the header"


class Found(NamedTuple):
    """One fault.

    Args:
        where: what a fix or another program goes by: a tensor, a key, a token as in "token 5", a part of the file.
        what: what is wrong there.
        sentence: both together for a person, where it is not simply one after the other.
    """

    where: str
    what: str
    sentence: str = ""

    def __str__(self) -> str:
        return self.sentence or f"{self.where} {self.what}"


def named(where: str, what: str) -> Found:
    """A fault that the check's meaning explains, so that a person needs only the name."""
    return Found(where, what, where)


def absent(where: str) -> Found:
    """Something that should be there and is not."""
    return Found(where, "is missing", f"there is no {where}")


def said(where: str, what: str) -> Found:
    """A fault whose words need no place before them."""
    return Found(where, what, what)
