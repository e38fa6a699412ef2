"""How far rows are from their source, and whether they can have been made from it.

A relative error alone says little: a fine-tune that differs by a per cent adds a hundredth to what four bits lose. But
a quantizer, once it has its scales, rounds: no weight lies at a level while another level of its block is nearer. Rows
that were made from other weights break this rule, and how often they do grows with the difference, however coarse the
type and whatever importance matrix chose the scales.

    NEAREST   each weight takes the nearest level of its block
    SIGN      each weight keeps its sign: the sign bits are stored, magnitudes come from a table of vectors
    PARITY    of each eight weights at most one changes its sign: the eighth bit is not stored, signs are even in number
    (none)    F32, F16, BF16, which have no blocks; IQ1, whose vectors have no signs and no free levels

Source: the last loops of quantize_row_*_impl in ggml-quants.c, which compute levels from the final scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.ggml_types import GGML_TYPES, Rounding
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.rows import Values

PerRow = NDArray[np.float64]
"""[n_rows]"""

ERROR, SOURCE, FOUND, PRODUCT, LARGEST, WORST, LEAST, MOST, VANISHED = range(9)
"""Columns of the sums of a row: (q - x)^2, x^2, q^2, x q, and the largest |q - x|, which is no sum; then, of its units,
the largest (q - x)^2 / x^2, the least and the largest x q / q^2, and how many are zero in q only."""
N_SUMS = 9


ROUNDING: Mapping[QType, tuple[Rounding, int]] = {
    qtype: row.rounding for qtype, row in GGML_TYPES.items() if row.rounding is not None
}
"""The rule, and how many weights that follow each other share their levels or bits."""

CLEARLY = 1 - 1e-3
"""Another level counts as nearer from this share of the distance on. Why: ties and the rounding of scales."""


def misplaced(x: Values, q: Values, qtype: QType) -> PerRow:
    """Share of each row's weights (PARITY: of its runs of eight) that break the type's rule; 0 where there is none.

    Why: only the levels that other weights of the block have are compared with, so no type needs to be unpacked. Few
        are missing where there are at most 32; types with more are fine enough for `row_errors` to tell.
    """
    rule, run = ROUNDING.get(qtype, (None, 1)) if len(x) else (None, 1)
    broken: NDArray[np.bool_]
    match rule:
        case Rounding.NEAREST:
            broken = _nearer_level(x.reshape(-1, run), q.reshape(-1, run))
        case Rounding.SIGN:
            broken = _turned(x, q)
        case Rounding.PARITY:
            broken = _turned(x, q).reshape(-1, run).sum(axis=1) > 1
        case None:
            return np.zeros(len(x))
    share: PerRow = broken.reshape(len(x), -1).mean(axis=1)
    return share


def _nearer_level(x: Values, q: Values) -> NDArray[np.bool_]:
    """Whether a level of the same run is nearer. Shapes: [n_runs, run]."""
    with np.errstate(invalid="ignore"):  # infinity less infinity
        found: NDArray[np.bool_] = nearest_other(x, q) < np.abs(x - q) * np.float32(CLEARLY)
    return found


def nearest_other(x: Values, q: Values) -> Values:
    """The distance of each weight from the nearest level that a weight of its run has. Shapes: [n_runs, run]."""
    nearest = np.full(x.shape, np.inf, np.float32)
    with np.errstate(invalid="ignore"):
        for level in range(q.shape[1]):
            np.minimum(nearest, np.abs(x - q[:, level, None]), out=nearest)
    return nearest


def _turned(x: Values, q: Values) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.signbit(x) != np.signbit(q)
    found &= (x != 0) & (q != 0)
    return found


def relative(error: PerRow, source: PerRow) -> PerRow:
    """Root of squared errors over squares: 0 where there is neither, infinite where only the source is 0 or the rest
    is not a number."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = np.sqrt(np.where(error == 0, 0.0, error / source))
    return np.where(np.isnan(share), np.inf, share)


def sum_rows(x: Values, q: Values, sums: NDArray[np.float64], unit: int | None = None, floor: float = 0.0) -> None:
    """What every measure of an error is made of, in float64. Shapes: sums [n_rows, N_SUMS], columns as ERROR says.

    Args:
        unit: weights of a unit; a row where it is not given, or is no part of one.
        floor: sum of the squares of a unit that is next to nothing.
    """
    from gguf3n.quants.comparison import compare_rows  # numba: only when there is something to compare

    n_per_row = x.shape[1]
    unit = unit if unit is not None and n_per_row % unit == 0 else n_per_row
    compare_rows(x.reshape(-1, unit), q.reshape(-1, unit), floor, sums)


def row_errors(x: Values, q: Values) -> PerRow:
    """||q - x|| / ||x|| of each row."""
    sums = np.empty((len(x), N_SUMS))
    sum_rows(x, q, sums)
    return relative(sums[:, ERROR], sums[:, SOURCE])


def error(x: Values, q: Values) -> float:
    """||q - x|| / ||x|| of all rows together."""
    return float(row_errors(x.reshape(1, -1), q.reshape(1, -1))[0])
