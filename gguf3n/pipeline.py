"""Runs plans: each row range is read once, widened once, quantized for every output, written to its place.

A worker takes the next chunk of rows, reads it, converts it and writes it to all files by itself. Nothing waits for
anything else, no queue stands between stages and no order is needed, so a slow read holds up one worker only and there
is nothing to deadlock. Memory is a few buffers a worker, whatever the size of the model. Bytes depend neither on the
number of workers nor on the chunk size: a quantizer never looks beyond a row.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.quants import dequantize

from gguf3n.errors import CheckpointError, Interrupted, QuantizationError
from gguf3n.formats.gguf_layout import QType, row_bytes
from gguf3n.formats.gguf_writer import GGUFWriter
from gguf3n.formats.offset_files import OffsetFiles
from gguf3n.formats.source import SourceTensor
from gguf3n.gemma3n.tensors import MappedTensor
from gguf3n.planning import Plan, PlannedTensor

CHUNK_WEIGHTS = 1 << 18
"""# measured: see scripts/bench_convert.py; source, float32 and blocks of a chunk fit a core's second-level cache."""

ROW_GROUP = 16
"""Quantizers work on this many rows at once, so chunks are whole groups where they can be."""

PROGRESS_SECONDS = 0.1


@dataclass(frozen=True)
class Progress:
    """How far a run is. Units: bytes of source data, seconds since the start."""

    done_bytes: int
    total_bytes: int
    seconds: float


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one output tensor that come from one place.

    `first_row` counts rows of the output, `source_row` rows of the source tensor; `source` is None for zeros.
    """

    tensor: int
    first_row: int
    n_rows: int
    source: SourceTensor | None
    source_row: int


def processors() -> int:
    """Those that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1


def default_threads() -> int:
    """One a processor, and two more that work while others wait for the disk.

    # measured: E2B to Q8_0 with nothing cached, 2 processors: 15.8 s with 2 workers, 14.7 s with 4 (means of 2)
    """
    return processors() + 2


def chunks(plan: Plan, chunk_weights: int = CHUNK_WEIGHTS) -> Iterator[Chunk]:
    """Cut all tensors of a plan into chunks of whole rows."""
    return cut([planned.source for planned in plan.tensors], chunk_weights)


def cut(tensors: Iterable[MappedTensor], chunk_weights: int = CHUNK_WEIGHTS) -> Iterator[Chunk]:
    """Cut tensors into chunks of whole rows."""
    for index, tensor in enumerate(tensors):
        step = max(1, chunk_weights // tensor.n_per_row)
        if step > ROW_GROUP:
            step -= step % ROW_GROUP
        first_row = 0
        for rows in tensor.rows:
            for source_row in range(0, rows.n_rows, step):
                n_rows = min(step, rows.n_rows - source_row)
                yield Chunk(index, first_row, n_rows, rows.source, source_row)
                first_row += n_rows


class SourceReader:
    """Reads rows of source tensors as float32; one for all threads."""

    def __init__(self) -> None:
        from gguf3n.quants import floats  # numba: only when there is something to convert

        self.floats = floats
        self.files = OffsetFiles("r")

    def read(self, source: SourceTensor, first_row: int, raw: np.ndarray) -> None:
        """Fill a buffer with the bytes of consecutive rows. Raises: CheckpointError."""
        offset = source.offset + first_row * source.row_bytes
        self.files.fill(source.path, offset, raw, tensor=source.name, error=CheckpointError)

    def widen(self, dtype: str, raw: np.ndarray, values: np.ndarray) -> float:
        """Source bytes to float32; the largest magnitude, infinite or NaN where a value is not finite."""
        match dtype:
            case "BF16":
                return float(self.floats.bf16_to_f32(raw.view(np.uint16), values))
            case "F16":
                return float(self.floats.f16_to_f32(raw.view(np.uint16), values))
            case "F32":
                values[:] = raw.view(np.float32)
            case _:
                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found below
                    values[:] = dequantize(raw, QType[dtype])
        return float(self.floats.largest_magnitude(values))

    def close(self) -> None:
        self.files.close()


def run(
    outputs: Sequence[tuple[Plan, Path]],
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
    chunk_weights: int = CHUNK_WEIGHTS,
) -> None:
    """Write every plan's file from one read of the source.

    Args:
        outputs: plans of the same model, and the final names of their files.
        threads: workers; see default_threads.
        force: replace files that exist.
        progress: called from the calling thread about ten times a second, and at the end.

    Raises: QuantizationError for a value that is not finite; CheckpointError, OutputError; Interrupted on Ctrl-C. No
        file stands under its final name unless all are complete.
    """
    plans = [plan for plan, _ in outputs]
    started = time.monotonic()
    stop = threading.Event()
    try:
        with ExitStack() as stack:
            writers = [stack.enter_context(GGUFWriter(path, plan.layout, force=force)) for plan, path in outputs]
            work = _Work(plans, writers, stop, chunk_weights)
            stack.callback(work.close)

            def report() -> None:
                if progress is not None:
                    progress(Progress(work.done_bytes, work.total_bytes, time.monotonic() - started))

            run_workers(work.loop, threads or default_threads(), stop, report)
            for writer in writers:
                writer.commit()
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None


def run_workers(loop: Callable[[], None], threads: int, stop: threading.Event, report: Callable[[], None]) -> None:
    """Run a loop in each of some threads until all have ended or one has failed.

    Args:
        stop: set when it is over, however it ends; loops look at it.
        report: called from the calling thread about ten times a second, and at the end.

    Raises: what a loop raises; KeyboardInterrupt.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="gguf3n") as pool:
        try:
            pending = {pool.submit(loop) for _ in range(threads)}
            while pending:
                done, pending = wait(pending, timeout=PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
                for worker in done:
                    worker.result()
                report()
        finally:
            stop.set()  # before the pool waits for its workers


class _Work:
    """The chunks that are left, shared by the workers, and what a worker does with one."""

    def __init__(
        self, plans: Sequence[Plan], writers: Sequence[GGUFWriter], stop: threading.Event, chunk_weights: int
    ) -> None:
        from gguf3n.quants.api import quantize_rows

        self.plans = plans
        self.writers = writers
        self.stop = stop
        self.reader = SourceReader()
        self.chunks = chunks(plans[0], chunk_weights)
        self.lock = threading.Lock()
        self.done_bytes = 0
        self.total_bytes = _source_bytes(plans[0])
        self.quantize_rows = quantize_rows
        self.largest = max(max(chunk_weights, tensor.source.n_per_row) for plan in plans for tensor in plan.tensors)

    def loop(self) -> None:
        """Take chunks until none is left, another worker failed, or the run was interrupted."""
        values = np.empty(self.largest, np.float32)
        raw = np.empty(4 * self.largest, np.uint8)
        blocks = np.empty(4 * self.largest, np.uint8)
        while not self.stop.is_set():
            with self.lock:
                chunk = next(self.chunks, None)
            if chunk is None:
                return
            n_bytes = self.convert(chunk, raw, values, blocks)
            with self.lock:
                self.done_bytes += n_bytes

    def convert(self, chunk: Chunk, raw: np.ndarray, values: np.ndarray, blocks: np.ndarray) -> int:
        """Read, quantize and write one chunk; returns the bytes read."""
        tensor = self.plans[0].tensors[chunk.tensor].source
        n_weights = chunk.n_rows * tensor.n_per_row
        values = values[:n_weights]
        if chunk.source is None:
            raw = raw[:0]
            values[:] = 0
            largest = 0.0
        else:
            raw = raw[: chunk.n_rows * chunk.source.row_bytes]
            self.reader.read(chunk.source, chunk.source_row, raw)
            largest = self.reader.widen(chunk.source.dtype, raw, values)
            if not math.isfinite(largest):
                raise _not_finite(chunk, chunk.source, tensor.n_per_row, values)
        rows = values.reshape(chunk.n_rows, tensor.n_per_row)
        for plan, writer in zip(self.plans, self.writers, strict=True):
            planned = plan.tensors[chunk.tensor]
            slot = planned.slot
            n_row_bytes = row_bytes(slot.qtype, tensor.n_per_row)
            if chunk.source is not None and chunk.source.dtype == slot.qtype.name:
                out = raw
            else:
                out = blocks[: chunk.n_rows * n_row_bytes]
                self.quantize(rows, largest, planned, out.reshape(chunk.n_rows, n_row_bytes))
            writer.write_at(slot.offset + chunk.first_row * n_row_bytes, out)
        return len(raw)

    def quantize(self, rows: np.ndarray, largest: float, planned: PlannedTensor, out: np.ndarray) -> None:
        qtype = planned.slot.qtype
        if not self.quantize_rows(rows, qtype, planned.quant_weights, out, largest):
            raise QuantizationError(
                f"tensor {planned.slot.name!r} does not fit {qtype.name}",
                expected="magnitudes that half precision holds, at most 65504",
                found=f"a weight of magnitude {largest:g}",
                fix="use BF16 or F32 for this tensor",
            )

    def close(self) -> None:
        self.reader.close()


def _source_bytes(plan: Plan) -> int:
    return sum(rows.source.n_bytes for tensor in plan.tensors for rows in tensor.source.rows if rows.source is not None)


def _not_finite(chunk: Chunk, source: SourceTensor, n_per_row: int, values: np.ndarray) -> QuantizationError:
    first = int(np.argmin(np.isfinite(values)))
    row, column = divmod(first, n_per_row)
    return QuantizationError(
        f"{source.path}: tensor {source.name!r} has a weight that is not finite",
        expected="finite weights",
        found=f"{values[first]} in row {chunk.source_row + row}, column {column}",
        fix="the checkpoint is damaged: download it again, or save an earlier state of the training",
    )
