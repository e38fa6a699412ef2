"""Every tensor of a GGUF file, dequantized and held against its source, in one pass of bounded memory.

Each row's relative error is measured. Then some rows of every tensor, and those that stand out, are quantized again and
judged by what our own quantizer makes of them (see evidence and yardsticks): a file is sound where its error is that
of its type on these very weights, and where its levels are those that the source's weights round to.

    fault                                      shows in
    zeroed, foreign, shifted, damaged rows     their own errors: 1.0, 1.4, more
    another tensor, transposed, scaled         the error of the sample, many times that of requantizing
    an older version of the weights            levels that are not nearest to the source's weights
    a value where the source has none          an infinite error
"""

from __future__ import annotations

import math
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import Interrupted
from gguf3n.formats.ggml_types import Rounding
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import GGUFFile
from gguf3n.formats.rows import CHUNK_WEIGHTS, Chunk, Values
from gguf3n.gemma3n.end_of_image import MARK
from gguf3n.gemma3n.mapping import MappedTensor
from gguf3n.gemma3n.part import Part
from gguf3n.progress import Meter, OnProgress
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from gguf3n.validation.bands import BANDS, HOLDS, MARGIN, Spread, expected_error, limits
from gguf3n.validation.diagnosis import MAX_ROWS, Suspect, diagnose
from gguf3n.validation.evidence import Evidence, examine, requantize
from gguf3n.validation.result import Problem, Stage, Verdict
from gguf3n.validation.tensor_errors import TensorError, TensorsResult
from gguf3n.validation.weights import Pair, WeightReader, dequantize_into, tensor_chunks
from gguf3n.validation.yardsticks import (
    ERROR,
    FOUND,
    LARGEST,
    N_SUMS,
    PRODUCT,
    ROUNDING,
    SOURCE,
    PerRow,
    relative,
    sum_rows,
)
from gguf3n.workers import default_threads, run_workers

SAMPLE_WEIGHTS = 1 << 17
"""Of each tensor, quantized again."""
MIN_SAMPLE_ROWS = 16
MAX_SUSPECTS = 32
"""Rows that stand out, of one tensor, quantized again: the worst, and as many others."""
UNLIKE = 0.5
"""Cosine of a row that is looked at again."""
STANDS_OUT = 1.25
"""Times the largest error of requantizing a row of the sample."""
MAX_PADDING = 4096
"""Rows at the end of a table that are looked at for padding; Gemma 3n has 256."""
MAX_RANGES = 3
MAX_SEARCHED = 24
"""Tensors whose rows are searched for elsewhere. Why: that may read whole tensors; with a wrong source, all of them."""
CLEARLY_LESS = 4
"""Times fewer weights must be misplaced for a detour to explain them."""
NEARLY_ALL = 0.9
IMATRIX_KEYS = "quantize.imatrix."

ROUTES: tuple[tuple[QType, str, Verdict | None], ...] = (
    (QType.BF16, "were rounded to BF16 on the way", None),
    (QType.F16, "were rounded to F16 on the way", None),
    (QType.Q8_0, "were quantized from Q8_0, not from the source: they have lost quality twice", Verdict.WARN),
)
"""Types that a file may have been converted by way of; how bad that is."""


def check_tensors(
    gguf: GGUFFile,
    source: Part,
    *,
    threads: int | None = None,
    quant_weights: Mapping[str, NDArray[np.float32]] | None = None,
    progress: OnProgress | None = None,
) -> TensorsResult:
    """Compare every tensor of a file with its source.

    Args:
        gguf: as `open_gguf(path, strict=False)` gives it.
        quant_weights: importances that the file was quantized with, by tensor, where they are at hand: it is then
            judged as sharply as one without.
        progress: called from the calling thread, in weights.

    Raises: GGUFError for a file that can't be read; CheckpointError for such a source; Interrupted on Ctrl-C.
    """
    started = time.monotonic()
    weighted = any(name.startswith(IMATRIX_KEYS) for name in gguf.keys)
    with ExitStack() as stack:
        reader = WeightReader()
        stack.callback(reader.close)
        problems: list[Problem] = []
        notes: list[str] = []
        matched = [_match(gguf, tensor, reader, problems, notes) for tensor in source.tensors]
        pairs = [pair for pair in matched if pair is not None]
        known = {tensor.name for tensor in source.tensors}
        for name in (name for name in gguf.tensors if name not in known):
            problems.append(Problem(Verdict.FAIL, name, "the source has no such tensor"))
        judge = _Judge(reader, weighted, quant_weights or {})
        outcomes = _compare(pairs, reader, judge, threads or default_threads(), progress)
        faulty = sum(outcome.fault is not None for outcome in outcomes)
        if faulty > len(outcomes) / 2:
            what = f"{faulty} of {len(outcomes)} tensors are not the source's: was the file made from it?"
            problems.insert(0, Problem(Verdict.FAIL, gguf.path.name, what))
        problems += _faults(outcomes, judge, source.tensors)
        problems += _warnings(outcomes)
    errors = [outcome.error for outcome in outcomes if outcome.pair.source.evaluated]
    failed = {problem.where for problem in problems}
    return TensorsResult(
        problems=tuple(problems),
        seconds=time.monotonic() - started,
        errors=tuple(sorted(errors, key=lambda error: (error.name not in failed, -error.excess))),
        weighted=weighted,
        notes=(*notes, *_notes(outcomes)),
    )


# which tensors


def _match(
    gguf: GGUFFile, tensor: MappedTensor, reader: WeightReader, problems: list[Problem], notes: list[str]
) -> Pair | None:
    """A tensor with its source; None, and a problem, where they can't be compared."""
    found = gguf.tensors.get(tensor.name)
    if found is None:
        what = "missing" if tensor.evaluated else "missing; never evaluated, but llama.cpp does not load the file"
        problems.append(Problem(Verdict.FAIL, tensor.name, what))
        return None
    if found.offset + found.n_bytes > gguf.parts[found.part].n_bytes:
        problems.append(Problem(Verdict.FAIL, tensor.name, "its data ends after the file's end"))
        return None
    if found.qtype not in BANDS:
        what = f"not compared: nothing is known of the type {found.qtype.name}"
        problems.append(Problem(Verdict.WARN, tensor.name, what))
        return None
    n_rows = math.prod(found.shape[:-1])
    same = _without_ones(found.shape) == _without_ones(tensor.shape)
    is_table = tensor.name in (TOKEN_EMBD, PER_LAYER_TOKEN_EMBD) and found.shape[-1:] == tensor.shape[-1:]
    if not same and not is_table:
        what = f"shape {_times(found.shape)}, the source's is {_times(tensor.shape)}"
        problems.append(Problem(Verdict.FAIL, tensor.name, what))
        return None
    stored = gguf.stored(found)
    if not is_table:
        stored, n_rows = stored.in_rows_of(tensor.n_per_row), tensor.n_rows
    pair = Pair(tensor, found, stored, min(n_rows, tensor.n_rows))
    return _without_padding(pair, n_rows, reader, problems, notes) if is_table else pair


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _without_padding(
    pair: Pair, n_file_rows: int, reader: WeightReader, problems: list[Problem], notes: list[str]
) -> Pair:
    """Without the rows at the table's end that no token uses: zeros, or copies of the pad token's, on each side."""
    zeroth = np.zeros(1, np.int64)
    pad = reader.source_rows(pair.source, zeroth), reader.values(reader.blocks(pair, zeroth), pair)
    n_source = _unpadded(pair.source.n_rows, pad[0], lambda rows: reader.source_rows(pair.source, rows))
    n_file = _unpadded(n_file_rows, pad[1], lambda rows: reader.values(reader.blocks(pair, rows), pair))
    if n_file < n_source and pair.source.plain_rows:
        notes.append(f"{pair.name}: padding in the row of {MARK}, as llama.cpp's converter writes it")
        plain = replace(pair, source=replace(pair.source, rows=pair.source.plain_rows, plain_rows=()))
        return _without_padding(plain, n_file_rows, reader, problems, notes)
    if max(n_source, n_file) > pair.n_rows:
        less, more = ("the file", "the source") if n_source > n_file else ("the source", "the file")
        what = f"{less} has {pair.n_rows:,} rows; the {max(n_source, n_file) - pair.n_rows:,} more of {more} are in use"
        problems.append(Problem(Verdict.FAIL, pair.name, what))
        return pair
    if n_file_rows != pair.source.n_rows:
        notes.append(f"{pair.name}: {n_file_rows:,} rows, {pair.source.n_rows:,} in the source; the rest is padding")
    return replace(pair, n_rows=max(n_source, n_file))


def _unpadded(n_rows: int, pad: Values, read: Callable[[NDArray[np.int64]], Values]) -> int:
    """Rows without those at the end that are padding."""
    rows = np.arange(max(n_rows - MAX_PADDING, 1), n_rows)
    used = n_rows
    for part in reversed(np.array_split(rows, max(len(rows) // MIN_SAMPLE_ROWS, 1))):
        values = read(part)
        is_padding = ~values.any(axis=1) | (values == pad).all(axis=1)
        if not is_padding.all():
            return int(part[~is_padding][-1]) + 1
        used = int(part[0])
    return used


# one pass


@dataclass(frozen=True)
class _Outcome:
    """One tensor: how far it is, and rows that are not what they should be. `route`: of ROUTES."""

    pair: Pair
    error: TensorError
    fault: _Fault | None = None
    route: QType | None = None
    idle_columns: int = 0
    unlike_plain: bool = False


@dataclass(frozen=True)
class _Fault:
    """Rows to be diagnosed. `where` is empty for the whole tensor."""

    rows: NDArray[np.int64]
    where: str


def _compare(
    pairs: Sequence[Pair],
    reader: WeightReader,
    judge: _Judge,
    threads: int,
    progress: OnProgress | None,
) -> list[_Outcome]:
    """All tensors, in the order of the source."""
    work = _Work(pairs, reader, judge, progress)
    try:
        run_workers(work.loop, threads, work.stop, work.meter.report)
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None
    return [work.outcomes[index] for index in range(len(pairs))]


class _Work:
    """The chunks that are left, shared by the workers; who ends a tensor, judges it."""

    def __init__(self, pairs: Sequence[Pair], reader: WeightReader, judge: _Judge, progress: OnProgress | None) -> None:
        self.pairs = pairs
        self.reader = reader
        self.judge = judge
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.chunks = self._cut()
        self.sums: dict[int, NDArray[np.float64]] = {}
        self.rows_left = [pair.n_rows for pair in pairs]
        self.outcomes: dict[int, _Outcome] = {}
        n_weights = sum(pair.n_rows * pair.source.n_per_row for pair in pairs)
        self.meter = Meter(Stage.TENSORS.value, "weights", n_weights, progress)

    def _cut(self) -> Iterator[tuple[int, int, Chunk]]:
        """The tensor's number, the chunk's first row in it, and the chunk, without rows that are not compared; makes
        room for a tensor's sums when its first chunk is taken."""
        for index, pair in enumerate(self.pairs):
            self.sums[index] = np.empty((pair.n_rows, N_SUMS))
            for first_row, chunk in tensor_chunks(pair.source):
                n_rows = min(chunk.n_rows, pair.n_rows - first_row)
                if n_rows > 0:
                    yield index, first_row, replace(chunk, n_rows=n_rows)

    def loop(self) -> None:
        """Take chunks until none is left."""
        largest = max((CHUNK_WEIGHTS, *(pair.source.n_per_row for pair in self.pairs)))
        buffers = np.empty(largest, np.float32), np.empty(largest, np.float32), np.empty(4 * largest, np.uint8)
        while not self.stop.is_set():
            with self.lock:
                taken = next(self.chunks, None)
            if taken is None:
                return
            index, first_row, chunk = taken
            self.compare(self.pairs[index], first_row, chunk, self.sums[index], *buffers)
            self.meter.add(chunk.n_weights)
            with self.lock:
                self.rows_left[index] -= chunk.n_rows
                sums = None if self.rows_left[index] else self.sums.pop(index)
            if sums is not None:
                self.outcomes[index] = self.judge.judge(self.pairs[index], sums)

    def compare(
        self,
        pair: Pair,
        first_row: int,
        chunk: Chunk,
        sums: NDArray[np.float64],
        x: NDArray[np.float32],
        q: NDArray[np.float32],
        raw: NDArray[np.uint8],
    ) -> None:
        """Sum up the rows of one chunk."""
        x, q = (values[: chunk.n_weights].reshape(chunk.n_rows, -1) for values in (x, q))
        blocks = raw[: chunk.n_rows * pair.stored.row_bytes].reshape(chunk.n_rows, -1)
        self.reader.fill(chunk.rows, chunk.first, x)
        self.reader.file_bytes(pair, first_row, blocks)
        dequantize_into(blocks, pair.qtype, q)
        sum_rows(x, q, sums[first_row : first_row + chunk.n_rows])


class _Judge:
    """Says of a tensor, from its rows' sums and from some rows quantized again, whether it is sound."""

    def __init__(self, reader: WeightReader, weighted: bool, quant_weights: Mapping[str, NDArray[np.float32]]) -> None:
        self.reader = reader
        self.weighted = weighted
        self.quant_weights = quant_weights

    def judge(self, pair: Pair, sums: NDArray[np.float64]) -> _Outcome:
        errors = relative(sums[:, ERROR], sums[:, SOURCE])
        if not pair.source.evaluated:
            return _Outcome(pair, _error(pair, sums, errors))
        weighted = self.is_weighted(pair)
        allowed = limits(pair.qtype, weighted=weighted)
        sample = self.look(pair, _sample(pair))
        route = None
        if not sample.is_sound(allowed, pair.qtype):
            route, sample = self.by_way_of(pair, sample)
        largest = float(sample.own_errors[np.isfinite(sample.own_errors)].max(initial=0))
        suspects = _suspects(sums, errors, STANDS_OUT * largest)
        looked_at = [sample, self.look(pair, suspects, route)] if len(suspects) else [sample]
        outcome = _Outcome(
            pair,
            _error(pair, sums, errors, sample),
            _fault(pair, looked_at, errors, allowed),
            route,
            sample.n_idle,
        )
        if weighted or outcome.fault is None:
            return outcome
        # without the keys, a file that was made with an importance matrix looks as if it lost too much
        tolerant = limits(pair.qtype, weighted=True)
        unlike = sample.is_made_from_source(allowed) and not any(evidence.bad.any() for evidence in looked_at)
        if BANDS[pair.qtype].weighted is not None and unlike and sample.is_sound(tolerant, pair.qtype):
            return replace(outcome, fault=None, unlike_plain=True)
        return outcome

    def is_weighted(self, pair: Pair) -> bool:
        """Whether the importances are unknown."""
        band = BANDS[pair.qtype]
        used = band.weighted is not None and (self.weighted or band.plain is None)
        return used and pair.name not in self.quant_weights

    def look(self, pair: Pair, rows: NDArray[np.int64], route: QType | None = None) -> Evidence:
        """Read these rows and quantize them again."""
        blocks = self.reader.blocks(pair, rows)
        x = self.reader.source_rows(pair.source, rows)
        if route is not None:
            _, x = requantize(x, route)
        q = self.reader.values(blocks, pair)
        weighted = self.is_weighted(pair)
        return examine(
            pair,
            rows,
            x,
            blocks,
            q,
            self.quant_weights.get(pair.name),
            limits(pair.qtype, weighted=weighted),
            weighted=weighted,
        )

    def by_way_of(self, pair: Pair, sample: Evidence) -> tuple[QType | None, Evidence]:
        """The type that the tensor was converted by way of, and the rows held against that; or as they were."""
        allowed = limits(pair.qtype, weighted=self.is_weighted(pair))
        for route, _, _ in ROUTES:
            if route is pair.qtype or HOLDS.get(route, frozenset()).issuperset(pair.source.source_dtypes):
                continue
            if route is QType.Q8_0 and not _is_nearest(pair.qtype):  # it turns small weights to 0, which have no sign
                continue
            other = self.look(pair, sample.rows, route)
            if other.broken <= sample.broken / CLEARLY_LESS and other.is_sound(allowed, pair.qtype):
                return route, other
        return None, sample


def _sample(pair: Pair) -> NDArray[np.int64]:
    """Rows spread over the tensor, one from each part; the same for a name."""
    n = min(max(SAMPLE_WEIGHTS // pair.source.n_per_row, MIN_SAMPLE_ROWS), pair.n_rows)
    edges = np.linspace(0, pair.n_rows, n + 1).astype(np.int64)
    rng = np.random.default_rng(zlib.crc32(pair.name.encode()))
    return rng.integers(edges[:-1], edges[1:])


def _suspects(sums: NDArray[np.float64], errors: PerRow, limit: float) -> NDArray[np.int64]:
    """Rows with a larger error, rows that are zero, and rows unlike their source: the worst, and some of the others."""
    with np.errstate(all="ignore"):
        cosine = sums[:, PRODUCT] / np.sqrt(sums[:, SOURCE] * sums[:, FOUND])
    vanished = (sums[:, FOUND] == 0) & (sums[:, SOURCE] > 0)
    rows = np.flatnonzero((errors > limit) | vanished | (cosine < UNLIKE))
    worst = rows[np.argsort(-errors[rows], kind="stable")[:MAX_SUSPECTS]]
    return np.union1d(worst, _spread_out(rows, MAX_SUSPECTS))


def _spread_out(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """At most n of these."""
    return rows if len(rows) <= n else rows[np.linspace(0, len(rows) - 1, n).astype(np.int64)]


def _error(pair: Pair, sums: NDArray[np.float64], errors: PerRow, sample: Evidence | None = None) -> TensorError:
    with np.errstate(all="ignore"):
        difference, source, found, product, _ = sums.sum(axis=0)
        cosine = float(product / np.sqrt(source * found)) if source > 0 or found > 0 else 1.0
    worst = int(errors.argmax())
    return TensorError(
        name=pair.name,
        qtype=pair.qtype,
        bid=pair.source.bid,
        shape=pair.found.shape,
        rms_error=float(relative(np.array([difference]), np.array([source]))[0]),
        max_error=float(sums[:, LARGEST].max()),
        cosine=cosine if math.isfinite(cosine) else 0.0,
        expected=expected_error(pair.qtype, pair.source.source_dtypes),
        worst_row=worst,
        worst_row_error=float(errors[worst]),
        ratio=1.0 if sample is None else sample.ratio,
        misplaced=0.0 if sample is None else float(sample.misplaced.mean()),
        identical=sample is not None and sample.identical,
    )


def _is_nearest(qtype: QType) -> bool:
    return qtype in ROUNDING and ROUNDING[qtype][0] is Rounding.NEAREST


def _fault(pair: Pair, looked_at: Sequence[Evidence], errors: PerRow, allowed: Spread) -> _Fault | None:
    """Which rows are not as they should be, and what to call them. The sample is looked at first."""
    sample = looked_at[0]
    bad = np.unique(np.concatenate([evidence.rows[evidence.bad] for evidence in looked_at]))
    if not len(bad) and sample.is_sound(allowed, pair.qtype):
        return None
    others = sample.misplaced[~sample.bad]
    if not len(bad) or sample.bad.mean() >= NEARLY_ALL or others.mean() > allowed.misplaced:
        return _Fault(_spread_out(bad if len(bad) else sample.rows, MAX_ROWS), "")
    good = np.concatenate([evidence.errors[~evidence.bad] for evidence in looked_at])
    larger = np.flatnonzero(errors >= max(1.02 * good.max(initial=0), 0.9 * errors[bad].min()))
    if np.isin(bad, larger).mean() >= NEARLY_ALL:
        where = _ranges(larger, pair.n_rows)
    else:
        where = f"{sample.bad.sum()} of {len(sample.rows)} sampled rows from {bad[0]} to {bad[-1]}"
    return _Fault(_spread_out(bad, MAX_ROWS), where)


def _ranges(rows: NDArray[np.int64], n_rows: int) -> str:
    """As in "rows 128-191" or "row 3"."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) > 1)
    ends = np.append(starts[1:], len(rows)) - 1
    texts = [str(rows[a]) if a == b else f"{rows[a]}-{rows[b]}" for a, b in zip(starts, ends, strict=True)]
    more = f" and {len(texts) - MAX_RANGES} more ranges" if len(texts) > MAX_RANGES else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {', '.join(texts[:MAX_RANGES])}{more} of {n_rows}"


# what to say


def _faults(outcomes: Sequence[_Outcome], judge: _Judge, tensors: Sequence[MappedTensor]) -> Iterator[Problem]:
    """A problem for each tensor that is not its source's."""
    n_searched = 0
    for outcome in outcomes:
        if outcome.fault is None:
            continue
        pair, fault = outcome.pair, outcome.fault
        evidence = judge.look(pair, fault.rows)
        allowed = limits(pair.qtype, weighted=judge.is_weighted(pair))
        suspect = Suspect(pair, evidence, allowed, judge.reader, tensors)
        text = diagnose(suspect, search=n_searched < MAX_SEARCHED)
        n_searched += 1
        where = f"{fault.where}: " if fault.where else ""
        gives = f"relative error {evidence.error:.3g}, where {pair.qtype.name} gives {evidence.own_error:.3g}"
        yield Problem(Verdict.FAIL, pair.name, f"{where}{text}; {gives}")


def _warnings(outcomes: Sequence[_Outcome]) -> Iterator[Problem]:
    """What is odd, but can be a sound file."""
    for route, what, verdict in ROUTES:
        names = [outcome.pair.name for outcome in outcomes if outcome.route is route]
        if names and verdict is not None:
            yield Problem(verdict, _some(names), what)
    for outcome in outcomes:
        if outcome.idle_columns:
            what = f"{outcome.idle_columns} columns are zero: right only if the importance matrix counted nothing there"
            yield Problem(Verdict.WARN, outcome.pair.name, what)
    names = [outcome.pair.name for outcome in outcomes if outcome.unlike_plain]
    if names:
        what = "quantized as if with an importance matrix, or by another quantizer; the file's keys name none"
        yield Problem(Verdict.WARN, _some(names), what)


def _notes(outcomes: Sequence[_Outcome]) -> Iterator[str]:
    """What a reader should know of a sound file."""
    for route, what, verdict in ROUTES:
        names = [outcome.pair.name for outcome in outcomes if outcome.route is route]
        if names and verdict is None:
            yield f"{_some(names)} {what}"
    idle = [
        outcome.pair.name
        for outcome in outcomes
        if not outcome.pair.source.evaluated and outcome.error.rms_error > MARGIN * outcome.error.expected[1]
    ]
    if idle:
        yield f"{_some(idle)}: not as in the source: keys and values of KV-shared layers, which are never evaluated"
    for outcome in outcomes:
        error = outcome.error
        sound = outcome.fault is None and outcome.route is None and outcome.pair.source.evaluated
        if sound and error.rms_error > MARGIN * error.expected[1]:
            gives = f"{error.expected[0]:.3g} to {error.expected[1]:.3g}"
            yield f"{error.name}: relative error {error.rms_error:.3g}; most weights have {gives} in {error.qtype.name}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]} …)"
