"""What the K types share: super-blocks of 256 weights, one a lane.

All lanes of a group are at the same columns of `WIDTH` consecutive rows, so an importance is one number for all of
them. A group of fewer rows repeats its last one; `write` steps then skip the copies.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import f16_bits, f16_value, inlined
from gguf3n.quants.vectors import WIDTH, Vector, load, splat, sqrt, store, transpose

SUPER_BLOCK = 256


@inlined
def gather(rows: np.ndarray, first: int, column: int, S: np.ndarray) -> None:
    """Put the super-blocks at `column` of rows first, first + 1, ... into rows 0..255 of S, one a lane."""
    for start in range(0, SUPER_BLOCK, WIDTH):
        for lane in range(WIDTH):
            x = rows[min(first + lane, rows.shape[0] - 1)]
            store(S, start + lane, load(x, (column + start) // WIDTH))
        transpose(S, start)


@inlined
def sum_of_squares(S: np.ndarray, first: int, n: int) -> Vector:
    """Sum over n rows of S, in order."""
    total = splat(np.float32(0.0))
    for i in range(first, first + n):
        x = load(S, i)
        total = total + x * x
    return total


@inlined
def weigh_magnitudes(S: np.ndarray, first: int, n: int, weights: int) -> None:
    """Importances without quant_weights: magnitude plus root mean square of the n weights from row `first`."""
    base = sqrt(sum_of_squares(S, first, n) / np.float32(n))
    for i in range(n):
        store(S, weights + i, base + abs(load(S, first + i)))


@inlined
def weigh_columns(S: np.ndarray, first: int, n: int, variance: Vector, quant_weights: np.ndarray, weights: int) -> None:
    """Importances of the n weights from row `first`; quant_weights are those of the super-block."""
    for i in range(n):
        x = load(S, first + i)
        store(S, weights + i, quant_weights[first + i] * sqrt(variance + x * x))


@inlined
def write_f16(x: np.float32, y: np.ndarray) -> np.float32:
    """Write a scale to two bytes and return what a reader will find there."""
    half = f16_bits(x)
    y[0] = half & np.uint16(0xFF)
    y[1] = half >> np.uint16(8)
    return f16_value(half)
