"""Every file that appears under a final name: it is there when it is complete, and not before.

It grows under a temporary name beside its final one. At the end the disk is told to keep it, then it gets its name,
then the disk is told to keep the name. So whatever happens, a crash or a power cut, the name stands for the old file or
for the whole new one, and once success has been said, for the new one. What goes wrong before leaves nothing behind.

    new file          the rights that the user's mask gives
    replaced file     the rights and, where that is allowed, the owner of the one before; a read-only one is refused
    temporary name    .NAME.RANDOM.partial, shortened where NAME leaves no room; locked while it is written, so that
                      what a killed run has left is told from another run's work, and removed by the next

Source: "Files are hard", the notes on fsync and rename in the manual pages fsync(2) and rename(2).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from gguf3n.errors import MORE_HANDLES, TOO_MANY_OPEN, OutputError

logger = logging.getLogger(__name__)

SUFFIX = ".partial"
RANDOM_BYTES = 4
MAX_NAME_BYTES = 255
"""Of a file's name, on every common file system."""


class WholeFile:
    """A file to write that has a temporary name until it is committed.

        with WholeFile(path) as file:
            file.write(data)

    Leaving the block without an error commits. GGUFWriter, which writes at offsets from many threads, does so under
    `temporary` and calls `commit`.

    Args:
        force: replace a file that exists.
        n_bytes: what will be written, if it is known.

    Raises: OutputError.
    """

    def __init__(self, path: Path, *, force: bool = False, n_bytes: int = 0) -> None:
        check_output(path, force=force)
        remove_stale(path)
        check_space(path, n_bytes)
        self.path = path
        self.force = force
        self.n_written = 0
        self._has_name = False
        self._syncing = threading.Lock()
        try:
            self._replaced = _status(path)
            self.temporary = path.with_name(_temporary_name(path.name))
            mode = 0o666 if self._replaced is None else 0o600
            self._file = open(self.temporary, "xb", opener=partial(os.open, mode=mode))  # noqa: SIM115 (until commit)
            try:
                lock(self._file.fileno())
            except BaseException:
                self.discard()
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

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        try:
            self.n_written += self._file.write(data)
        except OSError as error:
            raise output_error(self.path, error) from error

    def begin_sync(self) -> None:
        """Have the disk take what was written so far, so that `commit` has little left to wait for.

        One thread at a time does so and waits; for others that call meanwhile it returns at once.
        """
        if not self._syncing.acquire(blocking=False):
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise output_error(self.path, error) from error
        finally:
            self._syncing.release()

    def extend(self, n_bytes: int) -> None:
        """Give the file its length, with zeros after what was written, so that others can write at offsets."""
        try:
            self._file.flush()
            self._file.truncate(n_bytes)
        except OSError as error:
            raise output_error(self.path, error) from error

    def commit(self) -> None:
        """Give the complete file its final name."""
        check_output(self.path, force=self.force)
        try:
            self._file.flush()
            if self._replaced is not None:
                _give_rights(self.temporary, self._replaced)
            os.fsync(self._file.fileno())
            self._file.close()
            with _synced_directory(self.path.parent):
                os.replace(self.temporary, self.path)
                self._has_name = True
        except OSError as error:
            raise output_error(self.path, error) from error

    def discard(self) -> None:
        """Remove the file, unless it has its final name."""
        try:
            self._file.close()
        except OSError as error:
            raise output_error(self.path, error) from error
        finally:
            if not self._has_name:
                self.temporary.unlink(missing_ok=True)


def _temporary_name(name: str) -> str:
    room = MAX_NAME_BYTES - len(f"..{'0' * 2 * RANDOM_BYTES}{SUFFIX}")
    short = name.encode("utf-8", "surrogateescape")[:room].decode("utf-8", "ignore")
    return f".{short}.{secrets.token_hex(RANDOM_BYTES)}{SUFFIX}"


def remove_stale(path: Path) -> None:
    """Remove what runs that were killed have left of this file; what another run is writing stays."""
    pattern = re.compile(
        re.escape(_temporary_name(path.name)[: -2 * RANDOM_BYTES - len(SUFFIX)]) + r"[0-9a-f]{8}\.partial"
    )
    for name in _names(path.parent):
        stale = path.with_name(name)
        if pattern.fullmatch(name) and not _is_locked(stale):
            stale.unlink(missing_ok=True)
            logger.warning("removed %s, which a run that was killed had left", stale)


def _names(directory: Path) -> Iterator[str]:
    try:
        with os.scandir(directory) as entries:
            yield from (entry.name for entry in entries)
    except OSError:
        return  # whoever writes there next says what is wrong


def lock(descriptor: int, *, wait: bool = False) -> None:
    """Until the file is closed or the process ends. Why nothing on Windows: there an open file can't be removed.

    Raises: OSError: another has it, and `wait` is not set.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):  # file systems without locks
            raise


def _is_locked(path: Path) -> bool:
    """Whether a run that goes on is writing it; also where that can't be told."""
    try:
        with open(path, "rb") as file:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except (OSError, ImportError):
        return True


def _give_rights(path: Path, rights: os.stat_result) -> None:
    if hasattr(os, "chown"):
        with suppress(PermissionError):  # only root gives files away
            os.chown(path, rights.st_uid, rights.st_gid)
    path.chmod(stat.S_IMODE(rights.st_mode))


@contextmanager
def _synced_directory(directory: Path) -> Iterator[None]:
    """Has the disk take what is renamed meanwhile.

    Why opened before: where that can't be done, nothing has its new name yet. Why not on Windows: a directory can't be
    opened there, and a rename is kept by itself.
    """
    if os.name == "nt":
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not know how
                raise
    finally:
        os.close(descriptor)


def move(path: Path, target: Path) -> None:
    """Give a complete file another name on the same disk; what stood there is replaced. Raises: OutputError."""
    try:
        with _synced_directory(target.parent):
            os.replace(path, target)
    except OSError as error:
        raise output_error(target, error) from error


def write_whole(path: str | Path, data: bytes | str, *, force: bool) -> None:
    """Write a file at once, text as UTF-8. Raises: OutputError, and then no part of it stands under its name."""
    raw = data.encode() if isinstance(data, str) else data
    with WholeFile(Path(path), force=force, n_bytes=len(raw)) as file:
        file.write(raw)


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output that can't be written, before any work is done."""
    try:
        found, parent = _status(path), _status(path.parent)
    except (OSError, ValueError) as error:
        raise output_error(path, error) from error
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{path} is a directory", expected="a file name", fix="name a file in it")
    if (found is not None or path.is_symlink()) and not force:  # a link to nothing is somebody's, too
        raise OutputError(f"{path} exists already", fix="add --force to replace it or choose another name")
    if found is not None and not found.st_mode & stat.S_IWUSR:
        raise OutputError(f"{path} is read-only", fix="make it writable to replace it, or choose another name")
    if parent is None or not stat.S_ISDIR(parent.st_mode):
        raise OutputError(f"{path}: there is no directory {path.parent}", fix="make it, or choose another place")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"no permission to write in {path.parent}", fix="choose another place")
    if not os.access(path.parent, os.R_OK):
        raise OutputError(
            f"no permission to read {path.parent}, without which a new name can't be synced", fix="choose another place"
        )


def check_not_input(path: Path, *inputs: str | Path | None) -> None:
    """Refuse an output that is one of the files that are read, by whatever name, also where files may be replaced.

    Args:
        inputs: what has been named; what is no local file can't be overwritten.
    """
    for given in inputs:
        with suppress(OSError, ValueError):
            if given is not None and os.path.samefile(path, given):
                raise OutputError(f"{path} is what is read", fix="choose another name for the output")


def _status(path: Path) -> os.stat_result | None:
    """None where nothing has this name. Raises: OSError: that can't be seen; ValueError: no file can have it."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


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


def output_error(path: Path, error: OSError | ValueError) -> OutputError:
    """What went wrong with the output, in the user's words."""
    if not isinstance(error, OSError):  # a null byte
        return OutputError(f"{path}: not the name of a file", found=str(error), fix="choose another name")
    if error.errno == errno.ENAMETOOLONG:
        return OutputError(f"{path}: its name is too long for a file", fix="choose a shorter one")
    if error.errno in TOO_MANY_OPEN:
        return OutputError(f"{path}: too many files are open", found=error.strerror, fix=MORE_HANDLES)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: the disk is full", fix="free some space or choose another place")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"no permission to write {path}", fix="choose another place")
    return OutputError(f"{path}: cannot be written", found=error.strerror or str(error))
