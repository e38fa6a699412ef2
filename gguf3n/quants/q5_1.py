"""Q5_1: 32 weights, a scale and a minimum, 5 bits each; 6 bits a weight.

    block (24 bytes)   d   float16         scale
                       m   float16         minimum
                       qh  uint32          bit 4 of the levels; bit j belongs to weight j
                       qs  uint8[16]       bits 0-3; byte j holds weight j (low half) and weight j + 16 (high half)
    weight = d * level + m,  m = min(x),  d = (max(x) - min(x)) / 31

Source: quantize_row_q5_1_ref in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants import blocks
from gguf3n.quants.lanes import f16_bits, kernel, scratch, truncated
from gguf3n.quants.superblocks import write_f16
from gguf3n.quants.vector_search import scale_and_min
from gguf3n.quants.vectors import WIDTH, level, load, store

BLOCK = 32
BLOCK_BYTES = 2 + 2 + 4 + BLOCK // 2

FIRST_STEP = np.float32(-0.9)
STEP = np.float32(0.05)
STEPS = 36


@kernel
def quantize(rows: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; out uint8[n_rows, n_per_row / 32 * 24].
    Exact: byte-equal to ggml.
    """
    values = rows.reshape(-1)
    target = out.reshape(-1)
    for block in range(values.size // BLOCK):
        x = values[block * BLOCK : (block + 1) * BLOCK]
        y = target[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        low = x[0]
        high = x[0]
        for j in range(BLOCK):
            low = x[j] if x[j] < low else low
            high = x[j] if x[j] > high else high
        d = (high - low) / np.float32(31.0)
        inverse = np.float32(1.0) / d if d != np.float32(0.0) else np.float32(0.0)
        half = f16_bits(d)
        y[0] = half & np.uint16(0xFF)
        y[1] = half >> np.uint16(8)
        half = f16_bits(low)
        y[2] = half & np.uint16(0xFF)
        y[3] = half >> np.uint16(8)
        qh = np.uint32(0)
        for j in range(BLOCK // 2):
            first = np.uint32(truncated((x[j] - low) * inverse + np.float32(0.5)))
            second = np.uint32(truncated((x[j + BLOCK // 2] - low) * inverse + np.float32(0.5)))
            y[8 + j] = np.uint8((first & 15) | ((second & 15) << 4))
            qh |= np.uint32((first >> 4) << j) | np.uint32((second >> 4) << (j + BLOCK // 2))
        for j in range(4):
            y[4 + j] = np.uint8(qh >> np.uint32(8 * j))


@kernel
def quantize_weighted(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows with quant_weights: a search for the best scale and minimum.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; quant_weights float32[n_per_row];
        out uint8[n_rows, n_per_row / 32 * 24].
    Exact: byte-equal to ggml.
    Source: quantize_row_q5_1_impl in ggml-quants.c.
    """
    n_rows, n_per_row = rows.shape
    S = scratch(n_per_row + blocks.EXTRA_ROWS, WIDTH)
    importances = n_per_row
    levels = importances + BLOCK
    fit = levels + BLOCK
    packed = np.empty((BLOCK_BYTES - 4, WIDTH), dtype=np.uint8)
    for first in range(0, n_rows, WIDTH):
        blocks.transpose(rows, first, S)
        sigma2 = blocks.mean_square(S, n_per_row)
        for column in range(0, n_per_row, BLOCK):
            blocks.weigh(S, quant_weights, column, sigma2, importances)
            d, m, inverse, low, _ = scale_and_min(
                S, column, importances, levels, BLOCK, 31, FIRST_STEP, STEP, STEPS, False
            )
            store(S, fit, d)
            store(S, fit + 1, m)
            for j in range(BLOCK):
                store(S, levels + j, level(inverse * (load(S, column + j) - low), 0, 31))
            blocks.pack_bit_4(S, levels, packed, 0)
            blocks.pack_low_bits(S, levels, packed, 4)
            start = column // BLOCK * BLOCK_BYTES
            for lane in range(min(WIDTH, n_rows - first)):
                y = out[first + lane, start : start + BLOCK_BYTES]
                write_f16(S[fit, lane], y)
                write_f16(S[fit + 1, lane], y[2:])
                for j in range(BLOCK_BYTES - 4):
                    y[4 + j] = packed[j, lane]
