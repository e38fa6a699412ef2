"""Correlations: how the input columns of a weight matrix go together, measured over a text.

    tensors   NAME.correlations float32[n_columns, width] and NAME.counts float32[1]
    keys      general.type "correlations", correlations.version 1, correlations.datasets, correlations.chunk_size

Row j holds the sums of x_j x_k over all inputs x, for the columns k of j's block: blocks of `width` columns follow each
other along the diagonal, and the last one may be narrower. Its place in a row is then zero. A width of all columns is
the whole matrix. The count is the number of inputs.

A file may be larger than the memory: it is read, added to others and written entry by entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import GGUFError, UsageError, shown
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType
from gguf3n.formats.gguf_reader import GGUFFile, open_gguf
from gguf3n.formats.gguf_writer import GGUFWriter, lay_out

Sums = NDArray[np.float32]

KIND = "correlations"
VERSION = 1
SUMS, COUNTS = ".correlations", ".counts"
VERSION_KEY, DATASETS, CHUNK_SIZE = f"{KIND}.version", f"{KIND}.datasets", f"{KIND}.chunk_size"

BLOCK = 256
"""Columns of a block: those of a super-block, whose codes are chosen together."""

DAMPING = np.float32(0.01)
"""Of its own diagonal, added to a matrix. Why: of few inputs, it has directions that count for nothing, and sums of
float32 are not exact."""


@dataclass(frozen=True)
class Entry:
    """One matrix's inputs: how many columns, the width of a block, how many inputs were summed."""

    n_columns: int
    width: int
    count: float

    @property
    def is_whole(self) -> bool:
        return self.width == self.n_columns


@dataclass(frozen=True)
class Correlations:
    """A whole file, or what is to be one.

    Args:
        read: the sums of an entry, by its name. Shapes: float32[n_columns, width].
    """

    path: Path
    entries: Mapping[str, Entry]
    read: Callable[[str], Sums]
    datasets: tuple[str, ...] = ()
    chunk_size: int = 0

    @property
    def n_chunks(self) -> int:
        """Chunks that every matrix has seen; 0 where the file does not say how long a chunk is."""
        least = min((entry.count for entry in self.entries.values()), default=0)
        return int(least) // self.chunk_size if self.chunk_size else 0

    @property
    def largest_bytes(self) -> int:
        """Of the largest entry."""
        return max((4 * entry.n_columns * entry.width for entry in self.entries.values()), default=0)

    @property
    def total_bytes(self) -> int:
        """Of all entries."""
        return sum(4 * entry.n_columns * entry.width for entry in self.entries.values())

    def matrix(self, name: str) -> Sums:
        """E[x x^T] of an entry, with DAMPING of its own diagonal added. Shapes: float32[n_columns, width].

        Raises: GGUFError for sums that no inputs can give.
        """
        sums = self.read(name)
        problem = impossible(sums)
        if problem:
            raise GGUFError(
                f"{self.path}: entry {name!r}: {problem}",
                expected="sums of products of inputs",
                fix="measure the correlations again",
            )
        found: Sums = sums / np.float32(self.entries[name].count)
        columns = np.arange(len(found))
        found[columns, columns % found.shape[1]] *= 1 + DAMPING
        return found


def impossible(sums: Sums) -> str:
    """Why no inputs give these sums, or nothing.

    Why blocks: of a whole matrix the diagonal blocks are looked at, as the rest would take minutes.
    """
    n, width = sums.shape
    if not np.isfinite(sums).all():
        return "values that are not finite"
    for start in range(0, n, BLOCK):
        place = start % width
        block = sums[start : start + BLOCK, place : place + min(BLOCK, n - start)].astype(np.float64)
        diagonal = block.diagonal()
        if not np.array_equal(block, block.T):
            return f"not symmetric in columns {start} to {start + len(block) - 1}"
        if (diagonal < 0).any():
            return f"a negative sum of squares in column {start + int((diagonal < 0).argmax())}"
        scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))
        unused = diagonal == 0
        if block[unused].any():
            return f"products with column {start + int(unused.argmax())}, which is always zero"
        try:
            np.linalg.cholesky(block * scale * scale[:, None] + np.diag(np.where(unused, 1, DAMPING)))
        except np.linalg.LinAlgError:
            return f"not positive semidefinite in columns {start} to {start + len(block) - 1}"
    return ""


def as_correlations(given: str | Path | Correlations | None) -> Correlations | None:
    """Correlations that are given themselves or by their file. Raises: UsageError; as `read_correlations`."""
    if given is None or isinstance(given, Correlations):
        return given
    if not isinstance(given, str | Path):
        raise UsageError("not correlations", expected="a file or Correlations", found=shown(given))
    return read_correlations(given)


def correlations_path(imatrix: Path) -> Path:
    """Where correlations go that are measured together with an importance matrix: beside it."""
    return imatrix.with_name(f"{imatrix.stem}-{KIND}.gguf")


def block_width(n_columns: int, *, whole: bool) -> int:
    """The width of an entry's blocks."""
    return n_columns if whole else min(BLOCK, n_columns)


def is_correlations(path: str | Path) -> bool:
    """Whether a GGUF file says that it holds correlations; False for what is no GGUF file."""
    try:
        return _kind(open_gguf(path, strict=False)) == KIND
    except GGUFError:
        return False


def _kind(gguf: GGUFFile) -> object:
    return gguf.value("general.type") if "general.type" in gguf.keys else None


def read_correlations(path: str | Path) -> Correlations:
    """Read what a file says of its entries; their sums are read when they are asked for.

    Raises: GGUFError for a file of another kind or version, or one that is incomplete.
    """
    path = Path(path)
    gguf = open_gguf(path)
    if _kind(gguf) != KIND:
        raise GGUFError(
            f"{path}: not correlations",
            expected=f"general.type {KIND!r}",
            found=repr(_kind(gguf)),
            fix="measure some: gguf3n imatrix SRC --text FILE --correlations",
        )
    version = gguf.value(VERSION_KEY) if VERSION_KEY in gguf.keys else None
    if version != VERSION:
        raise GGUFError(
            f"{path}: correlations of another version",
            expected=str(VERSION),
            found=str(version),
            fix="measure them again, or take the gguf3n that made them",
        )
    entries = {
        name.removesuffix(SUMS): _entry(gguf, name.removesuffix(SUMS)) for name in gguf.tensors if name.endswith(SUMS)
    }
    if not entries:
        raise GGUFError(f"{path}: correlations without entries", expected=f"tensors named …{SUMS}")
    datasets = gguf.value(DATASETS) if DATASETS in gguf.keys else []
    chunk_size = gguf.value(CHUNK_SIZE) if CHUNK_SIZE in gguf.keys else 0
    return Correlations(
        path,
        entries,
        lambda name: _values(gguf, name + SUMS).reshape(entries[name].n_columns, -1),
        tuple(map(str, datasets)) if isinstance(datasets, list) else (),
        chunk_size if isinstance(chunk_size, int) else 0,
    )


def _entry(gguf: GGUFFile, name: str) -> Entry:
    sums, counts = gguf.tensors[name + SUMS], gguf.tensors.get(name + COUNTS)
    if counts is None or {sums.qtype, counts.qtype} != {QType.F32} or counts.n_weights != 1:
        raise GGUFError(
            f"{gguf.path}: entry {name!r} is incomplete",
            expected=f"{name}{SUMS} and one count {name}{COUNTS}, in F32",
            found=", ".join(tensor for tensor in gguf.tensors if tensor.startswith(name + ".")),
        )
    n_columns, width = sums.shape if len(sums.shape) == 2 else (math.prod(sums.shape), 1)
    if width not in (n_columns, min(BLOCK, n_columns)) or not n_columns:
        raise GGUFError(
            f"{gguf.path}: entry {name!r} has blocks of {width:,} columns",
            expected=f"{min(BLOCK, n_columns):,} or {n_columns:,}, all of them",
            fix="measure the correlations again",
        )
    count = float(_values(gguf, name + COUNTS)[0])
    if not (math.isfinite(count) and count > 0):
        raise GGUFError(f"{gguf.path}: entry {name!r} has counted {count:g} inputs", expected="1 or more")
    return Entry(n_columns, width, count)


def _values(gguf: GGUFFile, name: str) -> Sums:
    dtype = "<f4" if gguf.byte_order == "little" else ">f4"
    return np.frombuffer(gguf.read(gguf.tensors[name]), dtype).astype(np.float32, copy=False)


def write_correlations(correlations: Correlations, path: str | Path, *, force: bool = False) -> None:
    """Write a file, entry by entry in the order of their names. Raises: OutputError; what reading an entry raises."""
    keys = [
        KeyValue("general.type", GGUFValueType.STRING, KIND),
        KeyValue(VERSION_KEY, GGUFValueType.UINT32, VERSION),
        KeyValue(DATASETS, GGUFValueType.ARRAY, correlations.datasets, GGUFValueType.STRING),
        KeyValue(CHUNK_SIZE, GGUFValueType.UINT32, correlations.chunk_size),
    ]
    tensors: list[tuple[str, tuple[int, ...], QType]] = []
    for name, entry in sorted(correlations.entries.items()):
        tensors += [(name + SUMS, (entry.n_columns, entry.width), QType.F32), (name + COUNTS, (1,), QType.F32)]
    layout = lay_out(keys, tensors)
    with GGUFWriter(Path(path), layout, force=force) as writer:
        for slot in layout.slots:
            values = (
                np.array([correlations.entries[slot.name.removesuffix(COUNTS)].count])
                if slot.name.endswith(COUNTS)
                else correlations.read(slot.name.removesuffix(SUMS))
            )
            writer.write_at(slot.offset, np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8))
        writer.commit()


def merge_correlations(files: Sequence[Correlations]) -> Correlations:
    """Sums and counts of several files added, as if their texts had been measured together.

    Exact: float32 additions in this order, made when an entry is read.

    Raises: UsageError: no files, or such as were made for different models, with other blocks or chunks.
    """
    if not files:
        raise UsageError("no correlations to merge", expected="one or more files", found="none")
    sizes = {each.chunk_size: each.path for each in files if each.chunk_size}
    if len(sizes) > 1:
        raise UsageError(
            "correlations that were measured with chunks of different sizes",
            expected="one --ctx for all",
            found=", ".join(f"{size} in {path}" for size, path in sizes.items()),
            fix="measure them again with the same --ctx",
        )
    entries: dict[str, Entry] = {}
    for each in files:
        for name, entry in each.entries.items():
            before = entries.get(name, Entry(entry.n_columns, entry.width, 0))
            if (before.n_columns, before.width) != (entry.n_columns, entry.width):
                raise UsageError(
                    f"{each.path}: entry {name!r} has another form than in the files before it",
                    expected=f"{before.n_columns} columns in blocks of {before.width}",
                    found=f"{entry.n_columns} in blocks of {entry.width}",
                    fix="merge only what was measured on one model, all in blocks or all whole",
                )
            entries[name] = Entry(entry.n_columns, entry.width, before.count + entry.count)

    def read(name: str) -> Sums:
        first, *others = (each for each in files if name in each.entries)
        total = first.read(name)
        for other in others:
            total = total + other.read(name)
        return total

    return Correlations(
        Path("merged"),
        entries,
        read,
        tuple(dataset for each in files for dataset in each.datasets),
        next(iter(sizes), 0),
    )
