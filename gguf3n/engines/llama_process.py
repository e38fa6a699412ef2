"""llama.cpp in a process of its own.

A faulty file can make llama.cpp abort, which ends the process that it runs in: here that is an error like others. Its
memory is free for certain when it is closed, and the next row is computed while the last one is looked at.

Requests are {"token_ids": [...], "first": n}, answers rows of float32; the first message has the engine's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.child_process import ANSWER, READY, ChildProcess, Ended, answers, requests
from gguf3n.engines.llama_cpp import open_llama_cpp
from gguf3n.errors import GGUFError


class LlamaProcess:
    """A GGUF file that llama.cpp has loaded, on the CPU, in a process that ends with `close`.

    Args:
        n_ctx: the longest text.
        n_threads: by default one a processor.

    Raises: GGUFError: llama.cpp does not load the file, or aborts. UsageError: xllamacpp is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, n_ctx: int = 512, n_threads: int | None = None) -> None:
        self._path = Path(path)
        self._n_due = 0
        try:
            self._child = ChildProcess(__name__, {"path": str(self._path), "n_ctx": n_ctx, "n_threads": n_threads})
        except Ended as error:
            raise self._aborted(error) from None
        try:
            self.name = self._receive(READY).decode()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LlamaProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._child.close()

    def logprobs(self, token_ids: Sequence[int], *, first: int = 0) -> Iterator[NDArray[np.float32]]:
        """For each position of a text, from `first` on, the log-probabilities of what follows it.

        Shapes: `[vocab]` a position.

        Raises: GGUFError: llama.cpp does not evaluate the text, or aborts.
        """
        while self._n_due:  # rows of a text whose caller stopped early
            self._row()
        try:
            self._child.send({"token_ids": [int(i) for i in token_ids], "first": first})
        except Ended as error:
            raise self._aborted(error) from None
        self._n_due = len(token_ids) - first
        while self._n_due:
            yield self._row()

    def _row(self) -> NDArray[np.float32]:
        row = np.frombuffer(self._receive(ANSWER), np.float32)
        self._n_due -= 1
        return row

    def _receive(self, kind: int) -> bytes:
        try:
            return self._child.receive(kind)
        except Ended as error:
            raise self._aborted(error) from None

    def _aborted(self, error: Ended) -> GGUFError:
        return GGUFError(f"{self._path}: llama.cpp aborts on this file", found=str(error))


def main() -> None:
    """What the process does: load the model by the options of `open_llama_cpp`, then a text at a time."""
    asked = requests()
    with answers() as send, open_llama_cpp(**next(asked)) as model:
        send(READY, model.name.encode())
        for request in asked:
            for row in model.logprobs(**request):
                send(ANSWER, row.tobytes())
