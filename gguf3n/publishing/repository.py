"""A repository of files, in a directory or on the Hub: their names and sizes, and the small ones to read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf3n.errors import HubError, UsageError
from gguf3n.formats.hub import file_address, is_repo_id, list_files
from gguf3n.formats.remote import RemoteFile
from gguf3n.formats.small_file import MIB, read_small

MAX_FILES = 10_000
"""Of a repository; those of GGUF files have some dozens."""
MAX_SMALL_BYTES = 4 * MIB
"""Of a card, a template, parameters or a list of checksums."""


@dataclass(frozen=True)
class Repository:
    """What is in it, by path from its top.

    Args:
        name: the directory, or ORG/REPO.
        sizes: in bytes; None where the Hub was not asked.
        directory: None on the Hub.
    """

    name: str
    sizes: Mapping[str, int | None]
    directory: Path | None = None

    def read(self, path: str) -> bytes:
        """A small file. Raises: UsageError or HubError where it can't be read, or is no small one."""
        if self.directory is not None:
            return read_small(self.directory / path, MAX_SMALL_BYTES, UsageError)
        url, headers = file_address(self.name, path)
        file = RemoteFile(url, headers, name=f"{self.name}/{path}")
        if file.n_bytes > MAX_SMALL_BYTES:
            raise HubError(
                f"{self.name}/{path}: too large for what it is",
                expected=f"at most {MAX_SMALL_BYTES:,} bytes",
                found=f"{file.n_bytes:,} bytes",
            )
        return file.read_at(0, file.n_bytes)


def is_repository(source: str | Path) -> bool:
    """Whether a directory or ORG/REPO is meant, and not one file, as one that is not there."""
    return os.path.isdir(source) or (isinstance(source, str) and is_repo_id(source) and not source.endswith(".gguf"))


def open_repository(source: str | Path, *, revision: str | None = None) -> Repository:
    """List a directory, or a repository on the Hub.

    Raises: UsageError for a directory that can't be listed; HubError.
    """
    if not os.path.isdir(source):
        names = list_files(str(source), revision)
        _check_number(str(source), len(names))
        return Repository(str(source), dict.fromkeys(names))
    directory = Path(source)

    def refuse(error: OSError) -> None:
        raise UsageError(f"{error.filename}: cannot be listed", found=error.strerror) from error

    sizes: dict[str, int | None] = {}
    for folder, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            if name.startswith(".") or not path.is_file():
                continue
            sizes[path.relative_to(directory).as_posix()] = path.stat().st_size
        _check_number(str(directory), len(sizes))
    return Repository(str(directory), sizes, directory)


def _check_number(name: str, n_files: int) -> None:
    if n_files > MAX_FILES:
        raise UsageError(
            f"{name}: too many files for a repository of GGUF files",
            expected=f"at most {MAX_FILES:,}",
            found=f"{n_files:,}",
            fix="name the folder with the GGUF files",
        )
