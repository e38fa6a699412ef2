"""Q5_K: 256 weights in 8 sub-blocks of 32; a 6-bit scale and minimum each, 5 bits a weight; 5.5 bits a weight in all.

    block (176 bytes)  d       float16      scale of the scales
                       dmin    float16      scale of the minima
                       scales  uint8[12]    scales and minima, see scales_mins.write_six_bits
                       qh      uint8[32]    high bit of the levels
                       qs      uint8[128]   low four bits
    weight = d * scale[sub-block] * level - dmin * min[sub-block]
    quarter k (64 weights), i < 32:   qs[32 k + i]   weights i (low half) and i + 32 (high half)
                                     qh[i]          bits 2 k and 2 k + 1 belong to these two

Source: quantize_row_q5_K_ref and quantize_row_q5_K_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import inlined, kernel, scratch
from gguf3n.quants.scales_mins import (
    ROWS,
    WEIGHTS,
    fit_scales,
    fit_scales_weighted,
    fit_sub_block,
    limit_integers,
    write_head,
)
from gguf3n.quants.superblocks import SUPER_BLOCK, gather, sum_of_squares, weigh_columns, weigh_magnitudes
from gguf3n.quants.vectors import WIDTH

SUB_BLOCK = 32
SUB_BLOCKS = 8
BLOCK_BYTES = 2 + 2 + 12 + 32 + 128
N_MAX = 31
N_MAX_SCALE = 63


@kernel
def quantize(rows: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; out uint8[n_rows, n_per_row / 256 * 176].
    Exact: byte-equal to ggml.
    """
    S = scratch(ROWS, WIDTH)
    levels = np.empty(SUPER_BLOCK, np.uint8)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // SUPER_BLOCK):
            gather(rows, first, block * SUPER_BLOCK, S)
            for j in range(SUB_BLOCKS):
                weigh_magnitudes(S, j * SUB_BLOCK, SUB_BLOCK, WEIGHTS)
                fit_sub_block(S, j, SUB_BLOCK, N_MAX, np.float32(-0.5), np.float32(0.1), 15, False)
            fit_scales(S, SUB_BLOCKS, N_MAX_SCALE)
            limit_integers(S, SUB_BLOCKS, N_MAX_SCALE)
            write(rows, first, block, S, levels, out)


@kernel
def quantize_weighted(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows with importances.

    Shapes: as for quantize; quant_weights float32[n_per_row].
    Exact: byte-equal to ggml.
    """
    S = scratch(ROWS, WIDTH)
    levels = np.empty(SUPER_BLOCK, np.uint8)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // SUPER_BLOCK):
            gather(rows, first, block * SUPER_BLOCK, S)
            variance = np.float32(2.0) * sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
            for j in range(SUB_BLOCKS):
                weigh_columns(S, j * SUB_BLOCK, SUB_BLOCK, variance, quant_weights[block * SUPER_BLOCK :], WEIGHTS)
                fit_sub_block(S, j, SUB_BLOCK, N_MAX, np.float32(-0.9), np.float32(0.05), 36, False)
            fit_scales_weighted(S, SUB_BLOCKS, N_MAX_SCALE)
            limit_integers(S, SUB_BLOCKS, N_MAX_SCALE)  # ggml quirk: Q4_K does not
            write(rows, first, block, S, levels, out)


@inlined
def write(rows: np.ndarray, first: int, block: int, S: np.ndarray, levels: np.ndarray, out: np.ndarray) -> None:
    """Write the super-block of every lane that has a row."""
    for lane in range(min(WIDTH, rows.shape[0] - first)):
        x = rows[first + lane, block * SUPER_BLOCK : (block + 1) * SUPER_BLOCK]
        y = out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        write_head(x, S, lane, N_MAX, levels, y)
        pack(levels, y[16:48], y[48:176])


@inlined
def pack(levels: np.ndarray, qh: np.ndarray, qs: np.ndarray) -> None:
    """Levels to qh and qs."""
    for i in range(32):
        high = 0
        for k in range(8):
            high |= (levels[32 * k + i] >> 4) << k
        qh[i] = high
    for k in range(4):
        part = levels[64 * k : 64 * k + 64]
        for i in range(32):
            qs[32 * k + i] = (part[i] & 15) | ((part[i + 32] & 15) << 4)
