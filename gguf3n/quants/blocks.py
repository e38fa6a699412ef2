"""What Q4_0, Q4_1, Q5_0 and Q5_1 share when they are given quant_weights: blocks of 32 weights, one a lane.

All lanes are at the same columns of `WIDTH` consecutive rows, so an importance is one number for all of them. A group
of fewer rows repeats its last one; only real rows are written.

    rows of the scratch array S     j           column j of the rows
                                    n + j       importance of weight j of a block
                                    n + 32 + j  free for the search, then level j
                                    n + 64      the scale, then the minimum

Source: quantize_row_q4_0_impl and its three siblings in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import inlined
from gguf3n.quants.vectors import WIDTH, Vector, load, splat, sqrt, store, where

BLOCK = 32
EXTRA_ROWS = BLOCK + BLOCK + 2
"""Rows of S besides the columns; 16384 columns make S 1 MiB large."""

ZERO = np.float32(0.0)
SIXTEEN = np.float32(16.0)
STRIP = 16
"""Columns moved at once: a cache line of each row."""


@inlined
def transpose(rows: np.ndarray, first: int, S: np.ndarray) -> None:
    """Put rows first, first + 1, ... into S, one a lane."""
    for start in range(0, rows.shape[1], STRIP):
        for lane in range(WIDTH):
            x = rows[min(first + lane, rows.shape[0] - 1), start : start + STRIP]
            for j in range(STRIP):
                S[start + j, lane] = x[j]


@inlined
def mean_square(S: np.ndarray, n_per_row: int) -> Vector:
    """The mean of the squares of each row, summed from left to right."""
    total = splat(ZERO)
    for j in range(n_per_row):
        x = load(S, j)
        total = total + x * x
    return total / np.float32(n_per_row)


@inlined
def weigh(S: np.ndarray, quant_weights: np.ndarray, column: int, sigma2: Vector, importances: int) -> None:
    """Importance of each weight of a block: quant_weight * sqrt(mean square of the row + x**2)."""
    for j in range(BLOCK):
        x = load(S, column + j)
        store(S, importances + j, quant_weights[column + j] * sqrt(sigma2 + x * x))


@inlined
def pack_low_bits(S: np.ndarray, levels: int, packed: np.ndarray, first: int) -> None:
    """Bits 0-3 of the levels in rows `levels` + j of S, to 16 rows of `packed`, uint8[n, WIDTH]; takes bit 4 away."""
    for j in range(BLOCK // 2):
        low = load(S, levels + j)
        high = load(S, levels + j + BLOCK // 2)
        low = where(low >= SIXTEEN, low - SIXTEEN, low)
        high = where(high >= SIXTEEN, high - SIXTEEN, high)
        store(packed, first + j, low + high * SIXTEEN)


@inlined
def pack_bit_4(S: np.ndarray, levels: int, packed: np.ndarray, first: int) -> None:
    """Bit 4 of the levels in rows `levels` + j of S, to 4 rows of `packed`: bit j % 8 of row j / 8."""
    for byte in range(BLOCK // 8):
        total = splat(ZERO)
        for bit in range(8):
            value = load(S, levels + 8 * byte + bit)
            total = total + where(value >= SIXTEEN, np.float32(1 << bit), ZERO)
        store(packed, first + byte, total)
