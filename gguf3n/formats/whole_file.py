"""Every file that appears under a final name: it is there when it is complete, and not before.

It grows under a temporary name beside its final one and is renamed at the end; whatever goes wrong before leaves
nothing behind, and the file of that name, if there was one, as it was.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from gguf3n.errors import OutputError


class WholeFile:
    """A file to write that has a temporary name until it is committed.

        with WholeFile(path) as file:
            file.write(data)

    Leaving the block without an error commits. GGUFWriter, which writes at offsets from many threads, and programs that
    write files by themselves do so under `temporary` and call `commit`.

    Args:
        force: replace a file that exists.
        n_bytes: what will be written, if it is known.
        durable: wait until the disk has it before it gets its name, as for a file that replaces the only copy.

    Raises: OutputError.
    """

    def __init__(self, path: Path, *, force: bool = False, n_bytes: int = 0, durable: bool = False) -> None:
        check_output(path, force=force)
        check_space(path, n_bytes)
        self.path = path
        self.force = force
        self.durable = durable
        self.n_written = 0
        self._has_name = False
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
            self.temporary = Path(name)
            try:
                self._file = os.fdopen(descriptor, "wb")
            except BaseException:
                self.temporary.unlink()
                raise
        except OSError as error:
            raise output_error(path, error) from error

    def __enter__(self) -> WholeFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()

    def write(self, data: bytes) -> None:
        """Append."""
        try:
            self.n_written += self._file.write(data)
        except OSError as error:
            raise output_error(self.path, error) from error

    def truncate(self, n_bytes: int) -> None:
        """Give the file its length, with zeros after what was written."""
        try:
            self._file.truncate(n_bytes)
        except OSError as error:
            raise output_error(self.path, error) from error

    def close(self) -> None:
        """Write what is buffered, so that others can write at offsets."""
        try:
            self._file.close()
        except OSError as error:
            raise output_error(self.path, error) from error

    def commit(self) -> None:
        """Give the complete file its final name, and the rights of any new file."""
        self.close()
        check_output(self.path, force=self.force)
        try:
            if self.durable:
                with open(self.temporary, "r+b") as file:
                    os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            self.temporary.chmod(0o666 & ~umask)  # mkstemp gives 0600
            os.replace(self.temporary, self.path)
            self._has_name = True
        except OSError as error:
            raise output_error(self.path, error) from error

    def discard(self) -> None:
        """Remove the file, unless it has its final name."""
        try:
            self.close()
        finally:
            if not self._has_name:
                self.temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, data: bytes | str, *, force: bool) -> None:
    """Write a file at once, text as UTF-8. Raises: OutputError, and then no part of it stands under its name."""
    raw = data.encode() if isinstance(data, str) else data
    with WholeFile(Path(path), force=force, n_bytes=len(raw)) as file:
        file.write(raw)


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output that can't be written, before any work is done."""
    if os.path.isdir(path):  # os.path: a name that is too long is refused when the file is made
        raise OutputError(f"{path} is a directory", expected="a file name", fix="name a file in it")
    if os.path.exists(path) and not force:
        raise OutputError(f"{path} exists already", fix="add --force to replace it or choose another name")
    if not os.path.isdir(path.parent):
        raise OutputError(f"{path}: there is no directory {path.parent}", fix="make it, or choose another place")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"no permission to write in {path.parent}", fix="choose another place")


def check_space(path: Path, n_bytes: int) -> None:
    """Refuse a file that the disk has no room for, before any work is done."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise output_error(path, error) from error
    if free < n_bytes:
        raise OutputError(
            f"{path}: not enough space on the disk",
            expected=f"{n_bytes:,} bytes",
            found=f"{free:,} bytes free",
            fix="free some space or choose another place",
        )


def make_directory(path: Path) -> None:
    """Make an output directory where there is none."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputError(
            f"{path} is not a directory", expected="a file name that ends in .gguf, or a directory", fix="change -o"
        ) from error
    except OSError as error:
        raise output_error(path, error) from error


def output_error(path: Path, error: OSError) -> OutputError:
    """What went wrong with the output, in the user's words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: the disk is full", fix="free some space or choose another place")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"no permission to write {path}", fix="choose another place")
    return OutputError(f"{path}: cannot be written", found=error.strerror or str(error))
