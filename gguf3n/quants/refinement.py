"""Rows quantized already, their codes refined: the blocks taken apart, improved by `descent`, put together again."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.quants.descent import descend
from gguf3n.quants.unpacked import PARTS, pack, unpack


def refine_rows(rows: np.ndarray, qtype: QType, correlations: np.ndarray, blocks: np.ndarray) -> None:
    """Improve the blocks that a quantizer has made of rows, in place.

    Args:
        correlations: E[x x^T] of the inputs x, damped, in blocks as a file has them (formats/correlations.py).

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
