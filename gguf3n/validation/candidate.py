"""The file that is to be proved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf3n.formats.gguf_reader import GGUFFile, open_gguf
from gguf3n.inspection.subject import Subject


@dataclass(frozen=True)
class Candidate:
    """The file that is to be proved. Its header is read once, when a stage first asks for it."""

    path: Path

    @cached_property
    def gguf(self) -> GGUFFile:
        """With faults of the layout collected in `problems`. Raises: GGUFError for an unreadable header."""
        return open_gguf(self.path, strict=False)

    @cached_property
    def subject(self) -> Subject:
        """What follows from the header. Raises: GGUFError."""
        return Subject(self.gguf)
