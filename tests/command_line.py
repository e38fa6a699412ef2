"""The command line in the process of the tests; the fixture `run` of conftest.py calls it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from gguf3n import cli


class Said(NamedTuple):
    """What a command left and printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Said]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("lint", path)`, and what it says."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["gguf3n", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("signal.signal", lambda *_: None)
            try:
                cli.main()
            except SystemExit as left:
                code = int(left.code or 0)
        return Said(code, *capsys.readouterr())

    return run


def plain(text: str) -> bool:
    """Whether a text is fit for a pipe: no escapes, eighty columns but for a path on a line of its own."""
    lines = text.splitlines()
    return "\x1b" not in text and all(len(line) <= 80 or ("/" in line and " " not in line) for line in lines)
