"""Some rows of a tensor, looked at closely: what the file has, and what our own quantizer makes of the source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType, row_bytes
from gguf3n.formats.rows import Values, largest_magnitude
from gguf3n.validation.bands import FEW, HOLDS, MARGIN, ROW_RATIO, Spread
from gguf3n.validation.rules import RULES, are_strangers, floor, impossible, off_columns, rule_breakers
from gguf3n.validation.weights import dequantize_into
from gguf3n.validation.yardsticks import (
    ERROR,
    FOUND,
    N_SUMS,
    PRODUCT,
    SOURCE,
    PerRow,
    error,
    misplaced,
    relative,
    row_errors,
    sum_rows,
)

UNRELATED = 0.25
"""Rows are strangers if their cosine and their surplus of equal signs are both below this.

# measured: rows of scripts/measure_bands.py: no sound row of any type, 99.8 % or more of strangers
"""
NEGLIGIBLE = 1e-3
"""A relative error that blocks always may have: a scale of half precision can't be nearer."""
MIN_ROWS_FOR_COLUMNS = 16
"""To say of a column that it is zero everywhere."""
IDLE = 16
"""Weights of the smallest sub-block."""
MOSTLY = 0.5
"""Of the blocks have the bytes of our quantizer where it was given the same importances.

# measured: ggml compiled with FMA and without: other bytes in up to 17 % of the blocks
"""
BLOCK_RATIO = 1.5
"""The error of a block over that of ours, where all others have our bytes, that nothing but a fault explains."""
RARE = 1e-3
"""Share of blocks that may be all zero without one in the sample."""
BEYOND_CHANCE = 15
"""Decimal exponent of the chance that so many blocks that follow each other are all zero. Why: there are billions."""
FACTORS = (0.6, 1.67)
"""Of a block's length, over that of ours: beyond, the importances would have to be odd ones."""

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Evidence:
    """Rows of the source, of the file, and of the source requantized.

    Shapes: x, q, own float32[n_rows, n_per_row]; errors, own_errors, misplaced, own_misplaced, bad [n_rows]; same,
    worse, odd [n_rows, n_blocks].
    """

    rows: NDArray[np.int64]
    x: Values
    q: Values
    own: Values
    errors: PerRow
    own_errors: PerRow
    misplaced: PerRow
    own_misplaced: PerRow
    bad: Flags
    same: Flags
    """Blocks that have the bytes of our quantizer."""
    worse: Flags
    """Blocks with a much larger error than ours: nothing but a fault, where the others have our bytes."""
    odd: Flags
    """Blocks that are much longer or shorter than ours."""
    unruly: float
    """The share of weights that break a rule which no importances change."""
    factor: float
    """Of the columns' lengths, where no importances explain it: see `off_columns`."""
    vanishing: float
    """The share of its blocks that most rows have zeros in and ours has not, of those that are not zero in all rows."""
    n_idle: int
    """Columns left out: see idle_columns."""

    @property
    def identical(self) -> bool:
        """The file's bytes are those of our quantizer."""
        return bool(self.same.all())

    @property
    def is_ours(self) -> bool:
        """Whether the rows were made with the importances that ours were."""
        return bool(self.same.mean() >= MOSTLY) if self.same.size else True

    @property
    def alive(self) -> Flags:
        """By blocks of a row, whether one is not all zero. Shapes: [n_blocks]."""
        found: Flags = np.asarray(_filled(self.q, self.same).any(axis=0))
        return found

    @property
    def error(self) -> float:
        return error(self.x, self.q)

    @property
    def own_error(self) -> float:
        return error(self.x, self.own)

    @property
    def ratio(self) -> float:
        """How many times the error is that of requantizing; 1 where both are nothing."""
        found, own = self.error, self.own_error
        if found == own:
            return 1.0
        return found / own if own else float("inf")

    @property
    def broken(self) -> float:
        """Share of misplaced weights beyond that of our quantizer."""
        return max(float(self.misplaced.mean() - self.own_misplaced.mean()), 0.0)

    def is_sound(self, allowed: Spread, qtype: QType) -> bool:
        return not self.bad.any() and self.is_made_from_source(allowed) and self.is_as_good(allowed.ratio, qtype)

    def is_made_from_source(self, allowed: Spread) -> bool:
        """Whether the levels follow the type's rule, as far as our own do."""
        return float(self.misplaced.mean()) <= max(allowed.misplaced, MARGIN * float(self.own_misplaced.mean()) + FEW)

    def is_as_good(self, ratio: float, qtype: QType) -> bool:
        """Whether the error is at most this many times that of requantizing."""
        return self.error <= negligible(qtype) or self.ratio <= ratio

    @property
    def is_possible(self) -> bool:
        """Whether some importances, unknown ones, explain the rows."""
        return not self.bad.any() and self.unruly <= FEW and self.factor == 1


def examine(
    qtype: QType,
    rows: NDArray[np.int64],
    x: Values,
    blocks: NDArray[np.uint8],
    q: Values,
    quant_weights: NDArray[np.float32] | None,
    allowed: Spread,
    *,
    weighted: bool,
    refined: bool = False,
    correlations: Values | None = None,
    usual: Evidence | None = None,
) -> Evidence:
    """Judge each row.

    Args:
        weighted: the file was made with an importance matrix that is not at hand: a row is bad only where no matrix
            explains it.
        refined: likewise with codes refined by correlations that are not at hand.
        correlations: those that are.
        usual: the sample, for other rows.
    """
    n_blocks = x.shape[1] // GGML_TYPES[qtype].weights
    made, own = requantize(x, qtype, quant_weights, correlations)
    same: Flags = (made == blocks).reshape(len(x), n_blocks, -1).all(axis=2)
    idle = idle_columns(x, q) if weighted and same.mean() < MOSTLY else np.zeros(x.shape[1], bool)
    if idle.any():
        x = np.where(idle, np.float32(0), x)
        made, own = requantize(x, qtype, quant_weights, correlations)
        same = (made == blocks).reshape(*same.shape, -1).all(axis=2)
    errors = row_errors(x, q)
    own_errors = errors if same.all() else row_errors(x, own)
    shares = misplaced(x, q, qtype)
    own_shares = shares if same.all() else misplaced(x, own, qtype)
    worse, odd = _unlike_ours(x, q, own, same, qtype)
    strange = np.zeros(len(x), np.bool_) if same.all() else _unrelated(x, q) & ~_unrelated(x, own)
    bad: Flags = ~np.isfinite(errors)
    unruly, factor, rate = 0.0, 1.0, 0.0
    if refined:
        bad |= strange | _is_gone(q, own) | (_lengths(x, q, own) < FACTORS[0])
        a, b, c = (values.reshape(same.size, -1) for values in (x, q, own))
        unlike: Flags = _unrelated(a, b) | (_lengths(a, b, c) < FACTORS[0])
        odd = unlike.reshape(same.shape) & ~same
    elif weighted and not same.all():
        odd = odd | (strange[:, None] & ~same)
        filled, ours = _filled(q, same), _filled(own, same)
        alive: Flags = np.asarray(filled.any(axis=0)) if usual is None else usual.alive
        bad |= impossible(x, q, blocks, qtype, alive).any(axis=1)
        gone = ours & ~filled
        rate = float(np.median(gone[:, alive].mean(axis=1))) if usual is None and alive.any() else 0.0
        rate = rate if usual is None else usual.vanishing
        bad |= are_strangers(x, q, qtype) & strange
        bad |= ours.any(axis=1) & ~alive.any() | (_longest(gone & alive) * -np.log10(rate + RARE) > BEYOND_CHANCE)
        bad |= bad.any() & ours.any(axis=1) & ~filled.any(axis=1)
        unruly = float(rule_breakers(x, q, blocks, qtype)[~bad].mean()) if not bad.all() else 0.0
        factor = off_columns(x[~bad], q[~bad], qtype) if (~bad).sum() >= MIN_ROWS_FOR_COLUMNS else 1.0
    elif not weighted:
        bad |= strange
        bad |= _is_gone(q, own)
        bad |= shares > allowed.row_misplaced + own_shares
        bad |= errors > np.maximum(ROW_RATIO * own_errors, negligible(qtype))
    bad &= ~same.all(axis=1)
    return Evidence(
        rows=rows,
        x=x,
        q=q,
        own=own,
        errors=errors,
        own_errors=own_errors,
        misplaced=shares,
        own_misplaced=own_shares,
        bad=bad,
        same=same,
        worse=worse,
        odd=odd,
        unruly=unruly,
        factor=factor,
        vanishing=rate,
        n_idle=int(idle.sum()),
    )


def _filled(values: Values, blocks: Flags) -> Flags:
    """The blocks that are not all zero. Shapes: [n_rows, n_blocks], as those of `blocks`."""
    found: Flags = np.asarray(values.reshape(*blocks.shape, -1).any(axis=2))
    return found


def _is_gone(q: Values, own: Values) -> Flags:
    """Whether rows are zero where ours are not."""
    found: Flags = np.asarray(~q.any(axis=1) & own.any(axis=1))
    return found


def _lengths(x: Values, q: Values, own: Values) -> PerRow:
    """How long our rows are along their source, over how long the file's are; 1 where ours are nothing.

    Why: what columns do for each other moves levels up as often as down, so refined rows are no longer than others.
    # measured: 2026-11-22, as REFINED_RATIO: rows 0.97 to 5.1, the more the larger one column is
    """
    ours, found = (np.einsum("ij,ij->i", x, values, dtype=np.float64) for values in (own, q))
    factors: PerRow = np.divide(ours, found, out=np.full(len(x), np.inf), where=found != 0)
    return np.where(ours > 0, factors, 1.0)


def _longest(flags: Flags) -> NDArray[np.int64]:
    """The most flags that follow each other in each row."""
    runs = np.zeros(len(flags), np.int64)
    longest = np.zeros(len(flags), np.int64)
    for column in flags.T:
        runs = (runs + 1) * column
        longest = np.maximum(longest, runs)
    return longest


def _unlike_ours(x: Values, q: Values, own: Values, same: Flags, qtype: QType) -> tuple[Flags, Flags]:
    """Blocks that are much worse than ours, and those that are much longer or shorter. Shapes: [n_rows, n_blocks]."""
    if same.all():
        return np.zeros_like(same), np.zeros_like(same)
    unit = GGML_TYPES[qtype].weights
    least = floor(qtype, unit)
    found, ours = (np.empty((same.size, N_SUMS)) for _ in range(2))
    sum_rows(x.reshape(same.size, -1), q.reshape(same.size, -1), found)
    sum_rows(x.reshape(same.size, -1), own.reshape(same.size, -1), ours)
    errors, own_errors = (relative(sums[:, ERROR], sums[:, SOURCE] + least) for sums in (found, ours))
    worse: Flags = errors > np.maximum(BLOCK_RATIO * own_errors, negligible(qtype))
    with np.errstate(all="ignore"):
        lengths = [(sums[:, PRODUCT] + least) / (sums[:, FOUND] + least) for sums in (found, ours)]
        factor = lengths[0] / lengths[1]
    odd: Flags = ~((factor >= FACTORS[0]) & (factor <= FACTORS[1]))
    odd &= qtype in RULES and not RULES[qtype].tells_scales
    places = np.flatnonzero(odd)
    middle = _middle_factors(x, q, own, places, same.size)
    odd[places] = ~((middle >= FACTORS[0]) & (middle <= FACTORS[1]))
    odd |= (found[:, FOUND] == 0) & (ours[:, FOUND] > 0) & (found[:, SOURCE] > least)
    return worse.reshape(same.shape) & ~same, odd.reshape(same.shape) & ~same


def _middle_factors(x: Values, q: Values, own: Values, places: NDArray[np.int64], n_blocks: int) -> PerRow:
    """The median of x / q in these blocks, over that of ours. Why: a huge weight may be cut off, but no others."""
    a, b, c = (values.reshape(n_blocks, -1)[places].astype(np.float64) for values in (x, q, own))
    counts = (b != 0) & (c != 0)
    medians = []
    with np.errstate(all="ignore"):
        for values in (b, c):
            shares = np.sort(np.where(counts, a / values, np.inf), axis=1)
            medians.append(np.take_along_axis(shares, counts.sum(axis=1, keepdims=True) // 2, axis=1)[:, 0])
        factors: PerRow = medians[0] / medians[1]
    return np.where(counts.any(axis=1), factors, 1.0)


def requantize(
    x: Values,
    qtype: QType,
    quant_weights: NDArray[np.float32] | None = None,
    correlations: Values | None = None,
) -> tuple[NDArray[np.uint8], Values]:
    """The blocks and the values that our quantizer makes of rows."""
    blocks = own_blocks(x, qtype, quant_weights, correlations)
    own = np.empty_like(x)
    dequantize_into(blocks, qtype, own)
    return blocks, own


def own_blocks(
    x: Values,
    qtype: QType,
    quant_weights: NDArray[np.float32] | None = None,
    correlations: Values | None = None,
    largest: float | None = None,
) -> NDArray[np.uint8]:
    """What our quantizer makes of rows; all columns weigh the same where none are given and the type needs some.

    Args:
        correlations: to refine the codes with.
        largest: the largest magnitude, where it is known.

    Shapes: uint8[n_rows, row_bytes].
    """
    from gguf3n.quants import QUANTIZERS
    from gguf3n.quants.api import quantize_rows
    from gguf3n.quants.refinement import refine_rows

    blocks = np.zeros((len(x), row_bytes(qtype, x.shape[1])), np.uint8)
    largest = largest_magnitude(x) if largest is None else largest
    if not np.isfinite(largest):
        x = np.nan_to_num(x, nan=0, posinf=0, neginf=0)
        largest = largest_magnitude(x)
    if quant_weights is None and QUANTIZERS[qtype].plain is None:
        quant_weights = np.ones(x.shape[1], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        quantize_rows(x, qtype, quant_weights, blocks, largest)
        if correlations is not None:
            refine_rows(x, qtype, correlations, blocks)
    return blocks


def negligible(qtype: QType) -> float:
    """An error that means nothing in this type."""
    return 0.0 if qtype in HOLDS else NEGLIGIBLE


def idle_columns(x: Values, q: Values) -> Flags:
    """Columns that are zero in every row of the file and not in the source, with all of their IDLE; none if all are.

    Why: llama.cpp's quantizers write zeros for sub-blocks whose columns have no counts in the importance matrix.
    """
    used: Flags = np.asarray(x.any(axis=0))
    idle: Flags = used & ~np.asarray(q.any(axis=0))
    if len(q) and q.shape[1] % IDLE == 0:
        idle &= np.repeat(~q.reshape(len(q), -1, IDLE).any(axis=(0, 2)), IDLE)
    return idle if len(x) >= MIN_ROWS_FOR_COLUMNS and (idle != used).any() else np.zeros_like(idle)


def _unrelated(x: Values, q: Values) -> Flags:
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64) * np.einsum("ij,ij->i", q, q, dtype=np.float64))
        cosine = np.einsum("ij,ij->i", x, q, dtype=np.float64) / lengths
        agreement = (np.sign(x) * np.sign(q)).sum(axis=1) / np.maximum((x != 0).sum(axis=1), 1)
    found: Flags = (cosine < UNRELATED) & (agreement < UNRELATED)
    return found
