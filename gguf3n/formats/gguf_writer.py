"""Lays out a GGUF file before any data exists, then takes the data in any order.

The header is packed once, so every tensor's place is known from the start. The file grows under a temporary name beside
its final one and is renamed when it is complete; whatever goes wrong before leaves nothing behind.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from gguf3n.errors import GGUFError
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
from gguf3n.formats.gguf_reader import open_part
from gguf3n.formats.offset_files import OffsetFiles
from gguf3n.formats.whole_file import WholeFile, output_error

SYNC_BYTES = 256 << 20
"""Written between two requests to the disk."""


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


class Sink(Protocol):
    """What takes the data of a file of a known layout, from several threads and in any order."""

    def __enter__(self) -> Sink: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def write_at(self, offset: int, data: np.ndarray) -> None:
        """Take bytes that belong at a file offset. Shapes: uint8, contiguous."""
        ...

    def commit(self) -> None:
        """All data was given."""
        ...


class GGUFWriter:
    """Writes one file of a known layout; a context manager.

    `write_at` may be called from several threads, in any order. Leaving the context with an exception removes the
    temporary file; `commit` gives the file its final name, after its own header has been read back and held against it.

    Raises: OutputError where the file exists and `force` is not set, or the disk or its rights refuse it.
    """

    def __init__(self, path: Path, layout: Layout, *, force: bool = False) -> None:
        self.path = path
        self.layout = layout
        self.force = force
        self._files = OffsetFiles("r+")
        self._n_unsynced = 0  # about: threads may lose each other's count

    def __enter__(self) -> GGUFWriter:
        self._file = WholeFile(self.path, force=self.force, n_bytes=self.layout.total_bytes)
        try:
            self._file.write(self.layout.header)
            self._file.extend(self.layout.total_bytes)
        except BaseException:
            self._file.discard()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._close()
        finally:
            self._file.discard()

    def write_at(self, offset: int, data: np.ndarray) -> None:
        """Write bytes at a file offset. Shapes: uint8, contiguous."""
        try:
            self._files.write_at(self._file.temporary, offset, data)
        except OSError as error:
            raise output_error(self.path, error) from error
        self._n_unsynced += data.nbytes
        if self._n_unsynced >= SYNC_BYTES:
            self._n_unsynced = 0
            self._file.begin_sync()

    def commit(self) -> None:
        """Give the complete file its final name. Raises: OutputError; GGUFError for a file that is not as laid out."""
        self._close()
        check_written(self._file.temporary, self.layout, self.path)
        self._file.commit()

    def _close(self) -> None:
        try:
            self._files.close()
        except OSError as error:
            raise output_error(self.path, error) from error


def check_written(temporary: Path, layout: Layout, path: Path) -> None:
    """Hold a written file against its own header: whoever reads it finds every tensor where it was put.

    Args:
        layout: without slots where a file is mended, which may have faults left.
        path: its final name, for messages.

    Raises: GGUFError.
    """
    try:
        found = open_part(temporary, strict=bool(layout.slots))
    except GGUFError as error:
        if isinstance(error.__cause__, OSError):
            raise output_error(path, error.__cause__) from error
        raise GGUFError(
            f"{path}: what was written can't be read back", found=error.one_line, fix="report this: it is a bug"
        ) from error
    wanted = [(slot.name, slot.shape, slot.qtype, slot.offset) for slot in layout.slots]
    if layout.slots and [(t.name, t.shape, t.qtype, t.offset) for t in found.all_tensors] != wanted:
        raise GGUFError(f"{path}: its header does not say where its tensors are", fix="report this: it is a bug")
    if found.file_bytes != layout.total_bytes:
        raise GGUFError(
            f"{path}: another size than was written",
            expected=f"{layout.total_bytes:,} bytes",
            found=f"{found.file_bytes:,}",
        )
