"""Runs plans: each row range is read once, widened once, quantized for every output, written to its place.

Outputs meet at the rows that they want, not at a tensor's number: what several of them want of a source is read once
for all, whatever plans they belong to, and where they want it in the same type with the same importances it is
quantized once too.

A worker takes the next chunk of rows, reads it, converts it and writes it to all files by itself. Nothing waits for
anything else, no queue stands between stages and no order is needed, so a slow read holds up one worker only and there
is nothing to deadlock. Memory is a few buffers a worker, whatever the size of the model. Bytes depend neither on the
number of workers nor on the chunk size: a quantizer never looks beyond a row.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import Interrupted, QuantizationError
from gguf3n.formats.gguf_layout import QType, row_bytes
from gguf3n.formats.gguf_writer import GGUFWriter, Sink
from gguf3n.formats.rows import CHUNK_WEIGHTS, Arithmetic, Chunk, RowReader, Rows, Values, chunks, dequantize_into
from gguf3n.planning import Plan, PlannedTensor
from gguf3n.progress import Meter, OnProgress
from gguf3n.workers import default_threads, run_workers


def compiled_arithmetic() -> Arithmetic:
    """The same by compiled code. numba is loaded here: only when there is something to read."""
    from gguf3n.quants import floats, products

    def widen(dtype: str, raw: NDArray[np.uint8], out: Values) -> float:
        match dtype:
            case "BF16":
                return float(floats.bf16_to_f32(raw.view(np.uint16), out))
            case "F16":
                return float(floats.f16_to_f32(raw.view(np.uint16), out))
            case "F32":
                out[:] = raw.view(np.float32)
            case _:
                dequantize_into(raw, QType[dtype], out)  # what is not finite is found below
        return float(floats.largest_magnitude(out))

    def add_product(rows: Values, a: Values, b: Values, scale: float) -> float:
        products.add_product(rows, a, b, scale)
        return float(floats.largest_magnitude(rows.reshape(-1)))

    def set_lengths(rows: Values, lengths: Values) -> float:
        products.set_lengths(rows, np.ascontiguousarray(lengths))
        return float(floats.largest_magnitude(rows.reshape(-1)))

    return Arithmetic(widen, add_product, set_lengths)


def run(
    outputs: Sequence[tuple[Plan, Path]],
    *,
    threads: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
    chunk_weights: int = CHUNK_WEIGHTS,
    sink: Callable[..., Sink] = GGUFWriter,
) -> None:
    """Write every plan's file from one read of the sources.

    Args:
        outputs: plans, and the final names of their files.
        threads: workers; see default_threads.
        force: replace files that exist.
        progress: called from the calling thread, in bytes of the source.
        sink: what takes a file's data; made as a GGUFWriter is.

    Raises: QuantizationError for a value that is not finite; CheckpointError, OutputError; Interrupted on Ctrl-C. No
        file stands under its final name unless all are complete.
    """
    from gguf3n.quants.api import quantize_rows
    from gguf3n.quants.refinement import refine_rows

    arithmetic = compiled_arithmetic()  # before there are files: while Python loads modules it can lose an interrupt
    stop = threading.Event()
    try:
        with ExitStack() as stack:
            opened = [(plan, stack.enter_context(sink(path, plan.layout, force=force))) for plan, path in outputs]
            work = _Work(opened, RowReader(arithmetic), quantize_rows, refine_rows, stop, progress, chunk_weights)
            stack.callback(work.reader.close)
            run_workers(work.loop, threads or default_threads(), stop, work.meter.report)
            work.reader.check_unchanged()
            for _, writer in opened:
                writer.commit()
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None


@dataclass(frozen=True)
class _Place:
    """Where rows go: from `offset` on in one file."""

    writer: Sink
    offset: int


@dataclass
class _Wanted:
    """Rows in one type with the same importances, refined alike, and everywhere they go. `planned` is the first that
    wants them."""

    planned: PlannedTensor
    places: list[_Place]


def _meet(outputs: Sequence[tuple[Plan, Sink]]) -> dict[Rows, list[_Wanted]]:
    """What the outputs want of each row range, in the order in which they name them."""
    wanted: dict[Rows, dict[tuple[QType, int, int], _Wanted]] = {}
    for plan, writer in outputs:
        for planned in plan.tensors:
            slot = planned.slot
            n_row_bytes = row_bytes(slot.qtype, planned.source.n_per_row)
            offset = slot.offset
            for rows in planned.source.rows:
                kinds = wanted.setdefault(rows, {})
                key = (slot.qtype, id(planned.quant_weights), id(planned.refinement))
                kind = kinds.setdefault(key, _Wanted(planned, []))
                kind.places.append(_Place(writer, offset))
                offset += rows.n_rows * n_row_bytes
    return {rows: list(kinds.values()) for rows, kinds in wanted.items()}


class _Work:
    """The chunks that are left, shared by the workers, and what a worker does with one."""

    def __init__(
        self,
        outputs: Sequence[tuple[Plan, Sink]],
        reader: RowReader,
        quantize_rows: Callable[..., bool],
        refine_rows: Callable[..., None],
        stop: threading.Event,
        progress: OnProgress | None,
        chunk_weights: int,
    ) -> None:
        self.wanted = _meet(outputs)
        self.stop = stop
        self.meter = Meter("writing", "bytes", sum(rows.stored_bytes for rows in self.wanted), progress)
        self.reader = reader
        self.quantize_rows = quantize_rows
        self.refine_rows = refine_rows
        self.chunks: Iterator[Chunk] = (chunk for rows in self.wanted for chunk in chunks(rows, chunk_weights))
        self.lock = threading.Lock()
        self.largest = max((chunk_weights, *(rows.n_per_row for rows in self.wanted)))

    def loop(self) -> None:
        """Take chunks until none is left, another worker failed, or the run was interrupted."""
        values = np.empty(self.largest, np.float32)
        blocks = np.empty(4 * self.largest, np.uint8)
        while not self.stop.is_set():
            with self.lock:
                chunk = next(self.chunks, None)
            if chunk is None:
                return
            self.convert(chunk, values, blocks)
            self.meter.add(chunk.stored_bytes)

    def convert(self, chunk: Chunk, values: Values, blocks: NDArray[np.uint8]) -> None:
        """Read, quantize and write one chunk."""
        rows = chunk.rows
        values = values[: chunk.n_weights].reshape(chunk.n_rows, rows.n_per_row)
        raw = self.reader.read_raw(rows, chunk.first, chunk.n_rows)  # what an output of the same type gets
        if raw is None:
            largest = self.reader.fill(rows, chunk.first, values)
        else:
            (dtype,) = rows.dtypes
            largest = self.reader.arithmetic.widen(dtype, raw, values.reshape(-1))
        if not math.isfinite(largest):
            raise _not_finite(chunk, values)
        for wanted in self.wanted[rows]:
            qtype = wanted.planned.slot.qtype
            n_row_bytes = row_bytes(qtype, rows.n_per_row)
            if raw is not None and rows.dtypes == {qtype.name}:
                out = raw
            else:
                out = blocks[: chunk.n_rows * n_row_bytes]
                self.quantize(values, largest, wanted.planned, out.reshape(chunk.n_rows, n_row_bytes))
            for place in wanted.places:
                place.writer.write_at(place.offset + chunk.first * n_row_bytes, out)

    def quantize(self, rows: Values, largest: float, planned: PlannedTensor, out: NDArray[np.uint8]) -> None:
        qtype = planned.slot.qtype
        if not self.quantize_rows(rows, qtype, planned.quant_weights, out, largest):
            raise QuantizationError(
                f"tensor {planned.slot.name!r} does not fit {qtype.name}",
                expected="magnitudes that half precision holds, at most 65504",
                found=f"a weight of magnitude {largest:g}",
                fix=planned.wider,
            )
        if planned.refinement is not None:
            self.refine_rows(rows, qtype, planned.refinement.correlations(planned.slot.name), out)


def _not_finite(chunk: Chunk, values: Values) -> QuantizationError:
    row, column = divmod(int(np.argmin(np.isfinite(values))), chunk.rows.n_per_row)
    return QuantizationError(
        f"{chunk.rows.origin} has a weight that is not finite",
        expected="finite weights",
        found=f"{values[row, column]} in row {chunk.first + row}, column {column}",
        fix="the checkpoint is damaged: download it again, or save an earlier state of the training",
    )
