"""Statistics of every weight: of a checkpoint with all its modalities, or of a GGUF file, dequantized.

    largest, mean, std, kurtosis    of the finite weights; kurtosis is the population's, in excess of the normal's 3
    zeros                           weights that are exactly zero, of either sign
    f16 overflow                    magnitudes above 65504, the largest float16
    f16 zero                        weights other than zero, of 2^-25 or less, that float16 rounds to zero
    f16 subnormal                   weights between that and 2^-14, which float16 keeps as multiples of 2^-24 only
    largest sum                     of a convolution: see `Risk`

A 16-bit type has 65,536 values, so a tensor of one is its histogram, and all else follows from that exactly. Other
tensors are taken a chunk at a time: the moments of a chunk about its own mean, in float64, then merged in the order of
the chunks. Neither depends on the number of threads. Memory is a few chunks a thread, whatever the size of the model.

Source: T. Chan, G. Golub, R. LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979;
P. Pébay, Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical moments,
SAND2008-6212, 2008, for the third and fourth moments.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

from gguf3n.errors import UsageError
from gguf3n.formats.byte_source import is_remote
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.half import F16_MAX, F16_TINY
from gguf3n.formats.hub import is_repo_id
from gguf3n.formats.rows import DTYPE_BYTES, FLOAT_DTYPES, Chunk, RowReader, SourceTensor, Stored
from gguf3n.gemma3n.source import Source, open_source
from gguf3n.inspection.network import Kind, Place, kind, place
from gguf3n.progress import Meter, OnProgress
from gguf3n.workers import check_threads, default_threads, run_workers

HISTOGRAM_WEIGHTS = 1 << 18
"""Of one chunk of a 16-bit type.

# measured: BF16, million weights a second, one core (AMD EPYC, 2026-11-21): 2^16 160, 2^18 740, 2^20 750, 2^22 470
"""
FLOAT_WEIGHTS = 1 << 16
"""Of one chunk of any other type.

# measured: float32, likewise: 2^14 290, 2^16 370, 2^17 390, 2^18 52, where every temporary array is of fresh pages
"""

F16_ZERO = np.float32(2.0**-25)
"""Half of the smallest float16; it and what is smaller becomes zero."""

ACTIVATION_MAX = 1024.0
"""Why: a convolution that keeps the size of its input has weights of 1/sqrt(n), n to a sum, so sums of magnitudes of
0.8 sqrt(n); the longest of the vision tower, 3,840, of 49, and 49 times 1,024 is below 65,504. What is listed is larger
than that; and a norm gives 1,024 at most with sqrt(3,840) = 62 in one channel and a weight of 16."""


@dataclass(frozen=True)
class Moments:
    """Count, mean, and the sums of the second, third and fourth powers of the distances from the mean."""

    n: int
    mean: float
    m2: float
    m3: float
    m4: float

    @classmethod
    def of(cls, values: NDArray[np.float64], counts: NDArray[np.int64] | None = None) -> Moments:
        """Of finite values, each as often as `counts` says."""
        n = len(values) if counts is None else int(counts.sum())
        if n == 0:
            return cls(0, 0.0, 0.0, 0.0, 0.0)

        def total(terms: NDArray[np.float64]) -> float:
            return float((terms if counts is None else terms * counts).sum())

        mean = total(values) / n
        distances = values - mean
        squares = distances * distances
        return cls(n, mean, total(squares), total(squares * distances), total(squares * squares))

    def merged(self, other: Moments) -> Moments:
        """Of both together. Source: Pébay, equations 3.1 (for mean and m2: Chan et al.)."""
        if not self.n or not other.n:
            return self if self.n else other
        a, b = self.n, other.n
        n = a + b
        delta = other.mean - self.mean
        mean = self.mean + delta * b / n
        m2 = self.m2 + other.m2 + delta**2 * a * b / n
        m3 = self.m3 + other.m3 + delta**3 * a * b * (a - b) / n**2 + 3 * delta * (a * other.m2 - b * self.m2) / n
        m4 = (
            self.m4
            + other.m4
            + delta**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * delta**2 * (a * a * other.m2 + b * b * self.m2) / n**2
            + 4 * delta * (a * other.m3 - b * self.m3) / n
        )
        return Moments(n, mean, m2, m3, m4)


@dataclass(frozen=True)
class Part:
    """What is known of some weights of a tensor; all but `n_nan` and `n_infinite` is of the finite ones."""

    moments: Moments
    minimum: float = math.inf
    maximum: float = -math.inf
    n_nan: int = 0
    n_infinite: int = 0
    n_zero: int = 0
    f16_overflow: int = 0
    f16_zero: int = 0
    f16_subnormal: int = 0
    largest_sum: float = 0.0

    @classmethod
    def of(cls, values: NDArray[np.float32], counts: NDArray[np.int64] | None = None, largest_sum: float = 0.0) -> Part:
        """Of values, each as often as `counts` says."""

        def count(which: NDArray[np.bool_]) -> int:
            return int(np.count_nonzero(which) if counts is None else counts[which].sum())

        finite = np.isfinite(values)
        n_nan = n_infinite = 0
        if not finite.all():
            n_nan, n_infinite = count(np.isnan(values)), count(np.isinf(values))
            values = values[finite]
            counts = None if counts is None else counts[finite]
        magnitudes = np.abs(values)
        n_zero, n_to_zero = count(magnitudes == 0), count(magnitudes <= F16_ZERO)
        return cls(
            Moments.of(values.astype(np.float64), counts),
            float(values.min(initial=np.float32(np.inf))),
            float(values.max(initial=np.float32(-np.inf))),
            n_nan,
            n_infinite,
            n_zero,
            count(magnitudes > F16_MAX),
            n_to_zero - n_zero,
            count(magnitudes < F16_TINY) - n_to_zero,
            largest_sum,
        )

    def merged(self, other: Part) -> Part:
        """Of both together."""
        return Part(
            self.moments.merged(other.moments),
            min(self.minimum, other.minimum),
            max(self.maximum, other.maximum),
            self.n_nan + other.n_nan,
            self.n_infinite + other.n_infinite,
            self.n_zero + other.n_zero,
            self.f16_overflow + other.f16_overflow,
            self.f16_zero + other.f16_zero,
            self.f16_subnormal + other.f16_subnormal,
            max(self.largest_sum, other.largest_sum),
        )


@dataclass(frozen=True)
class TensorStatistics:
    """The statistics of one tensor; `mean`, `std` and the rest are None where it has no finite weight.

    Shapes: `shape` in numpy order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: Place
    kind: Kind
    part: Part

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def largest(self) -> float | None:
        """The maximum magnitude."""
        return max(-self.part.minimum, self.part.maximum) if self.part.moments.n else None

    @property
    def mean(self) -> float | None:
        return self.part.moments.mean if self.part.moments.n else None

    @property
    def std(self) -> float | None:
        """The population's standard deviation."""
        moments = self.part.moments
        return math.sqrt(moments.m2 / moments.n) if moments.n else None

    @property
    def kurtosis(self) -> float | None:
        """The population's, in excess of the normal distribution's; None where all weights are equal.

        Why: of equal weights m2 is exactly zero, as 24 bits times the count of a chunk fit into a float64.
        """
        moments = self.part.moments
        return moments.n * moments.m4 / moments.m2**2 - 3 if moments.m2 else None

    def share(self, n: int) -> float:
        """Of all weights."""
        return n / max(self.n_weights, 1)


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not read, and why."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Statistics:
    """The statistics of a model; `tensors` in network order."""

    origin: str
    tensors: tuple[TensorStatistics, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Risk:
    """A convolution in float16. `tensor.part.largest_sum` is the largest sum of the magnitudes of an output channel's
    weights: with activations of magnitude a, a sum is at most a times it, and is that for activations of the right
    signs. Below `activation`, no sum and no part of one exceeds 65504; at it, one can.

    Why: biases are left out (only the stem has one), and so is what rounding adds.
    """

    tensor: TensorStatistics

    @property
    def activation(self) -> float:
        """The magnitude at which a sum can exceed float16."""
        largest_sum = self.tensor.part.largest_sum
        return F16_MAX / largest_sum if largest_sum else math.inf


def f16_risks(statistics: Statistics) -> list[Risk]:
    """All convolutions, the first to overflow first."""
    risks = [Risk(tensor) for tensor in statistics.tensors if tensor.kind is Kind.CONVOLUTION]
    return sorted(risks, key=lambda risk: risk.activation)


def measure_statistics(
    source: str | Path | Source,
    *,
    revision: str | None = None,
    threads: int | None = None,
    show_progress: bool = False,
    progress: OnProgress | None = None,
) -> Statistics:
    """The statistics of all tensors.

    Args:
        source: a checkpoint directory, a Hub id (its weights are fetched), a local GGUF file, also any part of a split
            one, or a Source.
        revision: branch, tag or commit of a Hub id.
        show_progress: show huggingface_hub's progress bars.
        progress: called from the calling thread, in bytes.

    Raises: UsageError for a GGUF file on a server, of which every byte would have to be fetched; SourceError or a class
        below it, GGUFError, HubError.
    """
    if isinstance(source, str) and is_remote(source) and not is_repo_id(source):
        raise UsageError(
            f"{source}: statistics need every weight", expected="a local file", fix="download the file first"
        )
    check_threads(threads)
    opened = open_source(source, revision=revision, show_progress=show_progress)
    readable, skipped = [], []
    for tensor in sorted(opened.tensors.values(), key=lambda tensor: place(tensor.name).rank):
        reasons = [reason for dtype in sorted(tensor.dtypes) if (reason := _unreadable(dtype)) is not None]
        if reasons:
            skipped.append(Skipped(tensor.name, _dtype(tensor), tensor.shape, reasons[0]))
        else:
            readable.append(tensor)
    work = _Work(readable, progress)
    with closing(work.reader):
        run_workers(work.loop, threads or default_threads(), work.stop, work.meter.report)
    return Statistics(opened.origin, tuple(work.results[i] for i in range(len(readable))), tuple(skipped))


def _dtype(tensor: SourceTensor) -> str:
    return ", ".join(sorted(tensor.dtypes))


def _unreadable(dtype: str) -> str | None:
    """Why the values of a type can't be read; None where they can."""
    if dtype in FLOAT_DTYPES:
        return None
    if dtype == "BOOL" or (dtype[0] in "IU" and dtype[1:].isdecimal()):
        return "integers: packed weights, or indices"
    if dtype in DTYPE_BYTES:
        return f"neither {', '.join(FLOAT_DTYPES[:-1])} nor {FLOAT_DTYPES[-1]}"
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[QType[dtype]][1]), np.uint8), QType[dtype])
    except NotImplementedError:
        return "a type that can't be dequantized here"
    return None


@dataclass(frozen=True)
class _Part:
    """Some rows of a tensor, by its number and theirs. `channel_rows` make up an output channel of a convolution."""

    tensor: int
    number: int
    chunk: Chunk
    channel_rows: int | None


@dataclass
class _Pending:
    """A tensor of which parts are left."""

    n_left: int
    histogram: NDArray[np.int64] | None
    largest_sum: float = 0.0
    parts: dict[int, Part] = field(default_factory=dict)


class _Work:
    """The parts that are left, shared by the workers, and what a worker does with one."""

    def __init__(self, tensors: Sequence[SourceTensor], progress: OnProgress | None) -> None:
        self.tensors = tensors
        self.results: dict[int, TensorStatistics] = {}
        self.reader = RowReader()
        self.stop = threading.Event()
        n_bytes = sum(rows.stored_bytes for tensor in tensors for rows in tensor.rows)
        self.meter = Meter("reading tensors", "bytes", n_bytes, progress)
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._parts = self._cut()

    def _cut(self) -> Iterator[_Part]:
        for index, tensor in enumerate(self.tensors):
            is_histogram = tensor.dtypes in ({"BF16"}, {"F16"}) and all(
                isinstance(rows, Stored) for rows in tensor.rows
            )
            n_weights = HISTOGRAM_WEIGHTS if is_histogram else FLOAT_WEIGHTS
            is_convolution = kind(tensor.name, tensor.shape) is Kind.CONVOLUTION
            parts = []
            for rows in tensor.rows:
                channel_rows = math.prod(tensor.shape[1:-1]) if is_convolution else None
                if isinstance(rows, Stored):  # its rows are of whatever length is best
                    unit = math.prod(tensor.shape[1:]) if is_convolution else GGML_QUANT_SIZES[QType[rows.dtype]][0]
                    rows, channel_rows = rows.in_rows_of(max(unit, 1)), 1 if is_convolution else None
                step = max(n_weights // max(rows.n_per_row, 1), channel_rows or 1)
                step -= step % (channel_rows or 1)
                starts = range(0, max(rows.n_rows, 1), step)
                parts += [(Chunk(rows, start, min(step, rows.n_rows - start)), channel_rows) for start in starts]
            histogram = np.zeros(1 << 16, np.int64) if is_histogram else None
            self._pending[index] = _Pending(len(parts), histogram)
            for number, (chunk, channel_rows) in enumerate(parts):
                yield _Part(index, number, chunk, channel_rows)

    def loop(self) -> None:
        """Take parts until none is left or another worker failed."""
        while not self.stop.is_set():
            with self._lock:
                part = next(self._parts, None)
            if part is None:
                return
            self._look(part)

    def _look(self, work: _Part) -> None:
        chunk = work.chunk
        pending = self._pending[work.tensor]
        counts = part = None
        largest_sum = 0.0
        values = np.empty((chunk.n_rows, chunk.rows.n_per_row), np.float32)
        if pending.histogram is not None and isinstance(chunk.rows, Stored):
            raw = self.reader.read_stored(chunk.rows, chunk.first, chunk.n_rows)
            counts = np.bincount(raw.view("<u2"), minlength=1 << 16)
            if work.channel_rows is not None:
                self.reader.arithmetic.widen(chunk.rows.dtype, raw, values.reshape(-1))
        else:
            self.reader.fill(chunk.rows, chunk.first, values)
        if work.channel_rows is not None:
            largest_sum = _largest_sum(values.reshape(chunk.n_rows // work.channel_rows, -1))
        if counts is None:
            part = Part.of(values.reshape(-1), largest_sum=largest_sum)
        self.meter.add(chunk.stored_bytes if chunk.rows.n_rows else 0)
        with self._lock:
            pending.n_left -= 1
            if part is not None:
                pending.parts[work.number] = part
            if counts is not None and pending.histogram is not None:
                pending.histogram += counts
                pending.largest_sum = max(pending.largest_sum, largest_sum)
            complete = pending.n_left == 0
        if complete:
            self._finish(work.tensor)

    def _finish(self, index: int) -> None:
        """The statistics of a tensor of which all parts are there; what they were made of is dropped."""
        tensor, pending = self.tensors[index], self._pending.pop(index)
        if pending.histogram is None:
            part = reduce(Part.merged, (pending.parts[number] for number in sorted(pending.parts)))
        else:
            used = np.flatnonzero(pending.histogram)
            values = np.empty(len(used), np.float32)
            self.reader.arithmetic.widen(_dtype(tensor), used.astype("<u2").view(np.uint8), values)
            part = Part.of(values, pending.histogram[used], pending.largest_sum)
        self.results[index] = TensorStatistics(
            tensor.name, _dtype(tensor), tensor.shape, place(tensor.name), kind(tensor.name, tensor.shape), part
        )


def _largest_sum(channels: NDArray[np.float32]) -> float:
    """The largest sum of the magnitudes of a channel's finite weights. Shapes: [n_channels, weights of one]."""
    magnitudes = np.abs(channels, dtype=np.float64)
    if not np.isfinite(magnitudes).all():
        magnitudes[~np.isfinite(magnitudes)] = 0
    return float(magnitudes.sum(axis=1).max(initial=0.0))
