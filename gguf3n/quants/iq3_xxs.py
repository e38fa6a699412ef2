"""IQ3_XXS: super-blocks of 8 blocks of 32 weights; groups of 4 magnitudes on a grid of 256 points, seven sign bits for
eight weights and a 4-bit scale a block; 3.0625 bits a weight.

    super-block (98 bytes)   d                 float16     scale of the scales
                             qs                uint8[64]   grid indices, one a group
                             scales_and_signs  uint32[8]   one a block: four times seven sign bits, then the scale
    weight = d * (2 * scale + 1) * (2 * level + 1) / 4, with its sign

The eighth sign makes the number of negative weights even. Where it is odd, the least important weight changes sides.

Source: quantize_row_iq3_xxs_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.iq3_s import (
    BLOCK,
    BLOCKS,
    EMPTY,
    GROUPS,
    HIGHEST,
    LEVELS,
    MAGNITUDE,
    ONE,
    POINTS,
    ROWS,
    SCALES,
    SIGNS,
    WEIGHT,
    ZERO,
    D,
    Grid,
    grid_arrays,
    point_index,
    quantize_scales,
    search,
    weigh_block,
)
from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, kernel, scratch, sum_of_squares, write_f16
from gguf3n.quants.vectors import WIDTH, load, splat, store, where

SUPER_BYTES = 2 + 64 + 4 * BLOCKS
NEARLY_ZERO = np.float32(1e-8)


@inlined
def split_signs(S: np.ndarray, block: int) -> None:
    """Split the weights of a block into magnitudes (rows MAGNITUDE) and sign bits, seven a row (rows SIGNS).

    The weight that changes sides gets a negative magnitude.
    """
    for k in range(4):
        x = load(S, block * BLOCK + 8 * k)
        least = load(S, WEIGHT + 8 * k) * x * x
        place = splat(ZERO)
        odd = where(x < ZERO, ONE, ZERO)
        for i in range(1, 8):
            x = load(S, block * BLOCK + 8 * k + i)
            importance = load(S, WEIGHT + 8 * k + i) * x * x
            less = importance < least
            least = where(less, importance, least)
            place = where(less, np.float32(i), place)
            odd = where(x < ZERO, ONE - odd, odd)
        place = where(odd > ZERO, place, np.float32(-1))
        signs = splat(ZERO)
        for i in range(8):
            x = load(S, block * BLOCK + 8 * k + i)
            moved = place == np.float32(i)
            bit = where(x < ZERO, ONE, ZERO)
            bit = where(moved, ONE - bit, bit)
            magnitude = abs(x)
            store(S, MAGNITUDE + 8 * k + i, where(moved, -magnitude, magnitude))
            if i < 7:
                signs = signs + bit * np.float32(1 << i)
        store(S, SIGNS + 4 * block + k, signs)


@inlined
def make_scale_positive(S: np.ndarray, block: int) -> None:
    """Where the scale came out negative, change it and all signs."""
    scale = load(S, SCALES + block)
    for k in range(4):
        signs = load(S, SIGNS + 4 * block + k)
        store(S, SIGNS + 4 * block + k, where(scale < ZERO, np.float32(127) - signs, signs))
    store(S, SCALES + block, where(scale < ZERO, -scale, scale))


@kernel
def search_and_write(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray, grid: Grid) -> None:
    """The kernel of quantize."""
    S = scratch(ROWS, WIDTH)
    for first in range(0, rows.shape[0], WIDTH):
        for start in range(0, rows.shape[1], SUPER_BLOCK):
            gather(rows, first, start, SUPER_BLOCK, S)
            variance = np.float32(2) * sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
            for block in range(BLOCKS):
                weigh_block(S, block, quant_weights, start, variance)
                split_signs(S, block)
                search(S, block, 15, NEARLY_ZERO, False, grid)
                make_scale_positive(S, block)
            store(S, D, quantize_scales(S) * np.float32(1.0125))
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                y = out[first + lane, start // SUPER_BLOCK * SUPER_BYTES : (start // SUPER_BLOCK + 1) * SUPER_BYTES]
                write(S, lane, grid[2], y)


@kernel
def write(S: np.ndarray, lane: int, index: np.ndarray, y: np.ndarray) -> None:
    """Write the super-block of one lane."""
    y[:] = np.uint8(0)
    if S[HIGHEST, lane] == ZERO:
        return
    write_f16(S[D, lane], y)
    for block in range(BLOCKS):
        word = np.uint32(S[LEVELS + block, lane]) << 28
        if S[EMPTY + block, lane] == ZERO:
            for k in range(GROUPS):
                y[2 + GROUPS * block + k] = np.uint8(point_index(S[POINTS + GROUPS * block + k, lane], index))
            for k in range(4):
                word |= np.uint32(S[SIGNS + 4 * block + k, lane]) << 7 * k
        for k in range(4):
            y[66 + 4 * block + k] = np.uint8(word >> 8 * k & 0xFF)


def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight and its size, or else by its square.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 98].
    Exact: byte-equal to ggml, where ggml does not give up; see iq3_s.find_among_all.
    """
    search_and_write(rows, quant_weights, out, grid_arrays("IQ3_XXS"))
