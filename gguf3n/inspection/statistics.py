"""Statistics of every weight: of a checkpoint with all its modalities, or of a GGUF file, dequantized.

    largest, mean, std, kurtosis    of the finite weights; kurtosis is the population's, in excess of the normal's 3
    zeros                           weights that are exactly zero, of either sign
    f16 overflow                    magnitudes above 65504, which float16 has not
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
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

from gguf3n.errors import GGUFError, SourceError, UsageError
from gguf3n.formats.byte_source import is_remote
from gguf3n.formats.checkpoint import read_tensor_table
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.half import F16_MAX, F16_TINY, widened
from gguf3n.formats.hub import fetch_checkpoint, is_repo_id
from gguf3n.formats.offset_files import OffsetFiles
from gguf3n.formats.source import DTYPE_BYTES, FLOAT_DTYPES, SourceTensor
from gguf3n.inspection.network import Kind, Place, kind, place
from gguf3n.pipeline import default_threads, run_workers

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
    source: str | Path,
    *,
    revision: str | None = None,
    threads: int | None = None,
    show_progress: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """The statistics of all tensors.

    Args:
        source: a checkpoint directory, a Hub id (its weights are fetched), or a local GGUF file, also any part of a
            split one.
        revision: branch, tag or commit of a Hub id.
        show_progress: show huggingface_hub's progress bars.
        progress: called from the calling thread with bytes done and bytes in total.

    Raises: UsageError for a GGUF file on a server, of which every byte would have to be fetched; SourceError or a class
        below it, GGUFError, HubError.
    """
    origin, tensors, error = _tensors(source, revision, show_progress)
    readable, skipped = [], []
    for tensor in tensors:
        reason = _unreadable(tensor.dtype)
        if reason is None:
            readable.append(tensor)
        else:
            skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, reason))
    work = _Work(readable, error)

    def report() -> None:
        if progress is not None:
            progress(work.done_bytes, work.total_bytes)

    with closing(work.files):
        run_workers(work.loop, threads or default_threads(), work.stop, report)
    return Statistics(origin, tuple(work.results[i] for i in range(len(readable))), tuple(skipped))


def _tensors(
    source: str | Path, revision: str | None, show_progress: bool
) -> tuple[str, list[SourceTensor], type[SourceError] | type[GGUFError]]:
    """What the source is called, its tensors in network order, and the error of one that can't be read."""
    if is_repo_id(str(source)):
        fetched = fetch_checkpoint(str(source), revision, progress=show_progress)
        return fetched.repo_id, _in_order(read_tensor_table(fetched.directory).values()), SourceError
    if revision is not None:
        raise UsageError(f"--revision is for Hub ids; {source} is a local path", fix="leave --revision out")
    if is_remote(source):
        raise UsageError(
            f"{source}: statistics need every weight", expected="a local file", fix="download the file first"
        )
    if os.path.isdir(source):
        return str(source), _in_order(read_tensor_table(Path(source)).values()), SourceError
    gguf = open_gguf(source)
    if gguf.byte_order != "little":
        raise GGUFError(f"{source}: big-endian", expected="a little-endian file")
    found = [
        SourceTensor(tensor.name, tensor.qtype.name, tensor.shape, Path(gguf.parts[tensor.part].name), tensor.offset)
        for tensor in gguf.tensors.values()
    ]
    return str(source), _in_order(found), GGUFError


def _in_order(tensors: Iterable[SourceTensor]) -> list[SourceTensor]:
    return sorted(tensors, key=lambda tensor: place(tensor.name).rank)


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
class _Chunk:
    """Consecutive bytes of a tensor: whole blocks, and of a convolution whole output channels."""

    tensor: int
    number: int
    start: int
    n_bytes: int


@dataclass
class _Pending:
    """A tensor of which chunks are left."""

    n_left: int
    histogram: NDArray[np.int64] | None
    largest_sum: float = 0.0
    parts: dict[int, Part] = field(default_factory=dict)


class _Work:
    """The chunks that are left, shared by the workers, and what a worker does with one."""

    def __init__(self, tensors: Sequence[SourceTensor], error: type[SourceError] | type[GGUFError]) -> None:
        self.tensors = tensors
        self.error = error
        self.results: dict[int, TensorStatistics] = {}
        self.files = OffsetFiles("r")
        self.stop = threading.Event()
        self.done_bytes = 0
        self.total_bytes = sum(tensor.n_bytes for tensor in tensors)
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._chunks = self._cut()

    def _cut(self) -> Iterator[_Chunk]:
        for index, tensor in enumerate(self.tensors):
            block_size, block_bytes = GGML_QUANT_SIZES[QType[tensor.dtype]]
            unit = block_size
            if kind(tensor.name, tensor.shape) is Kind.CONVOLUTION:
                unit = math.prod(tensor.shape[1:])
            is_16_bit = tensor.dtype in ("BF16", "F16")
            n_units = max((HISTOGRAM_WEIGHTS if is_16_bit else FLOAT_WEIGHTS) // unit, 1)
            step = n_units * unit // block_size * block_bytes
            starts = range(0, max(tensor.n_bytes, 1), step)
            histogram = np.zeros(1 << 16, np.int64) if is_16_bit else None
            self._pending[index] = _Pending(len(starts), histogram)
            for number, start in enumerate(starts):
                yield _Chunk(index, number, start, min(step, tensor.n_bytes - start))

    def loop(self) -> None:
        """Take chunks until none is left or another worker failed."""
        while not self.stop.is_set():
            with self._lock:
                chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._look(chunk)

    def _look(self, chunk: _Chunk) -> None:
        tensor = self.tensors[chunk.tensor]
        pending = self._pending[chunk.tensor]
        raw = np.empty(chunk.n_bytes, np.uint8)
        self.files.fill(tensor.path, tensor.offset + chunk.start, raw, tensor=tensor.name, error=self.error)
        counts = part = None
        largest_sum = 0.0
        if kind(tensor.name, tensor.shape) is Kind.CONVOLUTION:
            largest_sum = _largest_sum(_values(raw, tensor.dtype).reshape(-1, math.prod(tensor.shape[1:])))
        if pending.histogram is not None:
            counts = np.bincount(raw.view("<u2"), minlength=1 << 16)
        else:
            part = Part.of(_values(raw, tensor.dtype), largest_sum=largest_sum)
        with self._lock:
            self.done_bytes += chunk.n_bytes
            pending.n_left -= 1
            if part is not None:
                pending.parts[chunk.number] = part
            if counts is not None and pending.histogram is not None:
                pending.histogram += counts
                pending.largest_sum = max(pending.largest_sum, largest_sum)
            complete = pending.n_left == 0
        if complete:
            self._finish(chunk.tensor)

    def _finish(self, index: int) -> None:
        """The statistics of a tensor of which all chunks are there; what they were made of is dropped."""
        tensor, pending = self.tensors[index], self._pending.pop(index)
        if pending.histogram is None:
            part = reduce(Part.merged, (pending.parts[number] for number in sorted(pending.parts)))
        else:
            used = np.flatnonzero(pending.histogram)
            values = _values(used.astype(np.uint16).view(np.uint8), tensor.dtype)
            part = Part.of(values, pending.histogram[used], pending.largest_sum)
        self.results[index] = TensorStatistics(
            tensor.name, tensor.dtype, tensor.shape, place(tensor.name), kind(tensor.name, tensor.shape), part
        )


def _values(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """The float32 values of whole blocks."""
    if dtype in FLOAT_DTYPES:
        return widened(raw, dtype)
    with np.errstate(all="ignore"):  # scales that are not finite
        values: NDArray[np.float32] = dequantize(raw.reshape(1, -1), QType[dtype]).reshape(-1)
    return values


def _largest_sum(channels: NDArray[np.float32]) -> float:
    """The largest sum of the magnitudes of a channel's finite weights. Shapes: [n_channels, weights of one]."""
    magnitudes = np.abs(channels, dtype=np.float64)
    if not np.isfinite(magnitudes).all():
        magnitudes[~np.isfinite(magnitudes)] = 0
    return float(magnitudes.sum(axis=1).max(initial=0.0))
