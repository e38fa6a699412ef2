"""Every tensor of a GGUF file, dequantized and held against its source, in one pass of bounded memory.

Each row's relative error is measured, and what its worst unit of weights is like. Then some rows of every tensor, and
those that stand out, are quantized again with our own quantizer (see evidence), whose bytes are llama.cpp's:

    the sample has our bytes     the tensor is proved, and so is each row that stands out: it has them too, or is wrong
    all rows are compared        with the importance matrix at hand, in the same pass; a few rows of other bytes are
                                 then told
    most of it has, or no        the file is sound where its error is that of its type on these very weights, and its
    importances were used        levels are those that the weights round to (see bands and yardsticks): ggml may have
                                 been compiled in another way
    unknown ones were used       only what no importances explain is a failure (see rules); what most don't is a
                                 warning, which `--imatrix` decides

    fault                                      shows in
    zeroed, foreign, shifted, damaged rows     their own errors: 1.0, 1.4, more
    a damaged block                            what its unit is like: error and length
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
from gguf3n.formats.ggml_types import GGML_TYPES, Rounding
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import GGUFFile
from gguf3n.formats.rows import CHUNK_WEIGHTS, Chunk, Values
from gguf3n.gemma3n.end_of_image import MARK
from gguf3n.gemma3n.mapping import MappedTensor
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.refinement import REFINE_KEYS, Refinement
from gguf3n.progress import Meter, OnProgress
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from gguf3n.validation.bands import BANDS, FEW, HOLDS, MARGIN, Spread, expected_error, limits
from gguf3n.validation.diagnosis import MAX_ROWS, Suspect, diagnose
from gguf3n.validation.evidence import Evidence, examine, own_blocks, requantize
from gguf3n.validation.result import Problem, Stage, Verdict
from gguf3n.validation.rules import RULES, floor
from gguf3n.validation.tensor_errors import TensorError, TensorsResult
from gguf3n.validation.weights import Pair, WeightReader, dequantize_into, tensor_chunks
from gguf3n.validation.yardsticks import (
    ERROR,
    FOUND,
    LARGEST,
    LEAST,
    MOST,
    N_SUMS,
    PRODUCT,
    ROUNDING,
    SOURCE,
    VANISHED,
    WORST,
    PerRow,
    relative,
    sum_rows,
)
from gguf3n.workers import default_threads, run_workers

SAMPLE_WEIGHTS = 1 << 17
"""Of each tensor, quantized again."""
MIN_SAMPLE_ROWS = 16
UNIT = 256
SMALL_UNIT = 128
"""Consecutive weights that are looked at together, of types with blocks of 256 or none, and of 32.

# measured: see compare_rows; a unit for each block of 32 would cost a tenth of the stage
"""
MAX_SUSPECTS = 16
"""Rows that stand out in one way, of one tensor, quantized again: the worst, and as many others."""
UNLIKE = 0.5
"""Cosine of a row that is looked at again."""
STANDS_OUT = 1.25
"""Times the largest error of requantizing a row of the sample, or the largest of what the sample's units are like."""
NEARLY_EXACT = 0.98
"""Of the sample's blocks have our bytes where the others are damaged."""
MAX_PADDING = 4096
"""Rows at the end of a table that are looked at for padding; Gemma 3n has 256."""
MAX_RANGES = 3
MAX_ODD = 3
"""Tensors with odd blocks that are named."""
MAX_SEARCHED = 24
"""Tensors whose rows are searched for elsewhere. Why: that may read whole tensors; with a wrong source, all of them."""
CLEARLY_LESS = 4
"""Times fewer weights must be misplaced for a detour to explain them."""
NEARLY_ALL = 0.9
MAX_DAMAGED = 16
"""Rows of which some blocks are damaged, to call them that; other rows than ours that are not another compilation's."""
SOME_BLOCKS = 0.5
"""Of such a row."""
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
    refinement: Refinement | None = None,
    progress: OnProgress | None = None,
) -> TensorsResult:
    """Compare every tensor of a file with its source.

    Args:
        gguf: as `open_gguf(path, strict=False)` gives it.
        quant_weights: importances that the file was quantized with, by tensor, where they are at hand: it is then
            judged as sharply as one without, and every row is quantized again.
        refinement: likewise the correlations that its codes were refined with.
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
        refined = any(name.startswith(REFINE_KEYS) for name in gguf.keys)
        judge = _Judge(reader, weighted, quant_weights or {}, refined, refinement)
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
    """One tensor: how far it is, and rows that are not what they should be.

    `route`: of ROUTES. `is_ours`: most sampled blocks have our bytes. `is_unsure`: few importances explain the rows.
    `odd`: blocks that few importances explain, or that differ from ours where all others don't. `is_alone`: these are
    few of all rows, which were all compared.
    """

    pair: Pair
    error: TensorError
    fault: _Fault | None = None
    route: QType | None = None
    idle_columns: int = 0
    unlike_plain: bool = False
    is_ours: bool = False
    is_unsure: bool = False
    odd: str = ""
    is_alone: bool = False


@dataclass(frozen=True)
class _Fault:
    """Rows to be diagnosed. `where` is empty for the whole tensor. `text`: what is wrong, where that is known."""

    rows: NDArray[np.int64]
    where: str
    text: str = ""


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
        self.unlike: dict[int, NDArray[np.bool_]] = {}
        self.rows_left = [pair.n_rows for pair in pairs]
        self.outcomes: dict[int, _Outcome] = {}
        n_weights = sum(pair.n_rows * pair.source.n_per_row for pair in pairs)
        self.meter = Meter(Stage.TENSORS.value, "weights", n_weights, progress)

    def _cut(self) -> Iterator[tuple[int, int, Chunk]]:
        """The tensor's number, the chunk's first row in it, and the chunk, without rows that are not compared; makes
        room for a tensor's sums when its first chunk is taken."""
        for index, pair in enumerate(self.pairs):
            self.sums[index] = np.empty((pair.n_rows, N_SUMS))
            self.unlike[index] = np.zeros(pair.n_rows, np.bool_)
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
            self.compare(index, first_row, chunk, *buffers)
            self.meter.add(chunk.n_weights)
            with self.lock:
                self.rows_left[index] -= chunk.n_rows
                is_complete = not self.rows_left[index]
            if is_complete:
                unlike = np.flatnonzero(self.unlike.pop(index))
                self.outcomes[index] = self.judge.judge(self.pairs[index], self.sums.pop(index), unlike)

    def compare(
        self,
        index: int,
        first_row: int,
        chunk: Chunk,
        x: NDArray[np.float32],
        q: NDArray[np.float32],
        raw: NDArray[np.uint8],
    ) -> None:
        """Sum up the rows of one chunk, and quantize them again where all rows are."""
        pair, rows = self.pairs[index], slice(first_row, first_row + chunk.n_rows)
        x, q = (values[: chunk.n_weights].reshape(chunk.n_rows, -1) for values in (x, q))
        blocks = raw[: chunk.n_rows * pair.stored.row_bytes].reshape(chunk.n_rows, -1)
        largest = self.reader.fill(chunk.rows, chunk.first, x)
        self.reader.file_bytes(pair, first_row, blocks)
        dequantize_into(blocks, pair.qtype, q)
        unit = SMALL_UNIT if GGML_TYPES[pair.qtype].weights == 32 else UNIT
        sum_rows(x, q, self.sums[index][rows], unit, floor(pair.qtype, unit))
        if self.judge.compares_all(pair):
            known = self.judge.quant_weights.get(pair.name)
            ours = own_blocks(x, pair.qtype, known, self.judge.correlations(pair), largest)
            if not np.array_equal(ours, blocks):
                self.unlike[index][rows] = (ours != blocks).any(axis=1)


class _Judge:
    """Says of a tensor, from its rows' sums and from some rows quantized again, whether it is sound."""

    def __init__(
        self,
        reader: WeightReader,
        weighted: bool,
        quant_weights: Mapping[str, NDArray[np.float32]],
        refined: bool,
        refinement: Refinement | None,
    ) -> None:
        self.reader = reader
        self.weighted = weighted
        self.quant_weights = quant_weights
        self.refined = refined
        self.refinement = refinement

    def compares_all(self, pair: Pair) -> bool:
        """Whether every row is quantized again."""
        is_known = bool(self.quant_weights) or self.refinement is not None
        return pair.source.evaluated and is_known and not self.is_refined(pair)

    def judge(self, pair: Pair, sums: NDArray[np.float64], unlike: NDArray[np.int64]) -> _Outcome:
        """Args: unlike: the rows that have not our bytes, where all were compared."""
        errors = relative(sums[:, ERROR], sums[:, SOURCE])
        if not pair.source.evaluated:
            return _Outcome(pair, _error(pair, sums, errors))
        weighted = self.is_weighted(pair)
        refined = self.is_refined(pair)
        outcome = self.held_against(pair, sums, errors, unlike, weighted=weighted or refined, refined=refined)
        may_be_weighted = pair.qtype in RULES and pair.name not in self.quant_weights and not refined
        if outcome.fault is None or not may_be_weighted:
            return outcome
        # where the weights of a row are alike, unknown importances may give our bytes; none are counted for tables
        is_open = outcome.is_ours and pair.source.bid is not None if weighted else not outcome.is_ours
        if not is_open:
            return outcome
        # without the keys, a file that was made with an importance matrix looks as if it lost too much
        tolerant = self.held_against(pair, sums, errors, unlike, weighted=True, may_be_ours=False)
        if tolerant.fault is not None:
            return outcome
        return replace(tolerant, is_unsure=True) if weighted else replace(tolerant, unlike_plain=True)

    def held_against(
        self,
        pair: Pair,
        sums: NDArray[np.float64],
        errors: PerRow,
        unlike: NDArray[np.int64],
        *,
        weighted: bool,
        refined: bool = False,
        may_be_ours: bool = True,
    ) -> _Outcome:
        """The tensor as one that was made with unknown importances or correlations, or as ours."""
        sample = self.look(pair, _sample(pair), weighted=weighted, refined=refined)
        if weighted and sample.is_ours and may_be_ours:
            weighted = refined = False
            sample = sample if sample.identical else self.look(pair, sample.rows, weighted=False)
        allowed = self.allowed(pair, weighted=weighted, refined=refined)
        route = None
        if not refined and not sample.is_sound(allowed, pair.qtype):
            route, sample = self.by_way_of(pair, sample, weighted=weighted)
        suspects = _suspects(sums, errors, sample)
        is_few = sample.identical or len(unlike) <= MAX_DAMAGED
        is_alone = bool(len(unlike)) and is_few and not weighted and route is None
        if is_alone:
            suspects = np.union1d(suspects, _spread_out(unlike, MAX_SUSPECTS))
        looked_at = [sample]
        if len(suspects):
            looked_at.append(self.look(pair, suspects, route, weighted=weighted, refined=refined, usual=sample))
        known = "" if refined else self.known(pair)
        is_identical = sample.identical and (route is not None or not len(unlike))
        return _Outcome(
            pair,
            _error(pair, sums, errors, sample, is_identical=is_identical, refined=refined),
            _fault(pair, looked_at, errors, allowed, weighted=weighted, known=known),
            route,
            sample.n_idle,
            is_ours=sample.is_ours,
            is_unsure=weighted and not sample.is_sound(allowed, pair.qtype),
            odd=_odd(pair, looked_at, weighted=weighted, refined=refined, unlike=unlike if is_alone else None),
            is_alone=is_alone,
        )

    def is_weighted(self, pair: Pair) -> bool:
        """Whether the importances are unknown."""
        band = BANDS[pair.qtype]
        used = band.weighted is not None and (self.weighted or band.plain is None)
        return used and pair.name not in self.quant_weights

    def allowed(self, pair: Pair, *, weighted: bool, refined: bool) -> Spread:
        """What its rows may be like."""
        return limits(pair.qtype, weighted=self.is_weighted(pair) if refined else weighted, refined=refined)

    def known(self, pair: Pair) -> str:
        """What makes its rows, where that is at hand, and its verb."""
        if self.correlations(pair) is not None:
            weighed = "the importance matrix and " if pair.name in self.quant_weights else ""
            return f"{weighed}the correlations make"
        return "the importance matrix makes" if pair.name in self.quant_weights else ""

    def is_refined(self, pair: Pair) -> bool:
        """Whether its codes may be refined by what is not at hand."""
        if not self.refined or not pair.source.evaluated or not GGML_TYPES[pair.qtype].refinable:
            return False
        return self.refinement is None or (self.refinement.refines(pair.name, pair.qtype) and self.is_weighted(pair))

    def correlations(self, pair: Pair) -> Values | None:
        """Those at hand that its codes were refined with."""
        if not self.refined or self.refinement is None or not self.refinement.refines(pair.name, pair.qtype):
            return None
        return self.refinement.correlations(pair.name)

    def look(
        self,
        pair: Pair,
        rows: NDArray[np.int64],
        route: QType | None = None,
        *,
        weighted: bool,
        refined: bool = False,
        usual: Evidence | None = None,
    ) -> Evidence:
        """Read these rows and quantize them again."""
        blocks = self.reader.blocks(pair, rows)
        x = self.reader.source_rows(pair.source, rows)
        if route is not None:
            _, x = requantize(x, route)
        q = self.reader.values(blocks, pair)
        return examine(
            pair.qtype,
            rows,
            x,
            blocks,
            q,
            self.quant_weights.get(pair.name),
            self.allowed(pair, weighted=weighted, refined=refined),
            weighted=weighted,
            refined=refined,
            correlations=None if refined else self.correlations(pair),
            usual=usual,
        )

    def by_way_of(self, pair: Pair, sample: Evidence, *, weighted: bool) -> tuple[QType | None, Evidence]:
        """The type that the tensor was converted by way of, and the rows held against that; or as they were."""
        allowed = limits(pair.qtype, weighted=weighted)
        for route, _, _ in ROUTES:
            if route is pair.qtype or HOLDS.get(route, frozenset()).issuperset(pair.source.source_dtypes):
                continue
            if route is QType.Q8_0 and not _is_nearest(pair.qtype):  # it turns small weights to 0, which have no sign
                continue
            other = self.look(pair, sample.rows, route, weighted=weighted)
            if other.broken <= sample.broken / CLEARLY_LESS and other.is_sound(allowed, pair.qtype):
                return route, other
        return None, sample


def _sample(pair: Pair) -> NDArray[np.int64]:
    """Rows spread over the tensor, one from each part; the same for a name."""
    n = min(max(SAMPLE_WEIGHTS // pair.source.n_per_row, MIN_SAMPLE_ROWS), pair.n_rows)
    edges = np.linspace(0, pair.n_rows, n + 1).astype(np.int64)
    rng = np.random.default_rng(zlib.crc32(pair.name.encode()))
    return rng.integers(edges[:-1], edges[1:])


def _suspects(sums: NDArray[np.float64], errors: PerRow, sample: Evidence) -> NDArray[np.int64]:
    """Rows with a larger error than the sample's, in all or in a unit, with units that are longer or shorter or zero,
    and rows unlike their source: the worst of each kind, and some of the others."""
    limit = float(sample.own_errors[np.isfinite(sample.own_errors)].max(initial=0))
    usual = sums[sample.rows[~sample.bad]]
    with np.errstate(all="ignore"):
        cosine = sums[:, PRODUCT] / np.sqrt(sums[:, SOURCE] * sums[:, FOUND])
        excesses = (
            errors / limit,
            np.sqrt(sums[:, WORST] / usual[:, WORST].max(initial=0)),
            usual[:, LEAST].min(initial=1) / sums[:, LEAST],
            sums[:, MOST] / usual[:, MOST].max(initial=1),
            np.where(sums[:, VANISHED] > usual[:, VANISHED].max(initial=0), np.inf, 0),
            np.where((cosine < UNLIKE) | (sums[:, LEAST] < 0), np.inf, 0),
        )
    chosen = [np.empty(0, np.int64)]
    for excess in excesses:
        rows = np.flatnonzero(excess > STANDS_OUT)
        worst = rows[np.argsort(-excess[rows], kind="stable")[:MAX_SUSPECTS]]
        chosen += [worst, _spread_out(rows, MAX_SUSPECTS)]
    return np.unique(np.concatenate(chosen))


def _spread_out(rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """At most n of these."""
    return rows if len(rows) <= n else rows[np.linspace(0, len(rows) - 1, n).astype(np.int64)]


def _error(
    pair: Pair,
    sums: NDArray[np.float64],
    errors: PerRow,
    sample: Evidence | None = None,
    *,
    is_identical: bool = False,
    refined: bool = False,
) -> TensorError:
    with np.errstate(all="ignore"):
        difference, source, found, product = sums[:, :LARGEST].sum(axis=0)
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
        identical=is_identical,
        refined=refined,
    )


def _is_nearest(qtype: QType) -> bool:
    return qtype in ROUNDING and ROUNDING[qtype][0] is Rounding.NEAREST


def _fault(
    pair: Pair, looked_at: Sequence[Evidence], errors: PerRow, allowed: Spread, *, weighted: bool, known: str
) -> _Fault | None:
    """Which rows are not as they should be, and what to call them. The sample is looked at first.

    Args:
        known: what makes the rows, where all of it is at hand, and its verb.
    """
    sample = looked_at[0]
    is_exact = not weighted and sample.same.mean() >= NEARLY_EXACT
    bad_rows = [evidence.bad | (evidence.worse.any(axis=1) & is_exact) for evidence in looked_at]
    bad = np.unique(np.concatenate([evidence.rows[flags] for evidence, flags in zip(looked_at, bad_rows, strict=True)]))
    if weighted:
        is_fine = sample.is_possible
    else:
        is_fine = sample.is_made_from_source(allowed) and sample.is_as_good(allowed.ratio, pair.qtype)
    if not len(bad) and is_fine:
        if known and not sample.is_ours:
            share = f"only {sample.same.mean():.0%} of the sampled blocks are"
            return _Fault(sample.rows[:MAX_ROWS], "", f"not what {known} of the source: {share}")
        return None
    broken = sample.unruly > FEW or sample.factor != 1
    if not weighted:
        others = sample.misplaced[~bad_rows[0]]
        own = MARGIN * sample.own_misplaced[~bad_rows[0]]
        broken = bool(len(others)) and others.mean() > max(allowed.misplaced, own.mean() + FEW)
    if not len(bad) or bad_rows[0].mean() >= NEARLY_ALL or broken:
        return _Fault(_spread_out(bad if len(bad) else sample.rows, MAX_ROWS), "")
    good = np.concatenate([evidence.errors[~flags] for evidence, flags in zip(looked_at, bad_rows, strict=True)])
    larger = np.flatnonzero(errors >= max(1.02 * good.max(initial=0), 0.9 * errors[bad].min()))
    if np.isin(bad, larger).mean() >= NEARLY_ALL:
        where = _ranges(larger, pair.n_rows)
    elif bad_rows[0].any():
        where = f"{bad_rows[0].sum()} of {len(sample.rows)} sampled rows from {bad[0]} to {bad[-1]}"
    else:
        where = _ranges(bad, pair.n_rows)
    damaged = [_damage(evidence, bad) for evidence in looked_at if np.isin(bad, evidence.rows).any()]
    if len(bad) <= MAX_DAMAGED and all(damaged):
        return _Fault(bad, f"{where}, {damaged[0]}", "damaged")
    return _Fault(_spread_out(bad, MAX_ROWS), where)


def _damage(evidence: Evidence, rows: NDArray[np.int64]) -> str:
    """Which weights of the first of these rows differ from ours by far, where the rest of it does not; else nothing."""
    here = np.flatnonzero(np.isin(evidence.rows, rows))
    flags = (evidence.worse | evidence.odd)[here]
    if not flags.any(axis=1).all() or flags.mean() > SOME_BLOCKS:
        return ""
    first, last = np.flatnonzero(flags[0])[[0, -1]]
    n = evidence.x.shape[1] // flags.shape[1]
    return f"weights {first * n}-{(last + 1) * n - 1}"


def _odd(
    pair: Pair,
    looked_at: Sequence[Evidence],
    *,
    weighted: bool,
    refined: bool,
    unlike: NDArray[np.int64] | None,
) -> str:
    """Rows whose blocks few importances explain; or that are ours but for some blocks, which are no worse than ours."""
    sample = looked_at[0]
    if not weighted and not sample.identical and unlike is None:
        return ""
    for evidence in looked_at[1:]:
        flags = evidence.odd if weighted else ~evidence.same
        rows = evidence.rows[flags.any(axis=1)]
        if len(rows):
            first, last = np.flatnonzero(flags[evidence.rows == rows[0]][0])[[0, -1]]
            n = evidence.x.shape[1] // flags.shape[1]
            where = f"{_ranges(rows if unlike is None else unlike, pair.n_rows)}, "
            where += f"weights {first * n}-{(last + 1) * n - 1}: "
            if refined:
                return where + "unlike the source; right only for odd correlations: see --refine"
            if weighted:
                return where + "not the source's length; right only for an odd importance matrix: see --imatrix"
            others = "sampled" if unlike is None else "other"
            return where + f"not the bytes that our quantizer gives, which all {others} rows have"
    return ""


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
        refined = judge.is_refined(pair)
        weighted = refined or judge.is_weighted(pair)
        allowed = judge.allowed(pair, weighted=weighted, refined=refined)
        evidence = judge.look(pair, fault.rows, weighted=weighted, refined=refined)
        text = fault.text
        if not text:
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
            yield Problem(Verdict.WARN, outcome.pair.name, f"{what}: see --imatrix")
    names = [outcome.pair.name for outcome in outcomes if outcome.unlike_plain]
    if names:
        what = "quantized as if with an importance matrix, or by another quantizer; the file's keys name none"
        yield Problem(Verdict.WARN, _some(names), what)
    odd = [outcome for outcome in outcomes if outcome.odd and outcome.fault is None]
    odd = [outcome for outcome in odd if not _is_usual(outcome, outcomes)]
    for outcome in odd[:MAX_ODD]:
        yield Problem(Verdict.WARN, outcome.pair.name, outcome.odd)
    if len(odd) > MAX_ODD:
        names = [outcome.pair.name for outcome in odd[MAX_ODD:]]
        option = "--refine" if any(outcome.error.refined for outcome in odd[MAX_ODD:]) else "--imatrix"
        yield Problem(Verdict.WARN, _some(names), f"have such rows too: see {option}")
    unsure = [outcome for outcome in outcomes if outcome.is_unsure and outcome.fault is None]
    names = [outcome.pair.name for outcome in unsure if outcome.error.refined]
    if names:
        what = "lost more than refined codes usually lose; sound if that is the correlations' doing, which "
        yield Problem(Verdict.WARN, _some(names), what + "--refine FILE can tell")
    names = [outcome.pair.name for outcome in unsure if not outcome.error.refined]
    if names:
        what = "lost more than most importance matrices make a type lose; sound if that is the matrix's doing, which "
        yield Problem(Verdict.WARN, _some(names), what + "--imatrix FILE can tell")


def _is_usual(outcome: _Outcome, outcomes: Sequence[_Outcome]) -> bool:
    """Whether most other tensors of its type have rows of other bytes too: another compilation of ggml."""
    others = [
        other.error.identical
        for other in outcomes
        if other.pair.qtype is outcome.pair.qtype and other.pair.source.evaluated and other is not outcome
    ]
    return outcome.is_alone and sum(others) < len(others) / 2


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
