"""A sound file, and copies of it to be broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import gguf3n
from gguf3n.inspection.repair import FIXES, repair
from tests.inspection.faults import PLANTS


@pytest.fixture(scope="session")
def sound(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint in Q8_0, with what lint only notes mended too. Not to be changed."""
    path = tmp_path_factory.mktemp("sound") / "tiny-Q8_0.gguf"
    gguf3n.convert(tiny_checkpoint, "Q8_0", path)
    repair(path, only=("two-bos", "end-of-turn", "sampling"))
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound file."""
    return Path(shutil.copy(sound, tmp_path / "copy.gguf"))


@pytest.fixture
def planted(copy: Path) -> Callable[[str], Path]:
    """`planted("gaps")`: a copy with the fault of a check."""

    def plant(check_id: str) -> Path:
        return PLANTS[check_id](copy) or copy

    return plant


NOTES = ("two-bos", "end-of-turn", "sampling")
assert set(NOTES) <= set(FIXES)
