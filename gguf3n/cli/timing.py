"""From bytes done to the progress that a bar shows."""

from __future__ import annotations

import time
from collections.abc import Callable

from gguf3n.pipeline import Progress


def timed(show: Callable[[Progress], None] | None) -> Callable[[int, int], None] | None:
    """A function of bytes done and in total that shows progress; None where nobody wants to see it."""
    if show is None:
        return None
    started = time.monotonic()
    return lambda done, total: show(Progress(done, total, time.monotonic() - started))
