"""Where a GGUF file's bytes come from: a local file, memory, or a server (see formats/remote.py)."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol, TypeAlias

from gguf3n.errors import GGUFError


class ByteSource(Protocol):
    """Bytes at offsets. `name` is what messages call it."""

    @property
    def name(self) -> str: ...

    @property
    def n_bytes(self) -> int: ...

    def read_at(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from an offset; fewer only at the end."""
        ...

    def sibling(self, file_name: str) -> ByteSource:
        """The file of another name at the same place."""
        ...


def is_remote(source: str | Path) -> bool:
    """Whether `source` means a file on a server and not a local path."""
    if isinstance(source, Path):
        return False
    if source.startswith(("https://", "http://")):
        return True
    from gguf3n.formats.hub import is_repo_id

    repo_id, _, file = source.partition(":")
    return not os.path.exists(source) and is_repo_id(repo_id) and (bool(file) or not source.endswith(".gguf"))


Stamp: TypeAlias = tuple[int, int, int, int]


def stamp(path: str | Path) -> Stamp:
    """What changes when a file is replaced or written: device, number, size and time of its last change.

    Why no ctime: it is also that of a chmod, a second name or a rename, as backups and tidied caches make them, and
    hours of work would be thrown away for a file whose bytes are the same; on Windows it is when the file was made.
    All that it would add is a writer who puts the old time back.
    """
    return _stamp(os.stat(path))


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class LocalFile:
    """A file on disk, with the stamp that it had when it was opened. Nothing stays open between two reads.

    Raises: GGUFError where it can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise GGUFError(f"{path}: no such file") from error
        except ValueError as error:  # a null byte
            raise GGUFError(f"{path}: not the name of a file", found=str(error)) from error
        except OSError as error:
            raise GGUFError(f"{path}: cannot be opened", found=error.strerror or str(error)) from error
        if not stat.S_ISREG(found.st_mode):
            raise GGUFError(f"{path}: not a file")
        self.stamp = _stamp(found)
        self.n_bytes = found.st_size

    def read_at(self, offset: int, count: int) -> bytes:
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(count)
                while len(data) < count and (more := file.read(count - len(data))):
                    data += more
                return data
        except OSError as error:
            raise GGUFError(f"{self.path}: cannot be read", found=error.strerror or str(error)) from error

    def sibling(self, file_name: str) -> LocalFile:
        return LocalFile(self.path.with_name(file_name))


class HeaderInMemory:
    """A header that is not on disk, before data that nobody reads."""

    def __init__(self, name: str, header: bytes, n_bytes: int) -> None:
        self.name = name
        self.header = header
        self.n_bytes = n_bytes

    def read_at(self, offset: int, count: int) -> bytes:
        return self.header[offset : offset + count]

    def sibling(self, file_name: str) -> ByteSource:
        raise GGUFError(f"{self.name}: has no parts", found=file_name)
