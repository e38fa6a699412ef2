"""What Q4_K and Q5_K share: all but the first candidates of their searches and the number of bits.

    block   d       float16      scale of the scales
            dmin    float16      scale of the minima
            scales  uint8[12]    scales and minima of 8 sub-blocks of 32 weights, six bits each, see write_six_bits
            qh      uint8[32]    bit 4 of the levels; Q5_K only
            qs      uint8[128]   bits 0-3

Source: quantize_row_q4_K_ref, quantize_row_q4_K_impl and their Q5_K siblings in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, pasted, scratch, sum_of_squares, weigh, write_f16
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
from gguf3n.quants.vectors import WIDTH, load, sqrt, store, where

SUB_BLOCK = 32
SUB_BLOCKS = 8
HEAD_BYTES = 2 + 2 + 12
N_MAX_SCALE = 63


@pasted
def search_and_write(
    rows: np.ndarray,
    quant_weights: np.ndarray | None,
    out: np.ndarray,
    bits: int,
    first_step: np.float32,
    n_steps: int,
) -> None:
    """Quantize float32 rows to levels of this many bits.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, row_bytes].
    Args:
        first_step, n_steps: of the search without quant_weights, see scale_and_min; its step is 0.1.
    """
    n_max = (1 << bits) - 1
    block_bytes = HEAD_BYTES + 32 * bits
    S = scratch(ROWS, WIDTH)
    levels = np.empty(SUPER_BLOCK, np.uint8)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // SUPER_BLOCK):
            start = block * SUPER_BLOCK
            gather(rows, first, start, SUPER_BLOCK, S)
            if quant_weights is None:
                for j in range(SUB_BLOCKS):
                    weigh_magnitudes(S, j * SUB_BLOCK)
                    fit_sub_block(S, j, SUB_BLOCK, n_max, first_step, np.float32(0.1), n_steps, False)
                fit_scales(S, SUB_BLOCKS, N_MAX_SCALE)
                limit_integers(S)
            else:
                variance = np.float32(2.0) * sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
                for j in range(SUB_BLOCKS):
                    weigh(S, j * SUB_BLOCK, SUB_BLOCK, quant_weights, start + j * SUB_BLOCK, variance, WEIGHTS)
                    fit_sub_block(S, j, SUB_BLOCK, n_max, np.float32(-0.9), np.float32(0.05), 36, False)
                fit_scales_weighted(S, SUB_BLOCKS, N_MAX_SCALE)
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                x = rows[first + lane, start : start + SUPER_BLOCK]
                y = out[first + lane, block * block_bytes : (block + 1) * block_bytes]
                write_head(x, S, lane, n_max, levels, y)
                pack(levels, bits, y[HEAD_BYTES:])


@inlined
def weigh_magnitudes(S: np.ndarray, x: int) -> None:
    """Importances of the sub-block from row x without quant_weights: magnitude plus root mean square."""
    base = sqrt(sum_of_squares(S, x, SUB_BLOCK) / np.float32(SUB_BLOCK))
    for i in range(SUB_BLOCK):
        store(S, WEIGHTS + i, base + abs(load(S, x + i)))


@inlined
def limit_integers(S: np.ndarray) -> None:
    """Integer scales and minima that fit into six bits."""
    for j in range(SUB_BLOCKS):
        for row in (INT_SCALES + j, INT_MINS + j):
            q = load(S, row)
            store(S, row, where(q < np.float32(N_MAX_SCALE), q, np.float32(N_MAX_SCALE)))


@inlined
def write_head(x: np.ndarray, S: np.ndarray, lane: int, n_max: int, levels: np.ndarray, y: np.ndarray) -> None:
    """Write the first 16 bytes of a block, and put the levels 0..n_max of its weights x into `levels`."""
    d = write_f16(S[D, lane], y[0:2])
    dmin = write_f16(S[DMIN, lane], y[2:4])
    scales = y[4:16]
    write_six_bits(S, lane, scales)
    for j in range(SUB_BLOCKS):
        scale, minimum = read_six_bits(scales, j)
        final_levels(x, S, lane, j, SUB_BLOCK, d * np.float32(scale), dmin * np.float32(minimum), n_max, levels)


@inlined
def write_six_bits(S: np.ndarray, lane: int, y: np.ndarray) -> None:
    """Pack the integers 0..63 of one lane's 8 sub-blocks into 12 bytes.

    j < 4:   y[j]      low six bits: scale j
             y[j + 4]  low six bits: minimum j
             y[j + 8]  low half: low four bits of scale j + 4; high half: of minimum j + 4
             the top bits of y[j] and y[j + 4] are bits 4 and 5 of scale and minimum j + 4
    """
    for j in range(8):
        # ggml quirk: what is above 63 spills into its neighbour.
        scale = np.uint8(S[INT_SCALES + j, lane])
        minimum = np.uint8(S[INT_MINS + j, lane])
        if j < 4:
            y[j] = scale
            y[j + 4] = minimum
        else:
            y[j + 4] = (scale & 15) | ((minimum & 15) << 4)
            y[j - 4] |= (scale >> 4) << 6
            y[j] |= (minimum >> 4) << 6


@inlined
def read_six_bits(y: np.ndarray, j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block j, as a reader of the 12 bytes finds them."""
    if j < 4:
        return y[j] & 63, y[j + 4] & 63
    return (y[j + 4] & 15) | ((y[j - 4] >> 6) << 4), (y[j + 4] >> 4) | ((y[j] >> 6) << 4)


@inlined
def pack(levels: np.ndarray, bits: int, y: np.ndarray) -> None:
    """Levels to qh, if there are five bits, and qs.

    quarter k (64 weights), i < 32:   qs[32 k + i]   weights i (low half) and i + 32 (high half)
                                      qh[i]          bits 2 k and 2 k + 1 belong to these two
    """
    if bits == 5:
        for i in range(32):
            high = 0
            for k in range(8):
                high |= (levels[32 * k + i] >> 4) << k
            y[i] = high
    qs = y[32 * (bits - 4) :]
    for k in range(4):
        part = levels[64 * k : 64 * k + 64]
        for i in range(32):
            qs[32 * k + i] = (part[i] & 15) | ((part[i + 32] & 15) << 4)
