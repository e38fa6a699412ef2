"""Q2_K: 256 weights in 16 sub-blocks of 16; a 4-bit scale and minimum each, 2 bits a weight; in all 2.625 bits each.

    block (84 bytes)   scales  uint8[16]    scales (low half) and minima (high half) of the sub-blocks
                       qs      uint8[64]    levels 0-3
                       d       float16      scale of the scales
                       dmin    float16      scale of the minima
    weight = d * scale[sub-block] * level - dmin * min[sub-block]
    half h (128 weights), i < 32:   qs[32 h + i]   weights i, i + 32, i + 64, i + 96, two bits each, low to high

Source: quantize_row_q2_K_ref and quantize_row_q2_K_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, kernel, scratch, sum_of_squares, weigh, write_f16
from gguf3n.quants.scales_mins import (
    DMIN,
    INT_MINS,
    INT_SCALES,
    ROWS,
    WEIGHTS,
    D,
    final_levels,
    fit_scales,
    fit_scales_weighted,
    fit_sub_block,
)
from gguf3n.quants.vectors import WIDTH, load, store

SUB_BLOCK = 16
SUB_BLOCKS = 16
BLOCK_BYTES = 16 + 64 + 2 + 2
N_MAX = 3
N_MAX_SCALE = 15


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; without quant_weights, a weight's error counts by its size.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 84].
    Exact: byte-equal to ggml.
    """
    S = scratch(ROWS, WIDTH)
    levels = np.empty(SUPER_BLOCK, np.uint8)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // SUPER_BLOCK):
            start = block * SUPER_BLOCK
            gather(rows, first, start, SUPER_BLOCK, S)
            if quant_weights is None:
                for j in range(SUB_BLOCKS):
                    for i in range(SUB_BLOCK):
                        store(S, WEIGHTS + i, abs(load(S, j * SUB_BLOCK + i)))
                    fit_sub_block(S, j, SUB_BLOCK, N_MAX, np.float32(-0.5), np.float32(0.1), 15, True)
                fit_scales(S, SUB_BLOCKS, N_MAX_SCALE)
            else:
                variance = sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
                for j in range(SUB_BLOCKS):
                    weigh(S, j * SUB_BLOCK, SUB_BLOCK, quant_weights, start + j * SUB_BLOCK, variance, WEIGHTS)
                    fit_sub_block(S, j, SUB_BLOCK, N_MAX, np.float32(-0.9), np.float32(0.05), 36, False)
                fit_scales_weighted(S, SUB_BLOCKS, N_MAX_SCALE)
            write(rows, first, block, S, levels, out)


@inlined
def write(rows: np.ndarray, first: int, block: int, S: np.ndarray, levels: np.ndarray, out: np.ndarray) -> None:
    """Write the super-block of every lane that has a row."""
    for lane in range(min(WIDTH, rows.shape[0] - first)):
        x = rows[first + lane, block * SUPER_BLOCK : (block + 1) * SUPER_BLOCK]
        y = out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        write_block(x, S, lane, levels, y)


@inlined
def write_block(x: np.ndarray, S: np.ndarray, lane: int, levels: np.ndarray, y: np.ndarray) -> None:
    """Write one super-block."""
    d = write_f16(S[D, lane], y[80:82])
    dmin = write_f16(S[DMIN, lane], y[82:84])
    for j in range(SUB_BLOCKS):
        # ggml quirk: what is above 15 (it comes from a negative scale) spills into the minimum.
        both = np.uint8(S[INT_SCALES + j, lane]) | np.uint8(np.uint8(S[INT_MINS + j, lane]) << 4)
        y[j] = both
        scale = d * np.float32(both & 15)
        minimum = dmin * np.float32(both >> 4)
        final_levels(x, S, lane, j, SUB_BLOCK, scale, minimum, N_MAX, levels)
    pack(levels, y[16:80])


@inlined
def pack(levels: np.ndarray, qs: np.ndarray) -> None:
    """Levels to qs."""
    for half in range(2):
        part = levels[128 * half : 128 * half + 128]
        for i in range(32):
            qs[32 * half + i] = part[i] | (part[i + 32] << 2) | (part[i + 64] << 4) | (part[i + 96] << 6)
