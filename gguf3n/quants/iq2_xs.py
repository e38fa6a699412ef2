"""IQ2_XS: 256 weights in 16 sub-blocks of 16, two groups of eight each; 2.3125 bits a weight.

    block (74 bytes)   d       float16      scale of the scales
                       qs      uint16[32]   a group each: grid index, and the signs of its first seven weights << 9
                       scales  uint8[8]     sub-block 2 i (low half) and 2 i + 1 (high half)
    weight = sign * d * (scales[sub-block] + 0.5) / 4 * grid value,  grid value = 8, 25 or 43 for the levels 0, 1, 2
    The sign of a group's last weight makes the number of minus signs even.

Source: quantize_row_iq2_xs_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.iq2 import (
    CODES,
    FIVE,
    LARGEST,
    NEARLY_ZERO,
    ROWS,
    SCALES,
    SIGNS,
    WEIGHTS,
    D,
    largest_weight,
    search,
    take_even_signs,
)
from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, kernel, scratch, sum_of_squares, weigh, write_f16
from gguf3n.quants.ternary import GROUP, ONE, ZERO, Tables, find_place, round_scales, tables
from gguf3n.quants.vectors import WIDTH, store, where

SUB_BLOCK = 16
SUB_BLOCKS = SUPER_BLOCK // SUB_BLOCK
N_GROUPS = SUB_BLOCK // GROUP
BLOCK_BYTES = 2 + 64 + 8


def quantize(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight and its size.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row];
        out uint8[n_rows, n_per_row / 256 * 74].
    Exact: byte-equal to ggml.
    """
    search_and_write(rows, quant_weights, out, tables("IQ2_XS"))


@kernel
def search_and_write(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray, grid: Tables) -> None:
    """The kernel of quantize."""
    S = scratch(ROWS, WIDTH)
    pending = np.empty(N_GROUPS * WIDTH + 1, np.int64)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // SUPER_BLOCK):
            start = block * SUPER_BLOCK
            gather(rows, first, start, SUPER_BLOCK, S)
            variance = sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
            for j in range(SUB_BLOCKS):
                weigh(S, j * SUB_BLOCK, SUB_BLOCK, quant_weights, start + j * SUB_BLOCK, variance, WEIGHTS)
                for k in range(N_GROUPS):
                    take_even_signs(S, j * N_GROUPS + k, WEIGHTS + k * GROUP)
                largest = largest_weight(S, j * SUB_BLOCK, SUB_BLOCK)
                empty = where(largest < NEARLY_ZERO, ONE, ZERO)
                search(S, j, N_GROUPS, largest, largest / FIVE, empty, 9, False, pending, grid)
            d, largest = round_scales(S, SCALES, SUB_BLOCKS, 15)
            store(S, D, d)
            store(S, LARGEST, largest)
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                write(S, lane, grid, out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])


@inlined
def write(S: np.ndarray, lane: int, grid: Tables, y: np.ndarray) -> None:
    """Write one lane's super-block."""
    if S[LARGEST, lane] == ZERO:
        y[:] = np.uint8(0)
        return
    write_f16(S[D, lane], y[0:2])
    for group in range(SUB_BLOCKS * N_GROUPS):
        index = find_place(grid, S[CODES + group, lane])
        y[2 + 2 * group] = np.uint8(index & 0xFF)
        y[3 + 2 * group] = np.uint8((index >> 8) | (np.int64(S[SIGNS + group, lane]) & 127) << 1)
    for j in range(0, SUB_BLOCKS, 2):
        y[66 + j // 2] = np.uint8(np.int64(S[SCALES + j, lane]) | np.int64(S[SCALES + j + 1, lane]) << 4)
