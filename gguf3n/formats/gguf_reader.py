"""Reads a GGUF file's header: keys and tensor table, never the data.

One walk validates as it goes. It sees the header through a window of a few megabytes and steps over arrays, which are
read when asked for: what a file claims never decides what is allocated, and a file with a vocabulary of 262,144 tokens
opens in a fraction of a second.

    limits    MAX_KEYS, MAX_TENSORS, MAX_NAME_BYTES, MAX_TEXT_BYTES, MAX_STRINGS, MAX_DIMENSIONS, MAX_ALIGNMENT,
              MAX_HEADER_BYTES; arrays of arrays are refused, as in llama.cpp; every count and length against the file

Two kinds of faults: those that make the header unreadable always raise; those of the layout (a tensor past the end, an
overlap, a name that stands twice) raise too, unless `strict=False` asks to have them collected in `problems`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import GGUFError
from gguf3n.formats.byte_source import ByteSource, LocalFile, is_remote
from gguf3n.formats.gguf_layout import (
    ALIGNMENT,
    MAGIC,
    SCALAR_CODES,
    GGUFValueType,
    QType,
    Scalar,
    aligned,
    tensor_bytes,
)
from gguf3n.formats.rows import Stored

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
"""GGML_MAX_DIMS of ggml.h."""
MAX_NAME_BYTES = 65_535
MAX_ALIGNMENT = 1 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 22
"""Of one array; the largest vocabularies have a tenth of it."""
MAX_TEXT_BYTES = 1 << 24
"""Of all names and string values together, chat templates being the longest; arrays are not kept."""
MAX_HEADER_BYTES = 1 << 28
MIN_KEY_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
FIRST_READ_BYTES = 1 << 20
MAX_READ_BYTES = 1 << 22
PIECE_ITEMS = 1 << 14
"""Of an array of numbers that is read piece by piece."""
MAX_PARTS = 1000

SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""A part of a split file. Source: llama_split_path of llama.cpp."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""How the small text begins that stands in a clone where Git LFS has not fetched a file."""

LITTLE_ENDIAN = "gguf-convert-endian FILE little"
"""What turns a big-endian file around; a program of the gguf package."""


@dataclass(frozen=True)
class GGUFArray:
    """An array value that is read when asked for.

    Units: `offset` in bytes from the start of the file.
    """

    element_type: GGUFValueType
    count: int
    offset: int
    n_bytes: int
    _source: ByteSource
    _order: str

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Scalar]:
        """Element by element, however many they are."""
        if not self._is_numeric:
            yield from self._strings()
            return
        for numbers in self.pieces():
            yield from numbers.tolist()

    def pieces(self) -> Iterator[NDArray[Any]]:
        """A numeric array, some elements at a time."""
        dtype = self._dtype
        for first in range(0, self.count, PIECE_ITEMS):
            n_bytes = min(PIECE_ITEMS, self.count - first) * dtype.itemsize
            yield np.frombuffer(self._read(self.offset + first * dtype.itemsize, n_bytes), dtype=dtype)

    def head(self, n: int) -> list[Scalar]:
        """The first n elements."""
        if self._is_numeric:
            return cast("list[Scalar]", self.numpy(n).tolist())
        return list(islice(self._strings(), n))

    def tolist(self) -> list[Scalar]:
        """All elements."""
        return cast("list[Scalar]", self.numpy().tolist()) if self._is_numeric else list(self)

    def numpy(self, n: int | None = None) -> NDArray[Any]:
        """The first n elements of a numeric array, or all."""
        dtype = self._dtype
        count = self.count if n is None else min(n, self.count)
        return np.frombuffer(self._read(self.offset, count * dtype.itemsize), dtype=dtype)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self._order + SCALAR_CODES[self.element_type])

    @property
    def _is_numeric(self) -> bool:
        return self.element_type is not GGUFValueType.STRING

    def _read(self, offset: int, count: int) -> bytes:
        data = self._source.read_at(offset, count)
        if len(data) < count:
            raise GGUFError(f"{self._source.name}: changed while it was read")
        return data

    def _strings(self) -> Iterator[str]:
        unpack = struct.Struct(self._order + "Q").unpack_from
        offset, end = self.offset, self.offset + self.n_bytes
        size, left = 1 << 16, self.count
        while left:
            window, at = self._read(offset, min(size, end - offset)), 0
            size = min(4 * size, MAX_READ_BYTES)
            length = unpack(window, 0)[0]
            if 8 + length > len(window):  # one string longer than a window
                window = self._read(offset, min(8 + length, end - offset))
            last = len(window) - 8
            while left and at <= last and (text_end := at + 8 + unpack(window, at)[0]) <= len(window):
                yield str(window[at + 8 : text_end], "utf-8", "replace")
                at = text_end
                left -= 1
            offset += at


@dataclass(frozen=True)
class GGUFKey:
    """A metadata key: its type and value.

    Units: `offset` and `n_bytes` of the whole entry, name and type included, in the file.
    """

    name: str
    type: GGUFValueType
    value: Scalar | GGUFArray
    offset: int = 0
    n_bytes: int = 0

    @property
    def type_name(self) -> str:
        """As in `uint32` or `array of string`."""
        if isinstance(self.value, GGUFArray):
            return f"array of {self.value.element_type.name.lower()}"
        return str(self.type.name.lower())


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's entry in the table.

    Shapes: `shape` in numpy order (ggml's `ne` reversed). Units: `offset` in bytes from the start of the file, or of
    the part it is in.
    """

    name: str
    shape: tuple[int, ...]
    qtype: QType
    offset: int
    n_bytes: int
    part: int = 0

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Problem:
    """A fault of the layout that leaves the header readable.

    `kind` is one of duplicate-key, alignment-key, duplicate-tensor, misaligned, truncated, overlap, parts; `where` the
    key, tensor or part.
    """

    kind: str
    where: str
    what: str
    expected: str | None = None
    found: str | None = None


@dataclass(frozen=True)
class GGUFFile:
    """An opened GGUF file, or all parts of a split one as if they were one.

    `all_keys` and `all_tensors` are as in the file; `keys` and `tensors` have the first of each name.
    """

    parts: tuple[ByteSource, ...]
    version: int
    byte_order: str
    alignment: int
    all_keys: tuple[GGUFKey, ...]
    all_tensors: tuple[GGUFTensor, ...]
    keys: Mapping[str, GGUFKey]
    tensors: Mapping[str, GGUFTensor]
    header_bytes: int
    file_bytes: int
    problems: tuple[Problem, ...] = ()

    @property
    def name(self) -> str:
        """The file, in messages."""
        return self.parts[0].name

    @property
    def path(self) -> Path:
        """Of a local file; of the first part of a split one."""
        return Path(self.parts[0].name)

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data a weight."""
        return 8 * sum(tensor.n_bytes for tensor in self.tensors.values()) / max(self.n_weights, 1)

    @property
    def trailing_bytes(self) -> int:
        """Bytes after the last tensor of each part and its padding."""
        total = 0
        for part, source in enumerate(self.parts):
            ends = [t.offset + t.n_bytes for t in self.all_tensors if t.part == part]
            end = max(ends) if ends else self.header_bytes if len(self.parts) == 1 else source.n_bytes
            total += max(source.n_bytes - aligned(end, self.alignment), 0)
        return total

    def value(self, name: str) -> Scalar | list[Scalar]:
        """A key's value, an array as a list. Raises: KeyError."""
        value = self.keys[name].value
        return value.tolist() if isinstance(value, GGUFArray) else value

    def stored(self, tensor: GGUFTensor) -> Stored:
        """The tensor's rows, to be read by a RowReader. Raises: GGUFError for a big-endian file."""
        if self.byte_order != "little":
            raise GGUFError(f"{self.name}: big-endian", expected="a little-endian file", fix=LITTLE_ENDIAN)
        part = self.parts[tensor.part]
        file = part.path if isinstance(part, LocalFile) else part
        found = part.stamp if isinstance(part, LocalFile) else None
        return Stored(tensor.name, tensor.qtype.name, tensor.shape, file, tensor.offset, GGUFError, found)

    def check(self) -> None:
        """Raise the first of `problems`, as a strict reading does. Raises: GGUFError."""
        for problem in self.problems:
            raise GGUFError(f"{self.name}: {problem.what}", expected=problem.expected, found=problem.found)

    def read(self, tensor: GGUFTensor, start: int = 0, count: int | None = None) -> bytes:
        """Bytes of a tensor's data. Raises: GGUFError if the file has fewer."""
        n_bytes = tensor.n_bytes - start if count is None else min(count, tensor.n_bytes - start)
        data = self.parts[tensor.part].read_at(tensor.offset + start, n_bytes)
        if len(data) < n_bytes:
            raise GGUFError(f"{self.parts[tensor.part].name}: truncated in tensor {tensor.name!r}")
        return data


def open_gguf(source: str | Path, *, strict: bool = True, token: str | bool | None = None) -> GGUFFile:
    """Read the header of a GGUF file; a split file as one, from any of its parts.

    Args:
        source: a local file, an https URL, or a file on the Hub as `org/repo`, `org/repo:FILE` or `org/repo:QUANT`.
        strict: False collects faults of the layout in `problems` instead of raising the first.
        token: for the Hub, as in huggingface_hub.

    Raises: GGUFError naming what breaks the format and where; HubError for a server that does not give the bytes.
    """
    first: ByteSource
    if is_remote(source):
        from gguf3n.formats.remote import locate

        first = locate(str(source), token=token)
    else:
        first = LocalFile(Path(source))
    gguf = read_header(first, strict=strict)
    n_parts = gguf.keys.get("split.count")
    match = SPLIT_NAME.fullmatch(re.split(r"[/\\:]", first.name.partition("?")[0])[-1])
    if n_parts is None or match is None or not isinstance(n_parts.value, int) or n_parts.value < 2:
        return gguf
    if n_parts.value != int(match[3]) or n_parts.value > MAX_PARTS:
        raise GGUFError(f"{first.name}: its name and split.count disagree", found=f"split.count {n_parts.value}")
    names = [f"{match[1]}-{i:05d}-of-{n_parts.value:05d}.gguf" for i in range(1, n_parts.value + 1)]
    try:
        sources = [first if i == int(match[2]) else first.sibling(name) for i, name in enumerate(names, 1)]
    except GGUFError as error:
        raise GGUFError(error.what, expected=f"{len(names)} parts", fix="fetch the missing part") from error
    files = [gguf if part is first else read_header(part, strict=strict) for part in sources]
    return _join(files, strict)


def open_part(path: Path, *, strict: bool = True) -> GGUFFile:
    """Read the header of one local file, whether or not it is a part of a split one. Raises: GGUFError."""
    return read_header(LocalFile(path), strict=strict)


def read_header(source: ByteSource, *, strict: bool = True) -> GGUFFile:
    """Read one header from wherever its bytes are. Raises: GGUFError."""
    return _Walk(source, strict).run()


def _join(files: list[GGUFFile], strict: bool) -> GGUFFile:
    """The parts of a split file as one: the keys of the first, the tensors of all."""
    first = files[0]
    problems = [problem for file in files for problem in file.problems]
    tensors = [replace(tensor, part=part) for part, file in enumerate(files) for tensor in file.all_tensors]
    by_name: dict[str, GGUFTensor] = {}
    for tensor in tensors:
        if by_name.setdefault(tensor.name, tensor) is not tensor:
            problems.append(Problem("duplicate-tensor", tensor.name, f"tensor {tensor.name!r} is in two parts"))
    for part, file in enumerate(files):
        number = file.keys.get("split.no")
        if number is None or number.value != part:
            found = "no split.no" if number is None else f"split.no {number.value}"
            where = f"part {part + 1}"
            problems.append(Problem("parts", where, f"{where} is another one", f"split.no {part}", found))
    total = first.keys.get("split.tensors.count")
    if total is not None and total.value != len(tensors):
        problems.append(
            Problem("parts", "split.tensors.count", "tensors are missing", f"{total.value}", f"{len(tensors)}")
        )
    joined = replace(
        first,
        parts=tuple(file.parts[0] for file in files),
        all_tensors=tuple(tensors),
        tensors=MappingProxyType(by_name),
        header_bytes=sum(file.header_bytes for file in files),
        file_bytes=sum(file.file_bytes for file in files),
        problems=tuple(problems),
    )
    if strict:
        joined.check()
    return joined


class _Walk:
    """One pass over a header, from its first byte to the end of the tensor table."""

    def __init__(self, source: ByteSource, strict: bool) -> None:
        self.source = source
        self.file_bytes = source.n_bytes
        self.strict = strict
        self.problems: list[Problem] = []
        self.window = b""
        self.window_start = 0
        self.read_bytes = FIRST_READ_BYTES
        self.position = 0
        self.text_bytes = 0
        self.order = "<"

    def run(self) -> GGUFFile:
        magic = self.take(4, "the magic number")
        if magic != MAGIC:
            if magic == LFS_POINTER[:4] and self.source.read_at(0, len(LFS_POINTER)) == LFS_POINTER:
                raise self.error(
                    "a Git LFS pointer, not the file that it stands for",
                    expected="the file, which Git LFS fetches",
                    found=f"{self.file_bytes:,} bytes of text",
                    fix="git lfs pull; in GitHub Actions, actions/checkout with lfs: true",
                )
            raise self.error("not a GGUF file", expected=f"the bytes {MAGIC!r} at its start", found=repr(magic))
        raw_version = self.take(4, "the version")
        if int.from_bytes(raw_version, "little") > 0xFFFF:
            self.order = ">"  # a small number written by a big-endian machine
        version = struct.unpack(self.order + "I", raw_version)[0]
        if version not in VERSIONS:
            raise self.error(f"GGUF version {version} is not supported", expected="version 2 or 3", found=str(version))
        n_tensors = self.count("Q", "the tensor count", MIN_TENSOR_BYTES, MAX_TENSORS)
        n_keys = self.count("Q", "the key count", MIN_KEY_BYTES, MAX_KEYS)
        all_keys = [self.key(f"key {index}") for index in range(n_keys)]
        keys: dict[str, GGUFKey] = {}
        for key in all_keys:
            if keys.setdefault(key.name, key) is not key:
                self.problem("duplicate-key", key.name, f"key {key.name!r} stands twice")
        alignment = self.alignment(keys)
        entries = [self.tensor_entry(f"tensor {index}") for index in range(n_tensors)]
        data_start = aligned(self.position, alignment) if entries else self.position
        all_tensors = self.place(entries, data_start, alignment)
        tensors: dict[str, GGUFTensor] = {}
        for tensor in all_tensors:
            tensors.setdefault(tensor.name, tensor)
        return GGUFFile(
            parts=(self.source,),
            version=version,
            byte_order="little" if self.order == "<" else "big",
            alignment=alignment,
            all_keys=tuple(all_keys),
            all_tensors=tuple(all_tensors),
            keys=MappingProxyType(keys),
            tensors=MappingProxyType(tensors),
            header_bytes=data_start,
            file_bytes=self.file_bytes,
            problems=tuple(self.problems),
        )

    def have(self, n: int, what: str) -> int:
        """Make the next n bytes part of the window; returns where they start in it."""
        end = self.position + n
        if end > self.file_bytes:
            raise self.error(
                f"truncated in {what}", expected=f"at least {end:,} bytes", found=f"{self.file_bytes:,} bytes"
            )
        if end > MAX_HEADER_BYTES:
            raise self.error(f"the header is too long, in {what}", expected=f"at most {MAX_HEADER_BYTES:,} bytes")
        if self.position < self.window_start or end > self.window_start + len(self.window):
            wanted = min(max(n, self.read_bytes), self.file_bytes - self.position)
            self.window = self.source.read_at(self.position, wanted)
            self.window_start = self.position
            self.read_bytes = min(2 * self.read_bytes, MAX_READ_BYTES)
            if len(self.window) < n:
                raise self.error(f"ended early in {what}")
        return self.position - self.window_start

    def take(self, n: int, what: str) -> bytes:
        """The next n bytes."""
        start = self.have(n, what)
        self.position += n
        return self.window[start : start + n]

    def skip(self, n: int, what: str) -> None:
        """Step over n bytes without reading them."""
        self.position += n
        if self.position > MAX_HEADER_BYTES:
            raise self.error(f"the header is too long, in {what}", expected=f"at most {MAX_HEADER_BYTES:,} bytes")

    def number(self, code: str, what: str) -> int:
        return int(struct.unpack(self.order + code, self.take(struct.calcsize(code), what))[0])

    def count(self, code: str, what: str, item_bytes: int, limit: int | None = None) -> int:
        """A count of items, refused if the rest of the file can't hold them."""
        n = self.number(code, what)
        room = (self.file_bytes - self.position) // item_bytes
        if n > room:
            raise self.error(f"{what} is impossible", expected=f"at most {room:,}", found=f"{n:,}")
        if limit is not None and n > limit:
            raise self.error(f"{what} is too large", expected=f"at most {limit:,}", found=f"{n:,}")
        return n

    def string(self, what: str, limit: int | None = None) -> str:
        n = self.count("Q", f"the length of {what}", 1)
        if limit is not None and n > limit:
            raise self.error(f"{what} is too long", expected=f"at most {limit:,} bytes", found=f"{n:,} bytes")
        self.text_bytes += n
        if self.text_bytes > MAX_TEXT_BYTES:
            raise self.error(f"too much text, in {what}", expected=f"at most {MAX_TEXT_BYTES:,} bytes outside arrays")
        try:
            return str(self.take(n, what), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8", found=str(error)) from error

    def value_type(self, what: str) -> GGUFValueType:
        number = self.number("I", what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.error(f"{what} is unknown", expected="a number from 0 to 12", found=str(number)) from None

    def key(self, what: str) -> GGUFKey:
        start = self.position
        name = self.string(f"the name of {what}", MAX_NAME_BYTES)
        kind = self.value_type(f"the type of key {name!r}")
        value: Scalar | GGUFArray
        if kind is GGUFValueType.ARRAY:
            value = self.array(f"key {name!r}")
        elif kind is GGUFValueType.STRING:
            value = self.string(f"key {name!r}")
        else:
            code = SCALAR_CODES[kind]
            value = struct.unpack(self.order + code, self.take(struct.calcsize(code), f"key {name!r}"))[0]
        return GGUFKey(name, kind, value, start, self.position - start)

    def array(self, what: str) -> GGUFArray:
        element_type = self.value_type(f"the element type of {what}")
        if element_type is GGUFValueType.ARRAY:
            raise self.error(f"{what} is an array of arrays", expected="an array of scalars or strings")
        if element_type is not GGUFValueType.STRING:
            item_bytes = struct.calcsize(SCALAR_CODES[element_type])
            n = self.count("Q", f"the element count of {what}", item_bytes)
            start = self.position
            self.skip(n * item_bytes, what)
        else:
            n = self.count("Q", f"the element count of {what}", 8, MAX_STRINGS)
            start = self.position
            self.skip_strings(n, what)
        return GGUFArray(element_type, n, start, self.position - start, self.source, self.order)

    def skip_strings(self, n: int, what: str) -> None:
        """Step over n strings. Why: the one hot loop of opening a file, so it does not go through `take`."""
        unpack = struct.Struct(self.order + "Q").unpack_from
        while n:
            at = self.have(8, f"a string of {what}")
            window, last, length = self.window, len(self.window) - 8, 0
            while n and at <= last:
                length = unpack(window, at)[0]
                at += 8 + length
                n -= 1
            end = self.window_start + at
            if end > self.file_bytes:
                room = self.file_bytes - (end - length)
                raise self.error(
                    f"the length of a string of {what} is impossible", expected=f"at most {room:,}", found=f"{length:,}"
                )
            self.skip(end - self.position, what)

    def alignment(self, keys: Mapping[str, GGUFKey]) -> int:
        key = keys.get("general.alignment")
        if key is None:
            return ALIGNMENT
        value = key.value
        if key.type is not GGUFValueType.UINT32 or not isinstance(value, int):
            what = "general.alignment has the wrong type"
            self.problem("alignment-key", key.name, what, expected="uint32", found=key.type_name)
            return ALIGNMENT
        if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            what = "general.alignment is impossible"
            self.problem("alignment-key", key.name, what, expected="a power of two", found=str(value))
            return ALIGNMENT
        return int(value)

    def tensor_entry(self, what: str) -> tuple[str, tuple[int, ...], QType, int]:
        name = self.string(f"the name of {what}", MAX_NAME_BYTES)
        n_dimensions = self.number("I", f"the dimension count of tensor {name!r}")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise self.error(
                f"tensor {name!r} has an impossible number of dimensions",
                expected=f"1 to {MAX_DIMENSIONS}",
                found=str(n_dimensions),
            )
        ne = [self.number("Q", f"a dimension of tensor {name!r}") for _ in range(n_dimensions)]
        number = self.number("I", f"the type of tensor {name!r}")
        try:
            qtype = QType(number)
        except ValueError:
            raise self.error(
                f"tensor {name!r} has an unknown type", expected="a ggml type", found=str(number)
            ) from None
        offset = self.number("Q", f"the offset of tensor {name!r}")
        return name, tuple(reversed(ne)), qtype, offset

    def place(
        self, entries: list[tuple[str, tuple[int, ...], QType, int]], data_start: int, alignment: int
    ) -> list[GGUFTensor]:
        """Check the tensors against the file and each other, and make their offsets absolute."""
        tensors: list[GGUFTensor] = []
        names: set[str] = set()
        for name, shape, qtype, offset in entries:
            if name in names:
                self.problem("duplicate-tensor", name, f"tensor {name!r} stands twice")
            names.add(name)
            try:
                n_bytes = tensor_bytes(qtype, shape)
            except ValueError as error:
                raise self.error(f"tensor {name!r} has an impossible shape", found=str(error)) from None
            if offset % alignment:
                self.problem(
                    "misaligned",
                    name,
                    f"tensor {name!r} is not aligned",
                    expected=f"a multiple of {alignment}",
                    found=str(offset),
                )
            if data_start + offset + n_bytes > self.file_bytes:
                self.problem(
                    "truncated",
                    name,
                    f"truncated: tensor {name!r} ends past the file",
                    expected=f"at least {data_start + offset + n_bytes:,} bytes",
                    found=f"{self.file_bytes:,} bytes",
                )
            tensors.append(GGUFTensor(name, shape, qtype, data_start + offset, n_bytes))
        end = data_start
        for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
            if tensor.offset < end:
                self.problem("overlap", tensor.name, f"tensor {tensor.name!r} overlaps another")
            end = max(end, tensor.offset + tensor.n_bytes)
        return tensors

    def problem(
        self, kind: str, where: str, what: str, *, expected: str | None = None, found: str | None = None
    ) -> None:
        """A fault that leaves the header readable: raised or collected."""
        if self.strict:
            raise self.error(what, expected=expected, found=found)
        self.problems.append(Problem(kind, where, what, expected, found))

    def error(
        self, what: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None
    ) -> GGUFError:
        return GGUFError(f"{self.source.name}: {what}", expected=expected, found=found, fix=fix)
