"""Fixtures that every room's tests share: checkpoints of random weights, made once for each set of options."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Run, runner
from workshop import checkpoints


def pytest_configure() -> None:
    """Ctrl-C is what it is by default. Why: a shell that starts the tests in the background has it ignored, and so
    have all processes that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(layout="nested", shards=3)`: the directory of such a checkpoint; see checkpoints.Options.

    Tests share it: what changes a file copies the directory first.
    """
    made: dict[checkpoints.Options, Path] = {}

    def make(**options: Any) -> Path:
        key = checkpoints.Options(**options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"checkpoint-{key.size}-{key.layout}")
            checkpoints.make(made[key], key)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """The small checkpoint in the published layout, BF16, both tokenizers."""
    return make_checkpoint()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("lint", path)`, and what it says: exit code, stdout, stderr."""
    return runner(monkeypatch, capsys)
