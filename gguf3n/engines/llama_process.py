"""llama.cpp in a process of its own.

A faulty file can make llama.cpp abort, which ends the process that it runs in: here that is an error like others. Its
memory is free for certain when it is closed, and the next row is computed while the last one is looked at.

    to the process     one line of JSON a text: {"token_ids": [...], "first": n}
    from the process   messages: kind uint8, length uint64 (little endian), then JSON or a row of float32

The first message says that the model is loaded.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gguf3n import errors
from gguf3n.engines.llama_cpp import open_llama_cpp
from gguf3n.errors import Gguf3nError, GGUFError

HEADER = struct.Struct("<BQ")
ROW, READY, FAILED = range(3)
"""Kinds of messages: log-probabilities of a position; the engine's name; an error."""

PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {module} as it; it.main(sys.argv[2])"
"""Python without its environment variables and the working directory, importing what this process does."""

Self = TypeVar("Self", bound="EngineProcess")


class EngineProcess:
    """llama.cpp with a GGUF file in a process that ends with `close`.

    Args:
        path: named in errors.
        module: whose `main` the process runs, with `options` as JSON.

    Raises: GGUFError: llama.cpp does not load the file, or aborts. UsageError: xllamacpp is not installed.
    """

    def __init__(self, path: Path, module: str, options: Mapping[str, Any]) -> None:
        self._path = path
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (open until close)
        program = PROGRAM.format(module=module)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", program, json.dumps(sys.path), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # it calls a debugger, which takes seconds
        )
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
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def has_ended(self) -> bool:
        """Whether the process is gone, or goes within a second: its last connection breaks off first."""
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _receive(self, kind: int) -> bytes:
        """The next message, which is of this kind. Raises: what FAILED brings; GGUFError: the process has ended."""
        assert self._process.stdout is not None
        header = self._process.stdout.read(HEADER.size)
        received, length = HEADER.unpack(header) if len(header) == HEADER.size else (None, 0)
        data = self._process.stdout.read(length)
        if received == FAILED:
            parts = json.loads(data)
            raise _error(parts)
        if received != kind or len(data) < length:
            raise self._ended()
        return data

    def _ended(self) -> GGUFError:
        code = self._process.wait()
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages.read().decode(errors="replace").splitlines() if line.strip()]
        asserted = next((line for line in lines if "GGML_ASSERT" in line), None)
        return GGUFError(
            f"{self._path}: llama.cpp aborts on this file",
            found=asserted or f"exit code {code}; {' '.join(lines[-1:])}",
        )


class LlamaProcess(EngineProcess):
    """A GGUF file that llama.cpp has loaded, on the CPU, in a process that ends with `close`.

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
        request = {"token_ids": [int(i) for i in token_ids], "first": first}
        while self._n_due:  # rows of a text whose caller stopped early
            self._row()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it has ended; not BrokenPipeError on every system
            raise self._ended() from None
        self._n_due = len(token_ids) - first
        while self._n_due:
            yield self._row()

    def _row(self) -> NDArray[np.float32]:
        row = np.frombuffer(self._receive(ROW), np.float32)
        self._n_due -= 1
        return row


def _error(parts: dict[str, Any]) -> Gguf3nError:
    """The error that the process raised, from its `as_dict`."""
    error: type[Gguf3nError] = getattr(errors, parts["error"])
    return error(parts["what"], expected=parts["expected"], found=parts["found"], fix=parts["fix"])


def serve(load: Callable[[Callable[[int, bytes], None]], None]) -> None:
    """What a process does: load a model and answer, through a function that sends a message. An error is one too."""
    answers_descriptor = os.dup(1)
    os.dup2(2, 1)  # what llama.cpp prints must not get between the answers
    with os.fdopen(answers_descriptor, "wb") as answers:

        def send(kind: int, data: bytes) -> None:
            answers.write(HEADER.pack(kind, len(data)) + data)
            answers.flush()

        try:
            load(send)
        except Gguf3nError as error:
            send(FAILED, json.dumps(error.as_dict()).encode())


def main(options: str) -> None:
    """What the process does: load the model, then a text at a time.

    Args:
        options: those of `open_llama_cpp`, as JSON.
    """

    def load(send: Callable[[int, bytes], None]) -> None:
        with open_llama_cpp(**json.loads(options)) as model:
            send(READY, json.dumps({"name": model.name}).encode())
            for line in sys.stdin.buffer:
                for row in model.logprobs(**json.loads(line)):
                    send(ROW, row.tobytes())

    serve(load)
