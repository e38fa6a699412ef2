"""llama.cpp in a process of its own.

A faulty file can make llama.cpp abort, which ends the process that it runs in: here that is an error like others. Its
memory is free for certain when it is closed, and the next row is computed while the last one is looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.child_process import ANSWER, READY, ChildProcess, Ended, answers, requests
from gguf3n.engines.llama_cpp import open_llama_cpp
from gguf3n.errors import GGUFError

Self = TypeVar("Self", bound="EngineProcess")


class EngineProcess:
    """llama.cpp with a GGUF file in a process that ends with `close`.

    Args:
        path: named in errors.
        module: whose `main` the process runs; what it sends first has the engine's name.
        options: of `main`.

    Raises: GGUFError: llama.cpp does not load the file, or aborts. UsageError: xllamacpp is not installed.
    """

    def __init__(self, path: Path, module: str, options: Mapping[str, Any]) -> None:
        self._path = path
        try:
            self._child = ChildProcess(module, options)
        except Ended as error:
            raise self._aborted(error) from None
        try:
            self.ready: dict[str, str] = json.loads(self._receive(READY))
        except BaseException:
            self.close()
            raise
        self.name = self.ready["name"]

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self._child.close()

    def _receive(self, kind: int) -> bytes:
        try:
            return self._child.receive(kind)
        except Ended as error:
            raise self._aborted(error) from None

    def _aborted(self, error: Ended) -> GGUFError:
        return GGUFError(f"{self._path}: llama.cpp aborts on this file", found=str(error))


class LlamaProcess(EngineProcess):
    """A GGUF file that llama.cpp has loaded, on the CPU, in a process that ends with `close`.

    Requests are {"token_ids": [...], "first": n}, answers rows of float32.

    Args:
        n_ctx: the longest text.
        n_threads: by default one a processor.

    Raises: as `EngineProcess`.
    """

    def __init__(self, path: str | os.PathLike[str], *, n_ctx: int = 512, n_threads: int | None = None) -> None:
        self._n_due = 0
        super().__init__(Path(path), __name__, {"path": str(path), "n_ctx": n_ctx, "n_threads": n_threads})

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


def main() -> None:
    """What the process does: load the model by the options of `open_llama_cpp`, then a text at a time."""
    asked = requests()
    with answers() as send, open_llama_cpp(**next(asked)) as model:
        send(READY, json.dumps({"name": model.name}).encode())
        for request in asked:
            for row in model.logprobs(**request):
                send(ANSWER, row.tobytes())
