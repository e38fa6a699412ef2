"""Rows of weights, wherever they come from: a few forms, and one reader that fills float32 from any of them.

    Stored     consecutive rows of a tensor in a file
    Zeros      rows that no file has
    View       some rows and columns of other rows: a slice of a larger model
    Padded     other rows with zeros to their right: a narrow matrix where a wide one is demanded
    Repeated   one row of other rows, again and again
    Transposed the columns of a matrix in a file
    LowRank    other rows with a low-rank product added: a model with an adapter
    SideBySide other rows, each with some of the columns: a matrix of which several files have a part
    OfLength   other rows, each made as long as a vector says: a model with an adapter that learned lengths apart
    Scaled     other rows times a number: a factor of an adapter that has its scale in it

A form is a value: it can be compared, is a key of a dictionary, and holds no data. A tensor of a source is a sequence
of forms, one below the other. To add a form is to write one class with the members of `Rows`, and its test.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol, TypeAlias

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

from gguf3n.errors import CheckpointError, Gguf3nError
from gguf3n.formats.byte_source import ByteSource, Stamp, stamp
from gguf3n.formats.gguf_layout import QType, row_bytes
from gguf3n.formats.offset_files import OffsetFiles

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
"""Bytes of one element of each safetensors dtype; types of less than a byte are never in a checkpoint we convert."""

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""The dtypes that weights may have in a checkpoint; GGUF calls them the same."""

CHUNK_WEIGHTS = 1 << 18
"""# measured: see scripts/bench_convert.py; source, float32 and blocks of a chunk fit a core's second-level cache."""

ROW_GROUP = 16
"""Quantizers work on this many rows at once, so chunks are whole groups where they can be."""

FACTORS_KEPT = 4
"""Low-rank factors that a reader keeps in float32; a tensor's chunks follow each other."""

Values: TypeAlias = NDArray[np.float32]


class Rows(Protocol):
    """Some rows of equal length. Implementations are frozen: two that are equal have the same values."""

    @property
    def n_rows(self) -> int: ...

    @property
    def n_per_row(self) -> int: ...

    @property
    def dtypes(self) -> frozenset[str]:
        """What the values are stored in, so that a type holds them all where it holds these; none for zeros."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes that are read for all of the rows."""
        ...

    @property
    def origin(self) -> str:
        """Where the rows are, in messages: as in "model.safetensors: tensor 'norm.weight'"."""
        ...

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What is read of files for them."""
        ...

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        """Read rows from `first` on; returns the largest magnitude, infinite or NaN where a value is not finite.

        Shapes: out [n, n_per_row], contiguous.
        """
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not yet read.

    Shapes: `shape` in numpy order; rows are those of all leading dimensions together, a vector is one row.
    Units: `offset` in bytes from the start of the file.
    `dtype` is that of safetensors, or the name of a ggml type. `error` is raised where the file can't be read. `stamp`
    is what the file had when its header was read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | ByteSource
    offset: int
    error: type[Gguf3nError] = field(default=CheckpointError, compare=False)
    stamp: Stamp | None = field(default=None, compare=False)

    @property
    def file_name(self) -> str:
        """In messages."""
        return str(self.file) if isinstance(self.file, Path) else self.file.name

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def n_per_row(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of the whole tensor where it is a scalar."""
        if self.dtype in DTYPE_BYTES:
            return self.n_per_row * DTYPE_BYTES[self.dtype]
        return row_bytes(QType[self.dtype], self.n_per_row)

    @property
    def stored_bytes(self) -> int:
        return self.n_rows * self.row_bytes

    @property
    def dtypes(self) -> frozenset[str]:
        return frozenset({self.dtype})

    @property
    def origin(self) -> str:
        return f"{self.file_name}: tensor {self.name!r}"

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self,)

    def in_rows_of(self, n_per_row: int) -> Stored:
        """The same values in rows of another length, which must be whole blocks and divide them all."""
        return replace(self, shape=(math.prod(self.shape) // n_per_row, n_per_row))

    def some(self, rows: range) -> Stored:
        """Consecutive rows of it."""
        offset = self.offset + rows.start * self.row_bytes
        return replace(self, shape=(len(rows), self.n_per_row), offset=offset)

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        return reader.arithmetic.widen(self.dtype, reader.read_stored(self, first, len(out)), out.reshape(-1))


@dataclass(frozen=True)
class Zeros:
    """Rows that no file has: padding, and weights that are demanded and never evaluated."""

    n_rows: int
    n_per_row: int

    stored_bytes: ClassVar[int] = 0
    dtypes: ClassVar[frozenset[str]] = frozenset()
    origin: ClassVar[str] = "zeros"
    stored: ClassVar[tuple[Stored, ...]] = ()

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        out[:] = 0
        return 0.0


class _Moved:
    """What rows have in common with those whose values they have, in other places."""

    base: Rows

    @property
    def dtypes(self) -> frozenset[str]:
        return self.base.dtypes

    @property
    def origin(self) -> str:
        return self.base.origin

    @property
    def stored(self) -> tuple[Stored, ...]:
        return self.base.stored


class _Changed:
    """What rows have in common with those that they are computed from, in the same places."""

    base: Rows
    dtypes: ClassVar[frozenset[str]] = frozenset({"F32"})

    @property
    def n_rows(self) -> int:
        return self.base.n_rows

    @property
    def n_per_row(self) -> int:
        return self.base.n_per_row


@dataclass(frozen=True)
class View(_Moved):
    """Some rows and columns of other rows.

    Args:
        rows: consecutive ones.
        columns: runs of consecutive ones, side by side in this order.
    """

    base: Rows
    rows: range
    columns: tuple[range, ...]

    @property
    def n_rows(self) -> int:
        return len(self.rows)

    @property
    def n_per_row(self) -> int:
        return sum(map(len, self.columns))

    @property
    def stored_bytes(self) -> int:
        return self.base.stored_bytes // max(self.base.n_rows, 1) * self.n_rows

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        if isinstance(self.base, Stored) and (raw := reader.read_raw(self, first, len(out))) is not None:
            return reader.arithmetic.widen(self.base.dtype, raw, out.reshape(-1))
        whole = np.empty((len(out), self.base.n_per_row), np.float32)
        reader.fill(self.base, self.rows.start + first, whole)
        start = 0
        for run in self.columns:
            out[:, start : start + len(run)] = whole[:, run.start : run.stop]
            start += len(run)
        return largest_magnitude(out)


@dataclass(frozen=True)
class Padded(_Moved):
    """Other rows, each with zeros after it. `n_per_row` counts both."""

    base: Rows
    n_per_row: int

    @property
    def n_rows(self) -> int:
        return self.base.n_rows

    @property
    def stored_bytes(self) -> int:
        return self.base.stored_bytes

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        narrow = np.empty((len(out), self.base.n_per_row), np.float32)
        largest = reader.fill(self.base, first, narrow)
        out[:, : self.base.n_per_row] = narrow
        out[:, self.base.n_per_row :] = 0
        return largest


@dataclass(frozen=True)
class Repeated(_Moved):
    """One row of other rows, again and again."""

    base: Rows
    row: int
    n_rows: int

    @property
    def n_per_row(self) -> int:
        return self.base.n_per_row

    @property
    def stored_bytes(self) -> int:
        return self.base.stored_bytes // max(self.base.n_rows, 1)

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        largest = reader.fill(self.base, self.row, out[:1])
        out[1:] = out[:1]
        return largest


@dataclass(frozen=True)
class Transposed(_Moved):
    """The columns of a matrix of plain floats, each as a row. Why: PEFT keeps an embedding's factors so."""

    base: Stored

    @property
    def n_rows(self) -> int:
        return self.base.n_per_row

    @property
    def n_per_row(self) -> int:
        return self.base.n_rows

    @property
    def stored_bytes(self) -> int:
        return self.base.stored_bytes

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        values, strip = self.base.in_rows_of(1), np.empty((len(out), 1), np.float32)
        for k in range(self.base.n_rows):  # only what is asked for is read, and no whole matrix held
            reader.fill(values, k * self.base.n_per_row + first, strip)
            out[:, k] = strip[:, 0]
        return largest_magnitude(out)


@dataclass(frozen=True)
class LowRank(_Changed):
    """base + scale * (b @ a): what a LoRA adapter makes of a matrix.

    Shapes: base [n_rows, n_per_row], a [rank, n_per_row], b [n_rows, rank].
    Exact: the product and the sum are added up in float64, in the order of the ranks, and rounded to float32 once. So
        no value depends on how many rows are read together.
    Source: E. Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1.
    """

    base: Rows
    a: Rows
    b: Rows
    scale: float

    @property
    def stored_bytes(self) -> int:
        return self.base.stored_bytes + self.a.stored_bytes + self.b.stored_bytes

    @property
    def origin(self) -> str:
        return f"{self.base.origin} with {self.a.origin}"

    @property
    def stored(self) -> tuple[Stored, ...]:
        return *self.base.stored, *self.a.stored, *self.b.stored

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        reader.fill(self.base, first, out)
        b = np.empty((len(out), self.b.n_per_row), np.float32)
        reader.fill(self.b, first, b)
        return reader.arithmetic.add_product(out, reader.factor(self.a), b, self.scale)


@dataclass(frozen=True)
class OfLength(_Changed):
    """Other rows, each multiplied so that its Euclidean length is the one that is given.

    Shapes: base [n_rows, n_per_row], lengths [n_rows].
    Exact: squares are added up in float64, from left to right; each weight is rounded to float32 once more.
    Source: S.-Y. Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024, equation 5.
    """

    base: Rows
    lengths: Stored

    @property
    def stored_bytes(self) -> int:
        return self.base.stored_bytes + self.lengths.stored_bytes

    @property
    def origin(self) -> str:
        return f"{self.base.origin} with {self.lengths.origin}"

    @property
    def stored(self) -> tuple[Stored, ...]:
        return *self.base.stored, self.lengths

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        reader.fill(self.base, first, out)
        lengths = np.empty((len(out), 1), np.float32)
        reader.fill(self.lengths.in_rows_of(1), first, lengths)
        return reader.arithmetic.set_lengths(out, lengths[:, 0])


@dataclass(frozen=True)
class SideBySide:
    """Other rows, as many of each, that have the columns from left to right."""

    parts: tuple[Rows, ...]

    @property
    def n_rows(self) -> int:
        return self.parts[0].n_rows

    @property
    def n_per_row(self) -> int:
        return sum(part.n_per_row for part in self.parts)

    @property
    def dtypes(self) -> frozenset[str]:
        return frozenset[str]().union(*(part.dtypes for part in self.parts))

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self.parts)

    @property
    def origin(self) -> str:
        return self.parts[0].origin

    @property
    def stored(self) -> tuple[Stored, ...]:
        return tuple(stored for part in self.parts for stored in part.stored)

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        start, largest = 0, []
        for part in self.parts:
            columns = np.empty((len(out), part.n_per_row), np.float32)
            largest.append(reader.fill(part, first, columns))
            out[:, start : start + part.n_per_row] = columns
            start += part.n_per_row
        return float(np.max(largest))  # NaN where one is


@dataclass(frozen=True)
class Scaled(_Changed):
    """Other rows times a number.

    Exact: multiplied in float64 and rounded to float32 once.
    """

    base: Rows
    scale: float

    @property
    def stored_bytes(self) -> int:
        return self.base.stored_bytes

    @property
    def origin(self) -> str:
        return self.base.origin

    @property
    def stored(self) -> tuple[Stored, ...]:
        return self.base.stored

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        reader.fill(self.base, first, out)
        with np.errstate(all="ignore"):  # what is not finite, or becomes too large
            out[:] = out * np.float64(self.scale)
        return largest_magnitude(out)


def cut(rows: Rows, part: range) -> Rows:
    """Consecutive rows of any form, in the form that is read fastest."""
    if len(part) == rows.n_rows:
        return rows
    if isinstance(rows, Stored):
        return rows.some(part)
    if isinstance(rows, Zeros):
        return Zeros(len(part), rows.n_per_row)
    return View(rows, part, (range(rows.n_per_row),))


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source: its shape, and where its rows come from, in order. Shapes: numpy order."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[Rows, ...]

    @property
    def dtypes(self) -> frozenset[str]:
        """What its values are stored in; none where all are zeros."""
        return frozenset[str]().union(*(rows.dtypes for rows in self.rows))

    @property
    def origin(self) -> str:
        """Where it is, in messages."""
        return self.rows[0].origin

    @property
    def stored(self) -> tuple[Stored, ...]:
        """What is read of files for it."""
        return tuple(each for rows in self.rows for each in rows.stored)


def some_rows(forms: Iterable[Rows], wanted: range) -> tuple[Rows, ...]:
    """Consecutive rows of forms that stand one below the other."""
    found: list[Rows] = []
    start = 0
    for form in forms:
        part = range(max(wanted.start - start, 0), min(wanted.stop - start, form.n_rows))
        start += form.n_rows
        if part:
            found.append(cut(form, part))
    return tuple(found)


def some_columns(forms: Iterable[Rows], runs: tuple[range, ...]) -> tuple[Rows, ...]:
    """Runs of columns, side by side, of forms that stand one below the other."""
    return tuple(form if runs == (range(form.n_per_row),) else View(form, range(form.n_rows), runs) for form in forms)


def stored_tensors(stored: Iterable[Stored]) -> dict[str, SourceTensor]:
    """A table of tensors, by name, each of which is in one file as it is."""
    return {each.name: SourceTensor(each.name, each.shape, (each,)) for each in stored}


@dataclass(frozen=True)
class Arithmetic:
    """What a reader computes with; each returns the largest magnitude of what it has made.

    Args:
        widen: bytes of whole blocks of a dtype to float32 values.
        add_product: adds scale * (b @ a) to rows, as `LowRank` says.
        set_lengths: multiplies each row, as `OfLength` says.
    """

    widen: Callable[[str, NDArray[np.uint8], Values], float]
    add_product: Callable[[Values, Values, Values, float], float]
    set_lengths: Callable[[Values, Values], float]


class RowReader:
    """Fills float32 from any form of rows; one for all threads. Close it.

    Args:
        arithmetic: the default is NumPy's, a conversion passes compiled code; the values are the same.

    Raises: the error of `Stored`, where a file can't be read or has become shorter.
    """

    def __init__(self, arithmetic: Arithmetic | None = None) -> None:
        self.arithmetic = arithmetic or WITH_NUMPY
        self._files = OffsetFiles("r")
        self._read_from: dict[Path, Stored] = {}
        self._local = threading.local()
        self._factors: OrderedDict[Rows, Values] = OrderedDict()
        self._lock = threading.Lock()

    def fill(self, rows: Rows, first: int, out: Values) -> float:
        """Read rows from `first` on; returns the largest magnitude, infinite or NaN where a value is not finite.

        Shapes: out [n, n_per_row], contiguous.
        """
        return rows.fill(self, first, out)

    def read_stored(self, stored: Stored, first: int, n_rows: int) -> NDArray[np.uint8]:
        """The bytes of some rows as they are in the file, in a buffer that is the thread's own until its next call."""
        n_bytes = n_rows * stored.row_bytes
        buffer: NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < n_bytes:
            buffer = self._local.buffer = np.empty(n_bytes, np.uint8)
        out = buffer[:n_bytes]
        self.copy_stored(stored, first, out)
        return out

    def read_raw(self, rows: Rows, first: int, n_rows: int) -> NDArray[np.uint8] | None:
        """The bytes of some rows as they are in a file, good until the thread's next call; None where no file has them.

        Why: what is only copied need not become float32, and of what is widened, only what is wanted.
        """
        if isinstance(rows, Stored):
            return self.read_stored(rows, first, n_rows)
        if not (isinstance(rows, View) and isinstance(rows.base, Stored) and rows.base.dtype in DTYPE_BYTES):
            return None
        base, size = rows.base, DTYPE_BYTES[rows.base.dtype]
        whole = self.read_stored(base, rows.rows.start + first, n_rows).reshape(n_rows, base.row_bytes)
        return np.concatenate([whole[:, run.start * size : run.stop * size] for run in rows.columns], axis=1).reshape(
            -1
        )

    def copy_stored(self, stored: Stored, first: int, out: NDArray[np.uint8]) -> None:
        """The same into a buffer of the caller's, which holds whole rows."""
        offset = stored.offset + first * stored.row_bytes
        if isinstance(stored.file, Path):
            self._read_from.setdefault(stored.file, stored)
            self._files.fill(stored.file, offset, out, tensor=stored.name, error=stored.error)
            return
        data = stored.file.read_at(offset, out.nbytes)
        if len(data) < out.nbytes:
            raise stored.error(f"{stored.file_name}: truncated in tensor {stored.name!r}")
        out.reshape(-1)[:] = np.frombuffer(data, np.uint8)

    def factor(self, rows: Rows) -> Values:
        """All of a small matrix, kept for the chunks that follow."""
        with self._lock:
            if rows in self._factors:
                self._factors.move_to_end(rows)
                return self._factors[rows]
        values = np.empty((rows.n_rows, rows.n_per_row), np.float32)
        self.fill(rows, 0, values)
        with self._lock:
            self._factors[rows] = values
            while len(self._factors) > FACTORS_KEPT:
                self._factors.popitem(last=False)
        return values

    def check_unchanged(self) -> None:
        """See that every file that was read is still the one whose header was.

        Raises: the error of `Stored` for one that was replaced or written while it was read.
        """
        for path, stored in self._read_from.items():
            if stored.stamp is not None and (not path.exists() or stamp(path) != stored.stamp):
                raise stored.error(
                    f"{path}: changed while it was read",
                    expected="the file whose header was read",
                    found="one of another size, time or identity" if path.exists() else "none",
                    fix="wait until it is complete, then run again",
                )

    def close(self) -> None:
        with suppress(OSError):  # of files that were only read, nothing is lost
            self._files.close()


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one form, few enough to be worked on together."""

    rows: Rows
    first: int
    n_rows: int

    @property
    def n_weights(self) -> int:
        return self.n_rows * self.rows.n_per_row

    @property
    def stored_bytes(self) -> int:
        """Its share of what is read; the shares of all chunks make up the whole."""
        total, n_rows = self.rows.stored_bytes, self.rows.n_rows
        return (self.first + self.n_rows) * total // n_rows - self.first * total // n_rows


def chunks(rows: Rows, chunk_weights: int = CHUNK_WEIGHTS) -> Iterator[Chunk]:
    """All rows of a form, some at a time."""
    step = max(1, chunk_weights // max(rows.n_per_row, 1))
    if step > ROW_GROUP:
        step -= step % ROW_GROUP
    for first in range(0, rows.n_rows, step):
        yield Chunk(rows, first, min(step, rows.n_rows - first))


def widen_with_numpy(dtype: str, raw: NDArray[np.uint8], out: Values) -> float:
    """Bytes of a dtype of FLOAT_DTYPES or of a ggml type as float32 values. Raises: NotImplementedError for a type that
    the gguf package can't dequantize."""
    match dtype:
        case "F32":
            out[:] = raw.view("<f4")
        case "F16":
            out[:] = raw.view("<f2")
        case "BF16":
            np.left_shift(raw.view("<u2"), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
        case _:
            dequantize_into(raw, QType[dtype], out)
    return largest_magnitude(out)


def dequantize_into(raw: NDArray[np.uint8], qtype: QType, out: Values) -> None:
    """Bytes of whole blocks as values, some blocks at a time. Why: the package takes many times the memory of a row.

    Shapes: raw and out are contiguous. Raises: NotImplementedError.
    """
    block_weights, block_bytes = GGML_QUANT_SIZES[qtype]
    n_blocks = CHUNK_WEIGHTS // block_weights
    data, values = raw.reshape(-1), out.reshape(-1)
    with np.errstate(all="ignore"):  # scales that are not finite
        for first in range(0, max(len(data) // block_bytes, 1), n_blocks):
            some = data[first * block_bytes : (first + n_blocks) * block_bytes]
            values[first * block_weights : (first + n_blocks) * block_weights] = dequantize(some, qtype)


def largest_magnitude(values: Values) -> float:
    """Infinite or NaN where a value is not finite; 0 of none."""
    return float(max(-values.min(initial=0), values.max(initial=0)))


def add_product_with_numpy(rows: Values, a: Values, b: Values, scale: float) -> float:
    """rows += scale * (b @ a), one rank after the other in float64. Shapes: [n, m], [rank, m], [n, rank]."""
    added = np.zeros(rows.shape, np.float64)
    with np.errstate(all="ignore"):  # what is not finite, or becomes too large
        for k in range(len(a)):
            added += np.float64(b[:, k, None]) * a[k]
        rows[:] = rows + scale * added
    return largest_magnitude(rows)


def set_lengths_with_numpy(rows: Values, lengths: Values) -> float:
    """Each row times its length over its Euclidean one. Shapes: [n, m], [n]. A row of zeros becomes NaN."""
    wide = rows.astype(np.float64)
    with np.errstate(all="ignore"):
        squares = np.add.accumulate(wide * wide, axis=1)[:, -1]  # from left to right, as no sum of NumPy's goes
        rows[:] = wide * (lengths / np.sqrt(squares))[:, None]
    return largest_magnitude(rows)


WITH_NUMPY = Arithmetic(widen_with_numpy, add_product_with_numpy, set_lengths_with_numpy)
