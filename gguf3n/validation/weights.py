"""Rows of a tensor as its source has them, and as a GGUF file has them: both as float32, any rows, from any thread."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from gguf3n.engines import ggml
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import GGUFTensor
from gguf3n.formats.rows import Chunk, RowReader, Stored, Values, chunks
from gguf3n.gemma3n.mapping import MappedTensor
from gguf3n.pipeline import compiled_arithmetic


@dataclass(frozen=True)
class Pair:
    """A tensor of the file and its source. The first `n_rows` of both are compared; `stored` is the file's."""

    source: MappedTensor
    found: GGUFTensor
    stored: Stored
    n_rows: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def qtype(self) -> QType:
        return self.found.qtype


class WeightReader:
    """Reads rows of both sides. Close it."""

    def __init__(self) -> None:
        self.reader = RowReader(compiled_arithmetic())
        self.fill = self.reader.fill

    def source_rows(self, tensor: MappedTensor, rows: NDArray[np.int64]) -> Values:
        """These rows of the source."""
        out = np.empty((len(rows), tensor.n_per_row), np.float32)
        first = 0
        for piece in tensor.rows:
            here = np.flatnonzero((rows >= first) & (rows < first + piece.n_rows))
            for place, row, n_rows in _runs(rows[here] - first):
                into = here[place]
                self.fill(piece, row, out[into : into + n_rows])
            first += piece.n_rows
        return out

    def source_chunks(self, tensor: MappedTensor) -> Iterator[tuple[int, Values]]:
        """All rows, some at a time, each time with the number of the first."""
        for first, chunk in tensor_chunks(tensor):
            out = np.empty((chunk.n_rows, tensor.n_per_row), np.float32)
            self.fill(chunk.rows, chunk.first, out)
            yield first, out

    def file_bytes(self, pair: Pair, first_row: int, out: NDArray[np.uint8]) -> None:
        """The bytes of consecutive rows of the file. Raises: GGUFError."""
        self.reader.copy_stored(pair.stored, first_row, out)

    def blocks(self, pair: Pair, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """These rows as they are in the file. Shapes: [n_rows, row_bytes]."""
        out = np.empty((len(rows), pair.stored.row_bytes), np.uint8)
        for place, row, n_rows in _runs(rows):
            self.file_bytes(pair, row, out[place : place + n_rows])
        return out

    def values(self, blocks: NDArray[np.uint8], pair: Pair) -> Values:
        """The float32 values of rows of the file."""
        out = np.empty((len(blocks), pair.source.n_per_row), np.float32)
        dequantize_into(blocks, pair.qtype, out)
        return out

    def close(self) -> None:
        self.reader.close()


def tensor_chunks(tensor: MappedTensor) -> Iterator[tuple[int, Chunk]]:
    """All rows of a tensor, some at a time, each time with the number of the first."""
    first = 0
    for rows in tensor.rows:
        for chunk in chunks(rows):
            yield first + chunk.first, chunk
        first += rows.n_rows


def dequantize_into(blocks: NDArray[np.uint8], qtype: QType, out: Values) -> None:
    """Dequantize rows: by llama.cpp's own function where xllamacpp has it, else by the gguf package.

    Shapes: blocks uint8[n_rows, row_bytes], out float32[n_rows, n_per_row], contiguous.
    Exact: both give the same values.
    # measured: million weights a second, four threads of an EPYC: Q4_K 2460 and 154, Q6_K 1257 and 225, IQ3_S 407
    # and 102
    """
    if qtype is QType.F32:
        out[:] = blocks.view(np.float32)
    elif _has_ggml():
        ggml.dequantize_into(blocks, qtype, out)
    elif blocks.size:
        with np.errstate(over="ignore", invalid="ignore"):  # scales that are not finite
            out[:] = dequantize(blocks, qtype)


@functools.cache
def _has_ggml() -> bool:
    try:
        ggml.library()
    except (UsageError, OSError, AttributeError):
        return False
    return True


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Consecutive rows among these: the place of the first, the first, how many."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    for start, end in itertools.pairwise([*starts.tolist(), len(rows)]):
        yield start, int(rows[start]), end - start
