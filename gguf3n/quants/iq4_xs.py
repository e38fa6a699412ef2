"""IQ4_XS: super-blocks of 8 blocks of 32 weights, each with a 6-bit scale, 4 bits each on IQ4_NL's scale of values;
4.25 bits a weight.

    super-block (136 bytes)   d         float16      scale of the scales
                              scales_h  uint16       high two bits of the scales, block 0 lowest
                              scales_l  uint8[4]     low four bits, even blocks in the low halves
                              qs        uint8[128]   levels, 16 bytes a block as in IQ4_NL
    weight = d * (scale - 32) * VALUES[level]

Source: quantize_row_iq4_nl_impl and quantize_iq4_xs in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.iq4_nl import BLOCK, ONE, SCALE, WEIGHTS, ZERO, pack, search_scale
from gguf3n.quants.iq4_nl import ROWS as BLOCK_ROWS
from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, kernel, scratch, sum_of_squares, weigh, write_f16
from gguf3n.quants.vectors import WIDTH, level, load, splat, store, where

BLOCKS = SUPER_BLOCK // BLOCK
SUPER_BYTES = 2 + 2 + BLOCKS // 2 + SUPER_BLOCK // 2

SCALES = BLOCK_ROWS
ROWS = SCALES + BLOCKS


@inlined
def quantize_scales(S: np.ndarray, packed: np.ndarray) -> None:
    """Round the scales to 6 bits (rows SCALES, then 0 .. 63) and pack the levels that they give; row SCALE is d."""
    peak = splat(ZERO)
    for block in range(BLOCKS):
        scale = load(S, SCALES + block)
        peak = where(abs(scale) > abs(peak), scale, peak)
    d = -peak / np.float32(32)
    store(S, SCALE, d)
    inverse = where(d != ZERO, ONE / d, ZERO)
    for block in range(BLOCKS):
        rounded = level(inverse * load(S, SCALES + block), -32, 31)
        store(S, SCALES + block, rounded + np.float32(32))
        scale = d * rounded
        pack(S, block * BLOCK, where(scale != ZERO, ONE / scale, ZERO), packed, block * (BLOCK // 2))


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight and its size, or else by its square.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 136].
    Exact: byte-equal to ggml.
    """
    S = scratch(ROWS, WIDTH)
    packed = np.empty((SUPER_BLOCK // 2, WIDTH), dtype=np.uint8)
    for first in range(0, rows.shape[0], WIDTH):
        for start in range(0, rows.shape[1], SUPER_BLOCK):
            gather(rows, first, start, SUPER_BLOCK, S)
            variance = sum_of_squares(S, 0, SUPER_BLOCK) * np.float32(2 / SUPER_BLOCK)
            for block in range(BLOCKS):
                weigh(S, block * BLOCK, BLOCK, quant_weights, start + block * BLOCK, variance, WEIGHTS)
                store(S, SCALES + block, search_scale(S, block * BLOCK))
            quantize_scales(S, packed)
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                y = out[first + lane, start // SUPER_BLOCK * SUPER_BYTES : (start // SUPER_BLOCK + 1) * SUPER_BYTES]
                write_f16(S[SCALE, lane], y)
                y[2:8] = np.uint8(0)
                for block in range(BLOCKS):
                    scale = np.int32(S[SCALES + block, lane])
                    y[2 + block // 4] |= np.uint8(scale >> 4 << 2 * (block % 4))
                    y[4 + block // 2] |= np.uint8((scale & 15) << 4 * (block % 2))
                for j in range(SUPER_BLOCK // 2):
                    y[8 + j] = packed[j, lane]
