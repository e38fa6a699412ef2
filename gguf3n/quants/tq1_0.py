"""TQ1_0: 256 weights, one scale, one of three values each; 1.6875 bits a weight.

    block (54 bytes)   qs  uint8[48]   five levels a byte: weights 32 n + m in byte m < 32,
                                       weights 160 + 16 n + m in byte 32 + m
                       qh  uint8[4]    four levels a byte: weights 240 + 4 n + m in byte m
                       d   float16     scale
    weight = d * (level - 1),  level 0, 1 or 2,  d = max|x|

A byte is the fraction of 256 whose first ternary digits are the levels, rounded up: so the digits come out by
multiplying with 3, and need no division.

Source: quantize_row_tq1_0_ref in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import inlined, kernel, write_f16
from gguf3n.quants.tq2_0 import ternary_levels

BLOCK = 256
BLOCK_BYTES = 48 + 4 + 2


@inlined
def pack(levels: np.ndarray, stride: int, n: int, y: np.ndarray) -> None:
    """Put levels m, stride + m, ... (n of them, from 0 to 2) into byte m, for every m below the stride."""
    for m in range(stride):
        number = np.int32(0)
        for i in range(5):
            number = np.int32(number * 3 + (np.int32(levels[i * stride + m]) if i < n else np.int32(0)))
        y[m] = np.uint8((number * 256 + 242) // 243)


@kernel
def quantize(rows: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; out uint8[n_rows, n_per_row / 256 * 54].
    Exact: byte-equal to ggml.
    """
    values = rows.reshape(-1)
    target = out.reshape(-1)
    levels = np.empty(BLOCK, dtype=np.uint8)
    for block in range(values.size // BLOCK):
        y = target[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        d = ternary_levels(values[block * BLOCK : (block + 1) * BLOCK], levels)
        pack(levels[:160], 32, 5, y[:32])
        pack(levels[160:240], 16, 5, y[32:48])
        pack(levels[240:], 4, 4, y[48:52])
        write_f16(d, y[52:])
