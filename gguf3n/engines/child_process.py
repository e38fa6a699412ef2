"""Python in a process of its own: it may abort, run on for ever or fill its memory, and here that is an error.

    to the process     one line of JSON a request
    from the process   messages: kind uint8, length uint64 (little endian), then the data

Its memory is free for certain when it is closed, and Ctrl-C ends the wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from gguf3n import errors
from gguf3n.errors import Gguf3nError

HEADER = struct.Struct("<BQ")
READY, ANSWER, FAILED = range(3)
"""Kinds of messages: it has begun; what was asked for; an error of ours."""

PROGRAM = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2]).main()"
)
"""Python without its environment variables and the working directory, running a module's `main`."""


SIGNALS: Mapping[int, str] = {-number: number.name for number in signal.Signals}
"""By the exit code of a process that was ended by one."""


class Ended(Exception):
    """The process has ended and gives no answer; the text says how, `code` is its exit code."""

    def __init__(self, said: str, code: int) -> None:
        super().__init__(said)
        self.code = code


class TookTooLong(Exception):
    """No answer came in time; the process has been ended."""


class ChildProcess:
    """A module's `main` in a process that ends with `close`.

    Args:
        options: what it is asked for first. Why not as an argument of the program: those have no room for a template.

    Raises: Ended.
    """

    def __init__(self, module: str, options: Mapping[str, Any]) -> None:
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (open until close)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", PROGRAM, json.dumps(sys.path), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # it calls a debugger, which takes seconds
            )
        except BaseException:
            self._messages.close()
            raise
        try:
            self.send(options)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """Ends the process."""
        self.kill()
        self._process.communicate()
        self._messages.close()

    def kill(self) -> None:
        self._process.kill()

    def has_ended(self) -> Ended | None:
        """How the process has ended, if it has, or does so within a second: its last connection breaks off first."""
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return None
        return self._ended()

    def send(self, request: Mapping[str, Any]) -> None:
        """Asks for something. Raises: Ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it has ended; not BrokenPipeError on every system
            raise self._ended() from None

    def receive(self, kind: int, seconds: float | None = None) -> bytes:
        """The next message, which is of this kind.

        Args:
            seconds: how long it may take; the process is ended then.

        Raises: Ended; TookTooLong; what FAILED brings.
        """
        if seconds is None:
            return self._receive(kind)
        is_over = threading.Event()

        def stop() -> None:
            is_over.set()
            self.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            return self._receive(kind)
        except Ended:
            if is_over.is_set():
                raise TookTooLong(f"more than {seconds:g} s") from None
            raise
        finally:
            timer.cancel()

    def _receive(self, kind: int) -> bytes:
        assert self._process.stdout is not None
        header = self._process.stdout.read(HEADER.size)
        received, length = HEADER.unpack(header) if len(header) == HEADER.size else (None, 0)
        data = self._process.stdout.read(length)
        if received == FAILED and len(data) == length:
            parts = json.loads(data)
            error: type[Gguf3nError] = getattr(errors, parts["error"])
            raise error(parts["what"], expected=parts["expected"], found=parts["found"], fix=parts["fix"])
        if received != kind or len(data) < length:
            raise self._ended()
        return data

    def _ended(self) -> Ended:
        self.kill()
        code = self._process.wait()
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages.read().decode(errors="replace").splitlines() if line.strip()]
        asserted = next((line for line in lines if "GGML_ASSERT" in line), None)
        how = SIGNALS.get(code, f"exit code {code}")
        return Ended(asserted or "; ".join([how, *lines[-1:]]), code)


# in the process


class Send(Protocol):
    """Sends a message."""

    def __call__(self, kind: int, data: bytes = b"") -> None: ...


@contextmanager
def answers() -> Iterator[Send]:
    """What sends messages; an error of ours is one and ends the process. What else is printed goes to stderr."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(descriptor, "wb") as file:

        def send(kind: int, data: bytes = b"") -> None:
            file.write(HEADER.pack(kind, len(data)) + data)
            file.flush()

        try:
            yield send
        except Gguf3nError as error:
            send(FAILED, json.dumps(error.as_dict()).encode())


def requests() -> Iterator[dict[str, Any]]:
    """What the process is asked for, its options first."""
    return map(json.loads, sys.stdin.buffer)
