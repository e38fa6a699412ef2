"""The gguf package's readers of model files, without what they log: gguf3n says itself what matters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("gguf.vocab", "metadata")


@contextmanager
def silenced() -> Iterator[None]:
    """Keeps the package's loggers quiet while it runs."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
