"""Some rows of a tensor, looked at closely: what the file has, and what our own quantizer makes of the source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.gguf_layout import QType, row_bytes
from gguf3n.formats.rows import Values
from gguf3n.validation.bands import FEW, HOLDS, MARGIN, ROW_RATIO, Spread
from gguf3n.validation.weights import Pair, dequantize_into
from gguf3n.validation.yardsticks import PerRow, error, misplaced, row_errors

UNRELATED = 0.25
"""Rows are strangers if their cosine and their surplus of equal signs are both below this.

# measured: rows of scripts/measure_bands.py: no sound row of any type, 99.8 % or more of strangers
"""
NEGLIGIBLE = 1e-3
"""A relative error that blocks always may have: a scale of half precision can't be nearer."""
MIN_ROWS_FOR_COLUMNS = 16
"""To say of a column that it is zero everywhere."""


@dataclass(frozen=True)
class Evidence:
    """Rows of the source, of the file, and of the source requantized.

    Shapes: x, q, own float32[n_rows, n_per_row]; errors, own_errors, misplaced, own_misplaced, bad [n_rows].
    """

    rows: NDArray[np.int64]
    x: Values
    q: Values
    own: Values
    errors: PerRow
    own_errors: PerRow
    misplaced: PerRow
    own_misplaced: PerRow
    bad: NDArray[np.bool_]
    identical: bool
    """The file's bytes are those of our quantizer."""
    n_idle: int
    """Columns left out: see idle_columns."""

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


def examine(
    pair: Pair,
    rows: NDArray[np.int64],
    x: Values,
    blocks: NDArray[np.uint8],
    q: Values,
    quant_weights: NDArray[np.float32] | None,
    allowed: Spread,
    *,
    weighted: bool,
) -> Evidence:
    """Judge each row.

    Args:
        weighted: the file was made with an importance matrix that is not at hand.
    """
    idle = idle_columns(x, q) if weighted else np.zeros(x.shape[1], bool)
    x = np.where(idle, np.float32(0), x) if idle.any() else x
    own_blocks, own = requantize(x, pair.qtype, quant_weights)
    errors, own_errors = row_errors(x, q), row_errors(x, own)
    same = (own_blocks == blocks).all(axis=1)
    shares = misplaced(x, q, pair.qtype)
    own_shares = shares if same.all() else misplaced(x, own, pair.qtype)
    bad: NDArray[np.bool_] = ~np.isfinite(errors) | (~q.any(axis=1) & own.any(axis=1))
    bad |= shares > allowed.row_misplaced + own_shares
    bad |= _unrelated(x, q) & ~_unrelated(x, own)
    if not weighted:
        bad |= errors > np.maximum(ROW_RATIO * own_errors, negligible(pair.qtype))
    return Evidence(
        rows, x, q, own, errors, own_errors, shares, own_shares, bad & ~same, bool(same.all()), int(idle.sum())
    )


def requantize(
    x: Values, qtype: QType, quant_weights: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.uint8], Values]:
    """The blocks and the values that our quantizer makes of rows; all columns weigh the same where none are given and
    the type needs some."""
    from gguf3n.quants import QUANTIZERS
    from gguf3n.quants.api import quantize_rows

    blocks = np.zeros((len(x), row_bytes(qtype, x.shape[1])), np.uint8)
    x = x if np.isfinite(x).all() else np.nan_to_num(x, nan=0, posinf=0, neginf=0)
    if quant_weights is None and QUANTIZERS[qtype].plain is None:
        quant_weights = np.ones(x.shape[1], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        quantize_rows(x, qtype, quant_weights, blocks, float(np.abs(x).max(initial=0)))
    own = np.empty_like(x)
    dequantize_into(blocks, qtype, own)
    return blocks, own


def negligible(qtype: QType) -> float:
    """An error that means nothing in this type."""
    return 0.0 if qtype in HOLDS else NEGLIGIBLE


def idle_columns(x: Values, q: Values) -> NDArray[np.bool_]:
    """Columns that are zero in every row of the file and not in the source; none if all are.

    Why: llama.cpp's quantizers write zeros for blocks whose columns have no counts in the importance matrix.
    """
    used: NDArray[np.bool_] = np.asarray(x.any(axis=0))
    idle: NDArray[np.bool_] = used & ~np.asarray(q.any(axis=0))
    return idle if len(x) >= MIN_ROWS_FOR_COLUMNS and (idle != used).any() else np.zeros_like(idle)


def _unrelated(x: Values, q: Values) -> NDArray[np.bool_]:
    with np.errstate(all="ignore"):
        lengths = np.sqrt(np.einsum("ij,ij->i", x, x, dtype=np.float64) * np.einsum("ij,ij->i", q, q, dtype=np.float64))
        cosine = np.einsum("ij,ij->i", x, q, dtype=np.float64) / lengths
        agreement = (np.sign(x) * np.sign(q)).mean(axis=1)
    found: NDArray[np.bool_] = (cosine < UNRELATED) & (agreement < UNRELATED)
    return found
