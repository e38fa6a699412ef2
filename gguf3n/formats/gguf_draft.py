"""A local GGUF file with another header: keys and tensors changed, the data copied or left where it is.

    draft     the packed bytes of every key, in order, and where every tensor's bytes come from
    in place  where the header keeps its length and each change is small: see `save`
    copy      header, then the data in pieces of a few megabytes, under a temporary name; renamed at the end

What is not changed keeps its bytes: keys are never decoded and packed again, and while the table of tensors is as it
was, the data section is copied as one, with whatever stands between and after the tensors.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gguf3n.errors import GGUFError, OutputError
from gguf3n.formats.byte_source import HeaderInMemory, LocalFile, stamp
from gguf3n.formats.gguf_layout import ALIGNMENT, MAGIC, GGUFValueType, KeyValue, QType, aligned, tensor_bytes
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, GGUFKey, read_header
from gguf3n.formats.gguf_writer import GGUFWriter, Layout, pack_string, pack_value
from gguf3n.formats.whole_file import check_output, lock, output_error

COPY_BYTES = 1 << 22
SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""
MAX_PATCHES = 64
MAX_TENSOR_BYTES = 1 << 44
"""So that offsets of as many tensors as a file may have stay below 2^64."""
ARRAY_HEAD_BYTES = 4 + 4 + 8
"""Type, element type and count, before an array's items."""


@dataclass(frozen=True)
class DraftTensor:
    """A tensor to be written. Its bytes: `n_source` from `source` in the old file, then zeros.

    Shapes: numpy order.
    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    source: int = 0
    n_source: int = 0

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.qtype, self.shape)


@dataclass(frozen=True)
class Patch:
    """Bytes to be written over others at an offset of the file."""

    offset: int
    data: bytes


class Draft:
    """The header of a file, to be changed and saved.

    Raises: GGUFError for a file that can't be rewritten: of several parts, big-endian, not local.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        if len(gguf.parts) > 1:
            raise GGUFError(f"{gguf.name}: a split file can't be changed", fix="merge it: llama-gguf-split --merge")
        if gguf.byte_order != "little":
            raise GGUFError(f"{gguf.name}: big-endian files can't be changed", fix="gguf-convert-endian FILE little")
        self.gguf = gguf
        self.packed: list[tuple[str, bytes]] = [
            (key.name, gguf.parts[0].read_at(key.offset, key.n_bytes)) for key in gguf.all_keys
        ]
        self.tensors = [DraftTensor(t.name, t.shape, t.qtype, t.offset, t.n_bytes) for t in gguf.all_tensors]
        self._old_packed = tuple(self.packed)
        self._old_tensors = tuple(self.tensors)
        self.relaid = False
        """Whether the tensors are to be placed anew although they are the same."""
        self._patching = False

    def names(self) -> list[str]:
        return [name for name, _ in self.packed]

    def set(self, key: KeyValue) -> None:
        """Give a key a type and value, at its place; a new one at the end."""
        self.put(key.name, pack_string(key.name) + struct.pack("<I", key.type) + pack_value(key))

    def put(self, name: str, packed: bytes, index: int | None = None) -> None:
        """As `set`, with the packed bytes of the whole entry; a new one at `index`."""
        names = self.names()
        if name in names:
            self.packed[names.index(name)] = (name, packed)
        else:
            self.packed.insert(len(self.packed) if index is None else index, (name, packed))

    def unset(self, name: str) -> None:
        """Remove a key. Raises: ValueError if there is none."""
        del self.packed[self.names().index(name)]

    def rename(self, old: str, new: str) -> None:
        """Change a key's name. Raises: ValueError if there is none."""
        index = self.names().index(old)
        data = self.packed[index][1]
        self.packed[index] = (new, pack_string(new) + data[len(pack_string(old)) :])

    @property
    def alignment(self) -> int:
        for name, data in self.packed:
            if name == "general.alignment":
                kind, value = struct.unpack_from("<II", data + bytes(8), len(pack_string(name)))
                return int(value) if kind == GGUFValueType.UINT32 and value and not value & (value - 1) else ALIGNMENT
        return ALIGNMENT

    @property
    def same_data(self) -> bool:
        """Whether the data section stays as it is."""
        same_tensors = not self.relaid and tuple(self.tensors) == self._old_tensors
        return same_tensors and self.alignment == self.gguf.alignment

    @property
    def changed(self) -> bool:
        return not self.same_data or tuple(self.packed) != self._old_packed

    def header(self) -> bytes:
        """The packed header, to where the data starts."""
        parts = [MAGIC, struct.pack("<IQQ", self.gguf.version, len(self.tensors), len(self.packed))]
        parts += [data for _, data in self.packed]
        for tensor, offset in zip(self.tensors, self._offsets(), strict=True):
            ne = tensor.shape[::-1]
            parts += [pack_string(tensor.name), struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor.qtype, offset)]
        header = b"".join(parts)
        return header + bytes(-len(header) % self.alignment if self.tensors else 0)

    def _offsets(self) -> Iterator[int]:
        """Of the tensors, from the start of the data."""
        if self.same_data:
            yield from (tensor.source - self.gguf.header_bytes for tensor in self.tensors)
            return
        offset = 0
        for tensor in self.tensors:
            yield offset
            if tensor.n_bytes > MAX_TENSOR_BYTES:
                raise GGUFError(f"{self.gguf.name}: tensor {tensor.name!r} would be too large")
            offset += aligned(tensor.n_bytes, self.alignment)

    @property
    def total_bytes(self) -> int:
        """Of the file to be written."""
        n_header = len(self.header())
        if self.same_data:
            return n_header + self.gguf.file_bytes - self.gguf.header_bytes
        return n_header + sum(aligned(tensor.n_bytes, self.alignment) for tensor in self.tensors)

    def preview(self, *, strict: bool = False) -> GGUFFile:
        """The header as it would be read again. Raises: GGUFError where it would not."""
        header = self.header()
        return read_header(HeaderInMemory(self.gguf.name, header, max(self.total_bytes, len(header))), strict=strict)

    def patches(self) -> list[Patch] | None:
        """The changes as a few small ones in place, or None where they are more than that.

        Each lies within one sector and is a whole change: one key's type and value, or some items of an array of
        numbers. Items of such an array are independent, a text's letters are not.
        """
        header = self.header()
        if not self.same_data or len(header) != self.gguf.header_bytes:
            return None
        if [name for name, _ in self.packed] != [name for name, _ in self._old_packed]:
            return None
        patches: list[Patch] = []
        for key, (_, old), (_, new) in zip(self.gguf.all_keys, self._old_packed, self.packed, strict=True):
            if len(old) != len(new):
                return None
            a, b = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
            places = np.flatnonzero(a != b)
            if len(places) == 0:
                continue
            spans = [(int(places[0]), int(places[-1]) + 1)]
            if _is_numbers(key) and places[0] >= len(pack_string(key.name)) + ARRAY_HEAD_BYTES:
                breaks = np.flatnonzero(np.diff(places) > 8)
                starts, ends = [0, *(breaks + 1)], [*breaks, len(places) - 1]
                spans = [(int(places[i]), int(places[j]) + 1) for i, j in zip(starts, ends, strict=True)]
            patches += [Patch(key.offset + start, new[start:end]) for start, end in spans]
        whole = all(p.offset // SECTOR_BYTES == (p.offset + len(p.data) - 1) // SECTOR_BYTES for p in patches)
        return patches if whole and len(patches) <= MAX_PATCHES else None

    def save(self, output: Path | None = None) -> str:
        """Write the file, in its own place or another; returns how: "unchanged", "in place" or "copied".

        A crash leaves the old file or the new one where it is copied. Where it is changed in place, each patch is
        written whole or not at all, one after another, so a crash leaves some of the changes made and the others not:
        a file as sound as before, and the same command finishes it. A file that has other names (a link, the Hub's
        cache) is copied, so that they keep what they had.

        Raises: OutputError, GGUFError.
        """
        path = self.gguf.path
        if output is None and not self.changed:
            return "unchanged"
        with _readable(path), _locked(path):
            self._check_unchanged(path)
            return self._save(path, output)

    def _check_unchanged(self, path: Path) -> None:
        """Why: another run may have changed the file since its header was read, and its change would be lost."""
        if self._has_changed(path):
            raise OutputError(f"{path}: changed by another program since it was read", fix="run the command again")

    def _has_changed(self, path: Path) -> bool:
        part = self.gguf.parts[0]
        return isinstance(part, LocalFile) and stamp(path) != part.stamp

    @property
    def partly_saved(self) -> bool:
        """After `save` has failed: whether some of the changes are in the file."""
        return self._patching and self._has_changed(self.gguf.path)

    def _save(self, path: Path, output: Path | None) -> str:
        if output is None:
            check_output(path, force=True)
        patches = self.patches()
        if output is None and patches is not None and not path.is_symlink() and path.stat().st_nlink == 1:
            self._patching = True
            _patch(path, patches)
            return "in place"
        self._copy(path, output or path, force=output is None)
        return "copied"

    def _copy(self, path: Path, output: Path, *, force: bool) -> None:
        header = self.header()
        layout = Layout(header, (), self.total_bytes)
        with GGUFWriter(output, layout, force=force) as writer, open(path, "rb", buffering=0) as file:
            for target, source, n_bytes in self._moves(len(header)):
                _stream(file.fileno(), source, n_bytes, writer, target, path)
            writer.commit()

    def _moves(self, n_header: int) -> Iterator[tuple[int, int, int]]:
        """Target offset, source offset and size of what is copied; the rest stays zero."""
        if self.same_data:
            yield n_header, self.gguf.header_bytes, self.gguf.file_bytes - self.gguf.header_bytes
            return
        for tensor, offset in zip(self.tensors, self._offsets(), strict=True):
            if tensor.n_source:
                yield n_header + offset, tensor.source, tensor.n_source


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Makes what the system says against reading the old file an error of ours; writing has its own."""
    try:
        yield
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read", found=error.strerror or str(error)) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """While others of us wait; not on Windows, where a file that is open can't be replaced."""
    if os.name == "nt":
        yield
        return
    with open(path, "rb") as file:
        lock(file.fileno(), wait=True)
        yield


def _is_numbers(key: GGUFKey) -> bool:
    return isinstance(key.value, GGUFArray) and key.value.element_type is not GGUFValueType.STRING


def grown(tensor: DraftTensor, n_rows: int) -> DraftTensor:
    """The tensor with zero rows appended. Why: zero bytes are zeros in every ggml type. Shapes: two dimensions."""
    return replace(tensor, shape=(n_rows, tensor.shape[-1]))


def _patch(path: Path, patches: list[Patch]) -> None:
    try:
        with open(path, "r+b", buffering=0) as file:
            for patch in patches:
                file.seek(patch.offset)
                if file.write(patch.data) != len(patch.data):
                    raise OutputError(f"{path}: cannot be written")
                os.fsync(file.fileno())
    except OSError as error:
        raise output_error(path, error) from error


def _stream(descriptor: int, source: int, n_bytes: int, writer: GGUFWriter, target: int, path: Path) -> None:
    buffer = np.empty(COPY_BYTES, np.uint8)
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(source)
        done = 0
        while done < n_bytes:
            n = file.readinto(buffer.data[: min(COPY_BYTES, n_bytes - done)])
            if not n:
                raise GGUFError(f"{path}: ended early while it was copied")
            writer.write_at(target + done, buffer[:n])
            done += n
