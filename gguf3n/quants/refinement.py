"""Rows quantized already, their codes refined: the blocks taken apart, improved by `descent`, put together again."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.quants.descent import descend
from gguf3n.quants.unpacked import PARTS, pack, unpack

BLOCK = 256
"""Columns whose correlations are known, unless all are."""

DAMPING = np.float32(0.01)
"""Of its own diagonal, added to a correlation matrix. Why: of few inputs, it has directions that count for nothing."""

REFINABLE: Collection[QType] = PARTS.keys()


def damped(correlations: np.ndarray) -> np.ndarray:
    """What `refine_rows` is given: the correlations with a hundredth of their diagonal added. Shapes: as for it."""
    n, width = correlations.shape
    found = np.array(correlations, np.float32)
    columns = np.arange(n)
    found[columns, columns % width] *= np.float32(1) + DAMPING
    return found


def refine_rows(rows: np.ndarray, qtype: QType, correlations: np.ndarray, blocks: np.ndarray) -> None:
    """Improve the blocks that a quantizer has made of rows, in place.

    Args:
        correlations: E[x x^T] of the inputs x: of each column, those with the columns of its block of `width`.

    Shapes: rows float32[n_rows, n_per_row]; correlations float32[n_per_row, width]; blocks uint8[n_rows, row_bytes].
    Exact: the same on every machine, and for rows together or apart; no row's error tr((W - Q) H (W - Q)^T) grows.
    """
    parts = PARTS[qtype]
    numbers = unpack(blocks, qtype)
    descend(
        rows,
        correlations,
        numbers.points,
        numbers.scales,
        numbers.minima,
        numbers.units,
        bool(parts.minima),
        *parts.points,
        *parts.scale_range,
    )
    pack(numbers, qtype, blocks)
