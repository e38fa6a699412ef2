"""Q4_0: 32 weights, one scale, 4 bits each; 4.5 bits a weight.

    block (18 bytes)   d   float16         scale
                       qs  uint8[16]       levels 0-15; byte j holds weight j (low half) and weight j + 16 (high half)
    weight = d * (level - 8),  d = (the weight of largest magnitude) / -8

Source: quantize_row_q4_0_ref in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants import blocks
from gguf3n.quants.lanes import f16_bits, first_peak, kernel, scratch, truncated
from gguf3n.quants.superblocks import write_f16
from gguf3n.quants.vector_search import symmetric_scale
from gguf3n.quants.vectors import WIDTH, level, load, store, where

BLOCK = 32
BLOCK_BYTES = 2 + BLOCK // 2


@kernel
def quantize(rows: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; out uint8[n_rows, n_per_row / 32 * 18].
    Exact: byte-equal to ggml.
    """
    values = rows.reshape(-1)
    target = out.reshape(-1)
    for block in range(values.size // BLOCK):
        x = values[block * BLOCK : (block + 1) * BLOCK]
        y = target[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        d = first_peak(x) / np.float32(-8.0)
        inverse = np.float32(1.0) / d if d != np.float32(0.0) else np.float32(0.0)
        half = f16_bits(d)
        y[0] = half & np.uint16(0xFF)
        y[1] = half >> np.uint16(8)
        for j in range(BLOCK // 2):
            low = min(truncated(x[j] * inverse + np.float32(8.5)), np.int32(15))
            high = min(truncated(x[j + BLOCK // 2] * inverse + np.float32(8.5)), np.int32(15))
            y[2 + j] = np.uint8(low | (high << 4))


@kernel
def quantize_weighted(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows with quant_weights: a search for the best scale.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; quant_weights float32[n_per_row];
        out uint8[n_rows, n_per_row / 32 * 18].
    Exact: byte-equal to ggml.
    Source: quantize_row_q4_0_impl in ggml-quants.c.
    """
    n_rows, n_per_row = rows.shape
    S = scratch(n_per_row + blocks.EXTRA_ROWS, WIDTH)
    importances = n_per_row
    levels = importances + BLOCK
    fit = levels + BLOCK
    packed = np.empty((BLOCK_BYTES - 2, WIDTH), dtype=np.uint8)
    for first in range(0, n_rows, WIDTH):
        blocks.transpose(rows, first, S)
        sigma2 = blocks.mean_square(S, n_per_row)
        for column in range(0, n_per_row, BLOCK):
            blocks.weigh(S, quant_weights, column, sigma2, importances)
            d, inverse = symmetric_scale(S, column, importances, levels, BLOCK, 8)
            store(S, fit, d)
            for j in range(BLOCK):
                found = level(inverse * load(S, column + j), -8, 7) + np.float32(8)
                # ggml quirk: a block of zeros gets level 0, not the level that means zero
                store(S, levels + j, where(inverse == np.float32(0.0), np.float32(0.0), found))
            blocks.pack_low_bits(S, levels, packed, 0)
            start = column // BLOCK * BLOCK_BYTES
            for lane in range(min(WIDTH, n_rows - first)):
                y = out[first + lane, start : start + BLOCK_BYTES]
                write_f16(S[fit, lane], y)
                for j in range(BLOCK_BYTES - 2):
                    y[2 + j] = packed[j, lane]
