"""Lays out a GGUF file before any data exists, then takes the data in any order.

The header is packed once, so every tensor's place is known from the start. The file grows under a temporary name beside
its final one and is renamed when it is complete; whatever goes wrong before leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from gguf3n.errors import OutputError
from gguf3n.formats.gguf_layout import (
    MAGIC,
    SCALAR_CODES,
    VERSION,
    GGUFValueType,
    KeyValue,
    QType,
    aligned,
    tensor_bytes,
)
from gguf3n.formats.offset_files import OffsetFiles


@dataclass(frozen=True)
class TensorSlot:
    """A tensor's place in a file.

    Shapes: `shape` in numpy order. Units: `offset` in bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Layout:
    """A whole file: its packed header and the place of every tensor."""

    header: bytes
    slots: tuple[TensorSlot, ...]
    total_bytes: int


def pack_string(text: str) -> bytes:
    data = text.encode(errors="replace")  # half of a surrogate pair, from JSON or a file name, has no UTF-8
    return struct.pack("<Q", len(data)) + data


def pack_value(key: KeyValue) -> bytes:
    """A key's value without its type."""
    if key.type is GGUFValueType.STRING:
        return pack_string(cast(str, key.value))
    if key.type is not GGUFValueType.ARRAY:
        return struct.pack("<" + SCALAR_CODES[key.type], key.value)
    values = cast("Sequence[Any]", key.value)
    if key.element_type is None:
        raise ValueError(f"array key {key.name!r} has no element type")
    head = struct.pack("<IQ", key.element_type, len(values))
    if key.element_type is GGUFValueType.STRING:
        return head + b"".join(map(pack_string, values))
    return head + np.asarray(values, dtype="<" + SCALAR_CODES[key.element_type]).tobytes()


def lay_out(keys: Sequence[KeyValue], tensors: Sequence[tuple[str, tuple[int, ...], QType]]) -> Layout:
    """Pack the header and place the tensors, in the order given.

    Args:
        keys: metadata, `general.architecture` first by convention.
        tensors: name, shape in numpy order, type.
    """
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    for key in keys:
        parts += [pack_string(key.name), struct.pack("<I", key.type), pack_value(key)]
    offset = 0
    places: list[tuple[int, int]] = []
    for name, shape, qtype in tensors:
        n_bytes = tensor_bytes(qtype, shape)
        dimensions = shape[::-1]
        parts += [
            pack_string(name),
            struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, qtype, offset),
        ]
        places.append((offset, n_bytes))
        offset += aligned(n_bytes)
    header = b"".join(parts)
    header += b"\0" * (aligned(len(header)) - len(header))
    slots = tuple(
        TensorSlot(name, shape, qtype, len(header) + place, n_bytes)
        for (name, shape, qtype), (place, n_bytes) in zip(tensors, places, strict=True)
    )
    return Layout(header, slots, len(header) + offset)


class GGUFWriter:
    """Writes one file of a known layout; a context manager.

    `write_at` may be called from several threads, in any order. Leaving the context with an exception removes the
    temporary file; `commit` gives the file its final name, `durable` after the disk has it, for a file that replaces
    the only copy.

    Raises: OutputError where the file exists and `force` is not set, or the disk or its rights refuse it.
    """

    def __init__(self, path: Path, layout: Layout, *, force: bool = False, durable: bool = False) -> None:
        self.path = path
        self.layout = layout
        self.force = force
        self.durable = durable
        self._temporary: Path | None = None
        self._files = OffsetFiles("r+")

    def __enter__(self) -> GGUFWriter:
        check_output(self.path, force=self.force)
        check_space(self.path, self.layout.total_bytes)
        try:
            descriptor, self._temporary = make_temporary(self.path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(self.layout.header)
                file.truncate(self.layout.total_bytes)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise output_error(self.path, error) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._discard()

    def write_at(self, offset: int, data: np.ndarray) -> None:
        """Write bytes at a file offset. Shapes: uint8, contiguous."""
        assert self._temporary is not None
        try:
            self._files.write_at(self._temporary, offset, data)
        except OSError as error:
            raise output_error(self.path, error) from error

    def commit(self) -> None:
        """Give the complete file its final name."""
        assert self._temporary is not None
        self._files.close()
        check_output(self.path, force=self.force)
        try:
            if self.durable:
                with open(self._temporary, "r+b") as file:
                    os.fsync(file.fileno())
            give_name(self._temporary, self.path)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._temporary = None

    def _discard(self) -> None:
        self._files.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None


def make_temporary(path: Path) -> tuple[int, Path]:
    """A descriptor and the name of a new file beside the final one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    return descriptor, Path(name)


def give_name(temporary: Path, path: Path) -> None:
    """Give a complete file its final name, and the rights of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # mkstemp gives 0600
    os.replace(temporary, path)


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
