"""A file that is there when it is complete, and not before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from gguf3n.formats.gguf_writer import check_output, check_space, give_name, make_temporary, output_error


class WholeFile:
    """A file to write that has a temporary name until its block is left without an error.

        with WholeFile(path) as file:
            file.write(data)

    Args:
        force: replace a file that exists.
        n_bytes: what will be written, if it is known.

    Raises: OutputError.
    """

    def __init__(self, path: Path, *, force: bool = False, n_bytes: int = 0) -> None:
        check_output(path, force=force)
        check_space(path, n_bytes)
        self.path = path
        self.force = force
        self.n_written = 0
        try:
            descriptor, self._temporary = make_temporary(path)
        except OSError as error:
            raise output_error(path, error) from error
        self._file: BinaryIO = os.fdopen(descriptor, "wb")

    def __enter__(self) -> WholeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._file.close()
            if kind is None:
                check_output(self.path, force=self.force)
                give_name(self._temporary, self.path)
        except OSError as error:
            raise output_error(self.path, error) from error
        finally:
            self._temporary.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Append."""
        try:
            self.n_written += self._file.write(data)
        except OSError as error:
            raise output_error(self.path, error) from error


def write_whole(path: Path, data: bytes, *, force: bool) -> None:
    """Write a file at once. Raises: OutputError, and then no part of it stands under its name."""
    with WholeFile(path, force=force, n_bytes=len(data)) as file:
        file.write(data)
