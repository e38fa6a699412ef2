"""Reading and writing at file offsets from several threads.

Each thread has its own handle of each file, so no lock and no shared position: `os.pread` would do the same but does
not exist on Windows. Data goes straight into and out of the caller's buffer; nothing is mapped, so resident memory does
not grow with the file.
"""

from __future__ import annotations

import threading
from io import FileIO
from pathlib import Path

import numpy as np

from gguf3n.errors import MORE_HANDLES, TOO_MANY_OPEN, Gguf3nError


class OffsetFiles:
    """A handle a thread and file, opened on first use.

    Args:
        mode: how to open a file, as for `io.FileIO`: "r" or "r+".
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._local = threading.local()
        self._lock = threading.Lock()
        self._opened: list[FileIO] = []

    def _file(self, path: Path) -> FileIO:
        handles: dict[Path, FileIO] = self._local.__dict__.setdefault("handles", {})
        file = handles.get(path)
        if file is None or file.closed:
            file = handles[path] = FileIO(path, self._mode)
            with self._lock:
                self._opened.append(file)
        return file

    def read_into(self, path: Path, offset: int, buffer: np.ndarray) -> int:
        """Fill a contiguous buffer from a file offset; returns the bytes read, fewer only at the file's end."""
        file = self._file(path)
        file.seek(offset)
        view = buffer.data.cast("B")
        done = 0
        while done < len(view):
            n = file.readinto(view[done:])
            if not n:
                break
            done += n
        return done

    def fill(self, path: Path, offset: int, buffer: np.ndarray, *, tensor: str, error: type[Gguf3nError]) -> None:
        """Fill a contiguous buffer with some of a tensor's bytes.

        Raises: `error`, where they cannot be read, or the file has become shorter since its header was.
        """
        try:
            n = self.read_into(path, offset, buffer)
        except OSError as cause:
            fix = MORE_HANDLES if cause.errno in TOO_MANY_OPEN else None
            found = cause.strerror or str(cause)
            raise error(f"{path}: tensor {tensor!r} cannot be read", found=found, fix=fix) from cause
        if n != buffer.nbytes:
            raise error(
                f"{path}: the file became shorter while tensor {tensor!r} was read",
                expected=f"{buffer.nbytes:,} bytes at {offset:,}",
                found=f"{n:,} bytes",
            )

    def write_at(self, path: Path, offset: int, data: np.ndarray) -> None:
        """Write a contiguous buffer at a file offset."""
        file = self._file(path)
        file.seek(offset)
        view = data.data.cast("B")
        done = 0
        while done < len(view):
            done += file.write(view[done:])

    def close(self) -> None:
        """Close every thread's handles. Raises: the first OSError of one, when all are closed."""
        failed: OSError | None = None
        with self._lock:
            while self._opened:
                try:
                    self._opened.pop().close()
                except OSError as error:
                    failed = failed or error
        if failed is not None:
            raise failed
