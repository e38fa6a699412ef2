"""IQ2_XXS: 256 weights in 8 sub-blocks of 32, four groups of eight each; 2.0625 bits a weight.

    block (66 bytes)   d   float16      scale of the scales
                       qs  uint32[16]   two a sub-block: four grid indices of eight bits; then four times the signs of
                                        a group's first seven weights, and the scale << 28
    weight = sign * d * (scale + 0.5) / 4 * grid value,  grid value = 8, 25 or 43 for the levels 0, 1, 2
    The sign of a group's last weight makes the number of minus signs even.

Source: quantize_row_iq2_xxs_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.iq2 import (
    CODES,
    LARGEST,
    NEARLY_ZERO,
    ROWS,
    SCALES,
    SIGNS,
    TERM,
    THREE,
    WEIGHTS,
    D,
    largest_weight,
    search,
    take_even_signs,
)
from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, kernel, scratch, sum_of_squares, weigh, write_f16
from gguf3n.quants.ternary import GROUP, ONE, ZERO, Tables, find_place, round_scales, tables
from gguf3n.quants.vector_search import unsigned_scale
from gguf3n.quants.vectors import WIDTH, store, where

SUB_BLOCK = 32
SUB_BLOCKS = SUPER_BLOCK // SUB_BLOCK
N_GROUPS = SUB_BLOCK // GROUP
BLOCK_BYTES = 2 + 64


def quantize(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight and its size.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row];
        out uint8[n_rows, n_per_row / 256 * 66].
    Exact: byte-equal to ggml.
    """
    search_and_write(rows, quant_weights, out, tables("IQ2_XXS"))


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
                # ggml quirk: this fit has levels up to 4, but 3 of them count as the reach.
                scale = unsigned_scale(S, j * SUB_BLOCK, WEIGHTS, TERM, SUB_BLOCK, 4)
                reach = scale * THREE
                empty = where((largest < NEARLY_ZERO) | (reach <= ZERO), ONE, ZERO)
                search(S, j, N_GROUPS, reach, scale, empty, 6, True, pending, grid)
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
    for j in range(SUB_BLOCKS):
        word = np.uint32(S[SCALES + j, lane]) << np.uint32(28)
        for k in range(N_GROUPS):
            group = j * N_GROUPS + k
            y[2 + 8 * j + k] = np.uint8(find_place(grid, S[CODES + group, lane]))
            word |= (np.uint32(S[SIGNS + group, lane]) & np.uint32(127)) << np.uint32(7 * k)
        for k in range(4):
            y[6 + 8 * j + k] = np.uint8((word >> np.uint32(8 * k)) & np.uint32(0xFF))
