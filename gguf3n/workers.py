"""One loop for many threads: how many there are, how they are started, watched and stopped."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from gguf3n.errors import UsageError, shown

PROGRESS_SECONDS = 0.1


def processors() -> int:
    """Those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def default_threads() -> int:
    """One a processor, and two more that work while others wait for the disk.

    # measured: E2B to Q8_0 with nothing cached, 2 processors: 15.8 s with 2 workers, 14.7 s with 4 (means of 2)
    """
    return processors() + 2


def check_threads(threads: int | None) -> None:
    """Raises: UsageError for a number of workers that there can't be."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise UsageError("threads: not a number of workers", expected="1 or more", found=shown(threads))


def run_workers(loop: Callable[[], None], threads: int, stop: threading.Event, report: Callable[[], None]) -> None:
    """Run a loop in each of some threads until all have ended or one has failed.

    Args:
        stop: set when it is over, however it ends; loops look at it.
        report: called from the calling thread about ten times a second, and at the end.

    Raises: what a loop raises; KeyboardInterrupt.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="gguf3n") as pool:
        try:
            pending = {pool.submit(loop) for _ in range(threads)}
            while pending:
                done, pending = wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
                for worker in done:
                    worker.result()
                report()
        finally:
            stop.set()  # before the pool waits for its workers
