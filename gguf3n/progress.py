"""How far long work is: one shape for all of it, and the counter behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Progress:
    """How far one stage of some work is.

    Units: `done` and `total` are counted in `unit`, such as "bytes", "weights", "positions" or "chunks"; seconds since
    the stage began.
    """

    stage: str
    done: int
    total: int
    unit: str
    seconds: float

    @property
    def share(self) -> float:
        """How much of the whole is done, from 0 to 1; 1 of nothing."""
        return self.done / self.total if self.total else 1.0


OnProgress: TypeAlias = Callable[[Progress], None]
"""What is told of progress, about ten times a second and at the end of each stage."""


class Meter:
    """Counts what is done of a stage, in any thread, and tells whoever wants to know.

    Args:
        show: told by `report`, in the thread that calls it; None where nobody wants to know.
    """

    def __init__(self, stage: str, unit: str, total: int, show: OnProgress | None) -> None:
        self.stage = stage
        self.unit = unit
        self.total = total
        self.done = 0
        self._show = show
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def add(self, n: int) -> None:
        """Count n more as done."""
        with self._lock:
            self.done += n

    def report(self) -> None:
        """Tell how far it is."""
        if self._show is not None:
            self._show(Progress(self.stage, self.done, self.total, self.unit, time.monotonic() - self._started))

    def advance(self, n: int = 1) -> None:
        """Count n more, and tell: for work that one thread does."""
        self.add(n)
        self.report()
