"""Importance matrices: how much each input column of a weight matrix matters, measured by llama-imatrix.

    GGUF form    tensors NAME.in_sum2 float32[n_mat, n_per_row] and NAME.counts float32[n_mat, 1]; keys general.type
                 "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size
    legacy form  entry count int32; each entry: name length int32, name, call count int32, value count int32, float32
                 values; then, optionally, chunk count int32, dataset length int32, dataset name
    quant_weights = sums of squared activations / counts

Source: common/imatrix-loader.cpp and tools/imatrix/imatrix.cpp of llama.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import GGUFError, UsageError, shown
from gguf3n.formats.gguf_layout import MAGIC, GGUFValueType, KeyValue, QType
from gguf3n.formats.gguf_reader import GGUFFile, GGUFTensor, open_gguf
from gguf3n.formats.gguf_writer import GGUFWriter, lay_out
from gguf3n.formats.small_file import MAX_IMATRIX_BYTES, check_small

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"

LEGACY_CHUNK_SIZE = 512
"""What llama-imatrix takes the chunks of a legacy file to have had, unless told otherwise."""


@dataclass(frozen=True)
class Entry:
    """One weight matrix's activations.

    Shapes: sums float32[n_mat, n_per_row], sums of squared activations a column; counts float32[n_mat], the number of
        activations summed. n_mat is 1 but for stacks.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    @property
    def quant_weights(self) -> NDArray[np.float32]:
        """Mean squared activation a column, 1 where nothing was counted. Shapes: float32[n_mat, n_per_row].

        Exact: as llama-quantize computes it, one float32 division.
        """
        counted = self.counts[:, None] > 0
        return np.where(counted, self.sums / np.where(counted, self.counts[:, None], np.float32(1)), np.float32(1))

    @property
    def is_possible(self) -> bool:
        """Whether activations can give these values."""
        with np.errstate(over="ignore", invalid="ignore"):
            means = self.quant_weights
        return bool((self.sums >= 0).all() and np.isfinite(self.counts).all() and np.isfinite(means).all())


@dataclass(frozen=True)
class ImportanceMatrix:
    """A whole file. `chunk_size` is 0 where the file does not say.

    In a legacy file sums are means times the number of chunks, and counts are chunks, not activations.
    """

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    is_legacy: bool = False

    @property
    def n_chunks(self) -> int:
        """Chunks that every matrix has seen; 0 where the file does not say how long a chunk is.

        Why: `chunk_count` goes by the largest count, and AltUp's router is evaluated twice a token.
        """
        size = 1 if self.is_legacy else self.chunk_size
        return int(min((entry.counts.max() for entry in self.entries.values()), default=0)) // size if size else 0


def chunk_count(entries: Iterable[Entry], chunk_size: int) -> int:
    """What llama-imatrix writes as the number of chunks."""
    # ggml quirk: the largest count decides, which of a Gemma 3n is that of AltUp's router, twice the others'
    return int(max((entry.counts.max() for entry in entries), default=0)) // chunk_size


def as_imatrix(given: str | Path | ImportanceMatrix | None) -> ImportanceMatrix | None:
    """A matrix that is given itself or by its file. Raises: UsageError; as `read_imatrix`."""
    if given is None or isinstance(given, ImportanceMatrix):
        return given
    if not isinstance(given, str | Path):
        raise UsageError("not an importance matrix", expected="a file or an ImportanceMatrix", found=shown(given))
    return read_imatrix(given)


def merge_imatrices(imatrices: Sequence[ImportanceMatrix], *, chunk_size: int | None = None) -> ImportanceMatrix:
    """Sums and counts of several files added, as if their texts had been measured together.

    Args:
        chunk_size: what a legacy file's chunks had, which it does not say; by default that of the other files, or 512.

    Exact: as llama-imatrix adds several `--in-file`, float32 additions in this order.

    Raises: UsageError: no files, or such as were made for different models or with chunks of different sizes.
    """
    if not imatrices:
        raise UsageError("no importance matrix to merge", expected="one or more", found="none")
    sizes = {imatrix.chunk_size: imatrix.path for imatrix in imatrices if imatrix.chunk_size}
    if len(sizes) > 1:
        raise UsageError(
            "importance matrices that were measured with chunks of different sizes",
            expected="one --ctx for all",
            found=", ".join(f"{size} in {path}" for size, path in sizes.items()),
            fix="measure them again with the same --ctx",
        )
    size = next(iter(sizes), None) or chunk_size or LEGACY_CHUNK_SIZE
    entries: dict[str, Entry] = {}
    for imatrix in imatrices:
        scale = np.float32(size if imatrix.is_legacy else 1)
        for name, entry in imatrix.entries.items():
            with np.errstate(over="ignore"):  # refused below
                scaled = Entry(entry.sums * scale, entry.counts * scale)
                entries[name] = _add(entries[name], scaled, name, imatrix.path) if name in entries else scaled
            if not entries[name].is_possible:
                raise UsageError(f"{imatrix.path}: entry {name!r}: a sum that float32 does not hold")
    return ImportanceMatrix(
        path=Path("merged"),
        entries=entries,
        datasets=tuple(dataset for imatrix in imatrices for dataset in imatrix.datasets),
        chunk_count=chunk_count(entries.values(), size),
        chunk_size=size,
    )


def _add(one: Entry, other: Entry, name: str, path: Path) -> Entry:
    if one.sums.shape != other.sums.shape:
        raise UsageError(
            f"{path}: entry {name!r} has another length than in the files before it",
            expected=" x ".join(map(str, one.sums.shape)),
            found=" x ".join(map(str, other.sums.shape)),
            fix="merge only what was measured on one model",
        )
    return Entry(one.sums + other.sums, one.counts + other.counts)


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read either form.

    Raises: GGUFError for a file that is neither, is truncated, or holds values that no activations can give.
    """
    path = Path(path)
    check_small(path, MAX_IMATRIX_BYTES, GGUFError)
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        imatrix = _read_gguf(path) if is_gguf else _read_legacy(path)
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read", found=error.strerror or str(error)) from error
    for name, entry in imatrix.entries.items():
        if not entry.sums.size or not entry.counts.size:
            raise GGUFError(f"{path}: entry {name!r} has no values", fix="measure the importance matrix again")
        if not entry.is_possible:
            raise GGUFError(
                f"{path}: entry {name!r} has values that are not finite or are negative",
                expected="sums of squares",
                fix="measure the importance matrix again",
            )
    return imatrix


def _read_gguf(path: Path) -> ImportanceMatrix:
    gguf = open_gguf(path)
    entries: dict[str, Entry] = {}
    for name, tensor in gguf.tensors.items():
        if not name.endswith(SUMS):
            continue
        base = name.removesuffix(SUMS)
        counts = gguf.tensors.get(base + COUNTS)
        is_whole = counts is not None and counts.n_weights and tensor.n_weights % counts.n_weights == 0
        if counts is None or not is_whole or {tensor.qtype, counts.qtype} != {QType.F32}:
            raise GGUFError(
                f"{path}: entry {base!r} is incomplete",
                expected=f"{base}{SUMS} and {base}{COUNTS} in F32, the first a multiple of the second",
                found=", ".join(n for n in gguf.tensors if n.startswith(base + ".")),
            )
        values = _values(gguf, tensor)
        entries[base] = Entry(values.reshape(counts.n_weights, -1), _values(gguf, counts))
    if not entries:
        raise GGUFError(
            f"{path}: not an importance matrix", expected=f"tensors named …{SUMS}", found=f"{len(gguf.tensors)} tensors"
        )
    return ImportanceMatrix(
        path,
        entries,
        tuple(map(str, _value(gguf, DATASETS, list, []))),
        _value(gguf, CHUNK_COUNT, int, 0),
        _value(gguf, CHUNK_SIZE, int, 0),
    )


def _values(gguf: GGUFFile, tensor: GGUFTensor) -> NDArray[np.float32]:
    dtype = "<f4" if gguf.byte_order == "little" else ">f4"
    values = np.fromfile(gguf.path, dtype=dtype, count=tensor.n_weights, offset=tensor.offset)
    return values.astype(np.float32, copy=False)


def _value(gguf: GGUFFile, name: str, kind: type, default: Any) -> Any:
    """A key's value; the default where it is missing or of another type."""
    value = gguf.value(name) if name in gguf.keys else default
    return value if isinstance(value, kind) else default


def _read_legacy(path: Path) -> ImportanceMatrix:
    with open(path, "rb") as file:
        return _read_legacy_from(file, path, os.fstat(file.fileno()).st_size)


def _read_legacy_from(file: BinaryIO, path: Path, file_bytes: int) -> ImportanceMatrix:
    def take(n: int) -> bytes:
        position = file.tell()
        if not 0 <= n <= file_bytes - position:
            raise GGUFError(
                f"{path}: not an importance matrix, or truncated",
                expected="the output of llama-imatrix",
                found=f"a length of {n:,} at byte {position:,} of {file_bytes:,}",
            )
        return file.read(n)

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    entries: dict[str, Entry] = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        n_calls, n_values = number(), number()
        sums = np.frombuffer(take(4 * n_values), dtype="<f4").astype(np.float32).reshape(1, -1)
        entries[name] = Entry(sums, np.array([max(n_calls, 1)], np.float32))
    if not entries:
        raise GGUFError(f"{path}: an importance matrix without entries")
    n_chunks = number() if file.tell() < file_bytes else 0
    dataset = take(number()).decode("utf-8", "replace") if file.tell() < file_bytes else ""
    return ImportanceMatrix(path, entries, (dataset,) if dataset else (), n_chunks, is_legacy=True)


def write_imatrix(imatrix: ImportanceMatrix, path: str | Path, *, force: bool = False) -> None:
    """Write the GGUF form, which llama-quantize reads; entries in the order of their names.

    Exact: the bytes that llama-imatrix writes for the same values.

    Raises: OutputError.
    """
    keys = [
        KeyValue("general.type", GGUFValueType.STRING, "imatrix"),
        KeyValue(DATASETS, GGUFValueType.ARRAY, imatrix.datasets, GGUFValueType.STRING),
        KeyValue(CHUNK_COUNT, GGUFValueType.UINT32, imatrix.chunk_count),
        KeyValue(CHUNK_SIZE, GGUFValueType.UINT32, imatrix.chunk_size),
    ]
    arrays = []
    for name, entry in sorted(imatrix.entries.items()):
        arrays += [(name + SUMS, entry.sums), (name + COUNTS, entry.counts.reshape(-1, 1))]
    layout = lay_out(keys, [(name, _ggml_shape(array.shape), QType.F32) for name, array in arrays])
    with GGUFWriter(Path(path), layout, force=force) as writer:
        for slot, (_, array) in zip(layout.slots, arrays, strict=True):
            writer.write_at(slot.offset, np.ascontiguousarray(array, dtype="<f4").reshape(-1).view(np.uint8))
        writer.commit()


def _ggml_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones in front, which ggml does not write. Source: ggml_n_dims."""
    return shape[1:] if len(shape) == 2 and shape[0] == 1 else shape
