"""Q3_K: 256 weights in 16 sub-blocks of 16; a 6-bit scale each, 3 bits a weight; 3.4375 bits a weight in all.

    block (110 bytes)  hmask   uint8[32]    high bit of the levels
                       qs      uint8[64]    low two bits of the levels
                       scales  uint8[12]    scales of the sub-blocks, six bits each
                       d       float16      scale of the scales
    weight = d * (scale[sub-block] - 32) * (level - 4)
    weight i + 32 k (i < 32)        bit k of hmask[i]
    half h (128 weights), i < 32:   qs[32 h + i]   weights i, i + 32, i + 64, i + 96, two bits each, low to high
    sub-block j:  low four bits     scales[j % 8], low half for j < 8, else high half
                  high two bits     scales[8 + j % 4], bits 2 (j / 4) and up

Without quant_weights, the levels themselves are searched: one weight at a time moves to the level that is best for the
scale which the others ask for, as long as that helps. With them, candidate scales are compared, of weights and then of
scales.

Source: quantize_row_q3_K_ref, quantize_row_q3_K_impl and make_q3_quants in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import (
    SUPER_BLOCK,
    gather,
    inlined,
    kernel,
    pasted,
    scratch,
    sum_of_squares,
    weigh,
    write_f16,
)
from gguf3n.quants.vector_search import NEARLY_ZERO, ONE, ZERO, symmetric_scale, symmetric_scale_of_any
from gguf3n.quants.vectors import WIDTH, any_lane, level, load, splat, store, where

SUB_BLOCK = 16
SUB_BLOCKS = 16
BLOCK_BYTES = 32 + 64 + 12 + 2
N_MAX = 4
N_MAX_SCALE = 32

# rows of the scratch array; row i < 256 holds weight i of every lane, and after its search its level 0..7
WEIGHTS = SUPER_BLOCK
SEARCH = WEIGHTS + SUB_BLOCK
SCALES = SEARCH + SUB_BLOCK
SUMS = SCALES + SUB_BLOCKS
INT_SCALES = SUMS + SUB_BLOCKS
D = INT_SCALES + SUB_BLOCKS
ROWS = D + 1


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; without quant_weights, a weight's error counts by its square.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 110].
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
                    fit_levels(S, j)
                fit_scales(S)
            else:
                variance = np.float32(2.0) * sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
                for j in range(SUB_BLOCKS):
                    weigh(S, j * SUB_BLOCK, SUB_BLOCK, quant_weights, start + j * SUB_BLOCK, variance, WEIGHTS)
                    fit_sub_block_weighted(S, j)
                fit_scales_weighted(S)
            write(rows, first, block, S, levels, out)


@pasted
def fit_levels(S: np.ndarray, j: int) -> None:
    """Search the levels of sub-block j without quant_weights; they replace the weights in S."""
    x = j * SUB_BLOCK
    peak = splat(ZERO)
    magnitude = splat(ZERO)
    for i in range(SUB_BLOCK):
        value = load(S, x + i)
        larger = abs(value) > magnitude
        magnitude = where(larger, abs(value), magnitude)
        peak = where(larger, value, peak)
    filled = magnitude >= NEARLY_ZERO
    inverse = np.float32(-N_MAX) / peak

    sum_xl = splat(ZERO)
    sum_l2 = splat(ZERO)
    for i in range(SUB_BLOCK):
        value = load(S, x + i)
        weight = value * value
        q = level(inverse * value, -N_MAX, N_MAX - 1)
        store(S, SEARCH + i, q)
        sum_xl = sum_xl + weight * value * q
        sum_l2 = sum_l2 + weight * q * q

    for _ in range(5):
        changed = magnitude < ZERO
        for i in range(SUB_BLOCK):
            value = load(S, x + i)
            old = load(S, SEARCH + i)
            weight = value * value
            rest_xl = sum_xl - weight * value * old
            rest_l2 = sum_l2 - weight * old * old
            new = level(value * rest_l2 / rest_xl, -N_MAX, N_MAX - 1)
            moved = filled & (rest_xl > ZERO) & (new != old)
            # Why: unless this branch is taken, the next weight need not wait for this one's division.
            # measured: 247 million weights/s without it, 462 with it.
            if not any_lane(moved):
                continue
            new_xl = rest_xl + weight * value * new
            new_l2 = rest_l2 + weight * new * new
            better = moved & (new_l2 > ZERO) & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
            store(S, SEARCH + i, where(better, new, old))
            sum_xl = where(better, new_xl, sum_xl)
            sum_l2 = where(better, new_l2, sum_l2)
            changed = changed | better
        if not any_lane(changed):
            break

    for i in range(SUB_BLOCK):
        # ggml quirk: the levels of a sub-block that is all zero are 0, which is not the level of zero.
        store(S, x + i, where(filled, load(S, SEARCH + i) + np.float32(N_MAX), ZERO))
    store(S, SCALES + j, where(filled & (sum_l2 > ZERO), sum_xl / sum_l2, ZERO))


@pasted
def fit_scales(S: np.ndarray) -> None:
    """Turn the scales into levels 0..63: the one of largest magnitude becomes 0, which means -32."""
    peak = splat(ZERO)
    magnitude = splat(ZERO)
    for j in range(SUB_BLOCKS):
        scale = load(S, SCALES + j)
        larger = abs(scale) > magnitude
        magnitude = where(larger, abs(scale), magnitude)
        peak = where(larger, scale, peak)
    inverse = np.float32(-N_MAX_SCALE) / peak
    for j in range(SUB_BLOCKS):
        q = level(inverse * load(S, SCALES + j), -N_MAX_SCALE, N_MAX_SCALE - 1) + np.float32(N_MAX_SCALE)
        store(S, INT_SCALES + j, where(peak != ZERO, q, ZERO))
    store(S, D, where(peak != ZERO, ONE / inverse, ZERO))


@pasted
def fit_sub_block_weighted(S: np.ndarray, j: int) -> None:
    """Search the scale of sub-block j with the importances in WEIGHTS; levels replace the weights in S."""
    x = j * SUB_BLOCK
    total = splat(ZERO)
    for i in range(SUB_BLOCK):
        total = total + load(S, WEIGHTS + i)
    store(S, SUMS + j, total)
    scale, inverse = symmetric_scale(S, x, WEIGHTS, SEARCH, SUB_BLOCK, N_MAX)
    store(S, SCALES + j, scale)
    for i in range(SUB_BLOCK):
        q = level(inverse * load(S, x + i), -N_MAX, N_MAX - 1) + np.float32(N_MAX)
        store(S, x + i, where(inverse != ZERO, q, ZERO))


@pasted
def fit_scales_weighted(S: np.ndarray) -> None:
    """Search the scale of the scales, weighted by the sub-blocks' importances."""
    d, inverse, empty = symmetric_scale_of_any(S, SCALES, SUMS, SEARCH, SUB_BLOCKS, N_MAX_SCALE)
    store(S, D, d)
    for j in range(SUB_BLOCKS):
        q = level(inverse * load(S, SCALES + j), -N_MAX_SCALE, N_MAX_SCALE - 1) + np.float32(N_MAX_SCALE)
        store(S, INT_SCALES + j, where(empty, ZERO, q))


@inlined
def write(rows: np.ndarray, first: int, block: int, S: np.ndarray, levels: np.ndarray, out: np.ndarray) -> None:
    """Write the super-block of every lane that has a row."""
    for lane in range(min(WIDTH, rows.shape[0] - first)):
        x = rows[first + lane, block * SUPER_BLOCK : (block + 1) * SUPER_BLOCK]
        y = out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        d = write_f16(S[D, lane], y[108:110])
        for j in range(SUB_BLOCKS):
            scale = d * (S[INT_SCALES + j, lane] - np.float32(N_MAX_SCALE))
            if scale != ZERO:
                store(levels, j, level(load(x, j) / scale, -N_MAX, N_MAX - 1) + np.float32(N_MAX))
            else:
                for i in range(SUB_BLOCK):
                    levels[j * SUB_BLOCK + i] = np.uint8(S[j * SUB_BLOCK + i, lane])
        pack_scales(S, lane, y[96:108])
        pack(levels, y[0:32], y[32:96])


@inlined
def pack_scales(S: np.ndarray, lane: int, y: np.ndarray) -> None:
    """Six-bit scales to 12 bytes."""
    for j in range(8):
        y[j] = np.uint8(S[INT_SCALES + j, lane]) & 15 | ((np.uint8(S[INT_SCALES + j + 8, lane]) & 15) << 4)
    for j in range(4):
        y[8 + j] = 0
        for k in range(4):
            y[8 + j] |= (np.uint8(S[INT_SCALES + 4 * k + j, lane]) >> 4) << (2 * k)


@inlined
def pack(levels: np.ndarray, hmask: np.ndarray, qs: np.ndarray) -> None:
    """Levels to hmask and qs."""
    for i in range(32):
        high = 0
        for k in range(8):
            high |= (levels[32 * k + i] >> 2) << k
        hmask[i] = high
    for half in range(2):
        part = levels[128 * half : 128 * half + 128]
        for i in range(32):
            qs[32 * half + i] = (
                (part[i] & 3) | ((part[i + 32] & 3) << 2) | ((part[i + 64] & 3) << 4) | ((part[i + 96] & 3) << 6)
            )
