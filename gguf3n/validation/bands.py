"""What each type makes of weights: the table that a file's tensors are held against.

    error     relative error, ||q - x|| / ||x||, smallest and largest
    plain     rows that are quantized without an importance matrix
    weighted  rows that are quantized with one; None where it changes nothing
    Spread    the largest ratio of the error to that of equal importances; the largest share of misplaced weights (see
              yardsticks) of many rows; that of a single row

Measured by scripts/measure_bands.py, which prints these rows, and compares them with --check. The error depends on the
weights by as much as a factor of ten, so it tells little; that of the same rows in our own quantizer tells more, and
misplaced weights tell most. Where a file has our own bytes, none of this is asked. Where it was made with an unknown
importance matrix, what is beyond a band is a warning: only what breaks a rule (see rules) is a failure. How well both
tell is in SHOWN.

# measured: llama.cpp's own quantizers compiled with and without FMA, same rows: other bytes in up to 17 % of the
# blocks, errors of all rows that differ by -1.4 % to 0.5 %, those of a single row by a factor of 2.4 (Q2_K), and no
# more misplaced weights
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.rows import FLOAT_DTYPES


@dataclass(frozen=True)
class Spread:
    """The most that was measured, or that is allowed. Units: shares of 1."""

    ratio: float
    misplaced: float
    row_misplaced: float


@dataclass(frozen=True)
class Band:
    """One row of the table."""

    error: tuple[float, float]
    plain: Spread | None
    weighted: Spread | None


@dataclass(frozen=True)
class Shown:
    """From which difference on a tensor is told from its source, whatever importances of WEIGHTS it was made with.

    `version`: each weight differs by this share of their root mean square. `scale`: all are longer by this share. None:
    by a half is not enough.
    """

    version: float | None
    scale: float | None


# fmt: off
BANDS: Mapping[QType, Band] = {
    QType.F32: Band((0, 0), Spread(1, 0, 0), None),
    QType.F16: Band((0, 0.00021), Spread(1, 0, 0), None),
    QType.BF16: Band((0, 0.00167), Spread(1, 0, 0), None),
    QType.Q4_0: Band((0.0837, 0.341), Spread(1, 0, 0), Spread(3.38, 0.0175, 0.0938)),
    QType.Q4_1: Band((0.0717, 0.258), Spread(1, 0.00129, 0.0196), Spread(2.75, 0.0264, 0.0743)),
    QType.Q5_0: Band((0.0414, 0.229), Spread(1, 0, 0), Spread(3.74, 0.0132, 0.0899)),
    QType.Q5_1: Band((0.0346, 0.155), Spread(1, 0.0021, 0.0157), Spread(3.56, 0.0212, 0.0704)),
    QType.Q8_0: Band((0.00535, 0.00849), Spread(1, 0.000809, 0.0118), None),
    QType.Q2_K: Band((0.262, 0.385), Spread(1, 0, 0), Spread(1.37, 0, 0)),
    QType.Q3_K: Band((0.139, 0.377), Spread(1, 0, 0), Spread(2.69, 0, 0)),
    QType.Q4_K: Band((0.0713, 0.256), Spread(1, 0, 0), Spread(3.22, 0, 0)),
    QType.Q5_K: Band((0.036, 0.155), Spread(1, 0, 0), Spread(3.78, 0, 0)),
    QType.Q6_K: Band((0.0177, 0.0814), Spread(1, 0, 0), Spread(3.28, 0, 0)),
    QType.IQ4_NL: Band((0.0761, 0.167), Spread(1, 4.58e-05, 0.00391), Spread(1.83, 0.000184, 0.00782)),
    QType.IQ4_XS: Band((0.0766, 0.174), Spread(1, 0.00143, 0.0157), Spread(1.87, 0.00177, 0.0196)),
    QType.IQ3_S: Band((0.142, 0.338), Spread(1, 0, 0), Spread(1.42, 0, 0)),
    QType.IQ3_XXS: Band((0.19, 0.456), Spread(1, 0, 0), Spread(1.74, 0, 0)),
    QType.IQ2_XXS: Band((0.357, 0.698), None, Spread(1.57, 0.00171, 0.125)),
    QType.IQ2_XS: Band((0.311, 0.603), None, Spread(1.67, 0, 0)),
    QType.IQ2_S: Band((0.26, 0.498), Spread(1, 0, 0), Spread(1.2, 0, 0)),
    QType.IQ1_S: Band((0.502, 0.741), None, Spread(1.25, 0, 0)),
    QType.IQ1_M: Band((0.471, 0.708), Spread(1, 0, 0), Spread(1.19, 0, 0)),
    QType.TQ1_0: Band((0.693, 0.844), Spread(1, 0, 0), None),
    QType.TQ2_0: Band((0.693, 0.844), Spread(1, 0, 0), None),
}
# fmt: on

SHOWN: Mapping[QType, Shown] = {
    QType.Q4_0: Shown(0.01, 0.05),
    QType.Q4_1: Shown(0.01, 0.05),
    QType.Q5_0: Shown(0.005, 0.02),
    QType.Q5_1: Shown(0.01, 0.02),
    QType.Q2_K: Shown(0.002, 0.005),
    QType.Q3_K: Shown(0.002, 0.005),
    QType.Q4_K: Shown(0.002, 0.005),
    QType.Q5_K: Shown(0.002, 0.005),
    QType.Q6_K: Shown(0.002, 0.005),
    QType.IQ4_NL: Shown(0.002, 0.005),
    QType.IQ4_XS: Shown(0.002, 0.005),
    QType.IQ3_S: Shown(0.002, 0.5),
    QType.IQ3_XXS: Shown(0.02, 0.5),
    QType.IQ2_XXS: Shown(0.02, None),
    QType.IQ2_XS: Shown(0.02, None),
    QType.IQ2_S: Shown(0.002, 0.5),
    QType.IQ1_S: Shown(None, 0.5),
    QType.IQ1_M: Shown(None, None),
}
"""Of each type that importances change, where they are not known.

# measured: by scripts/measure_bands.py --stale, 2026-11-21
"""

MARGIN = 1.25
"""Allowed beyond what was measured, as a factor."""
PLAIN_RATIO = 1.02
"""Allowed without an importance matrix: the same quantizer, compiled in another way."""
FEW = 2e-4
"""Misplaced weights that are allowed where none was measured."""
FEW_OF_A_ROW = 0.02
ROW_RATIO = 3.0
"""Allowed of a single row without an importance matrix."""

REFINED_RATIO = 3.0
"""Of the error to that of codes that are not refined.

# measured: 2026-11-22, 64 rows of 512 normal or heavy-tailed weights, inputs that go together (tests/refining.py): up
# to 1.98 with a column 30 times the others; up to 11 with one of 300 times, where a warning says what would decide
"""

HOLDS: Mapping[QType, frozenset[str]] = {
    QType.F32: frozenset(FLOAT_DTYPES),
    QType.F16: frozenset({"F16"}),
    QType.BF16: frozenset({"BF16"}),
}
"""The source dtypes of which a type loses nothing."""


def expected_error(qtype: QType, source_dtypes: Collection[str]) -> tuple[float, float]:
    """The relative error that a tensor should have: 0 where the type holds all of the source."""
    return (0.0, 0.0) if HOLDS.get(qtype, frozenset()).issuperset(source_dtypes) else BANDS[qtype].error


def limits(qtype: QType, *, weighted: bool, refined: bool = False) -> Spread:
    """What is allowed of rows that were quantized with an importance matrix or without.

    Args:
        refined: with codes that are not the nearest, for unknown correlations.
    """
    band = BANDS[qtype]
    measured = band.weighted if weighted or band.plain is None else band.plain
    if measured is None:
        measured = band.plain
    assert measured is not None, qtype
    if refined:
        return Spread(REFINED_RATIO * measured.ratio, 1.0, 1.0)
    return Spread(
        PLAIN_RATIO if measured is band.plain else MARGIN * measured.ratio,
        MARGIN * measured.misplaced + FEW,
        MARGIN * measured.row_misplaced + FEW_OF_A_ROW,
    )
