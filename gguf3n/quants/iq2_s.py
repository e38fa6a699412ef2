"""IQ2_S: 256 weights in 16 sub-blocks of 16, two groups of eight each; 2.5625 bits a weight.

    block (82 bytes)   d       float16    scale of the scales
                       qs      uint8[32]  low eight bits of the grid indices, one a group
                       signs   uint8[32]  bit i of a group's byte: weight i is negative
                       qh      uint8[8]   high two bits of the grid indices of four groups, low to high
                       scales  uint8[8]   sub-block 2 i (low half) and 2 i + 1 (high half)
    weight = sign * d * (scales[sub-block] + 0.5) / 4 * grid value,  grid value = 8, 25 or 43 for the levels 0, 1, 2

Source: quantize_row_iq2_s_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.iq2 import CODES, FIVE, ROWS, SCALES, SIGNS, WEIGHTS, D, largest_weight, search, take_signs
from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, kernel, scratch, sum_of_squares, weigh, write_f16
from gguf3n.quants.ternary import GROUP, ONE, TWO, ZERO, Tables, find_place, round_scales, tables
from gguf3n.quants.vectors import WIDTH, load, store, where

SUB_BLOCK = 16
SUB_BLOCKS = SUPER_BLOCK // SUB_BLOCK
N_GROUPS = SUB_BLOCK // GROUP
BLOCK_BYTES = 2 + 32 + 32 + 8 + 8
NEARLY_ZERO = np.float32(1e-8)


def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its size, and by its column's quant_weight.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 82].
    Exact: byte-equal to ggml.
    """
    search_and_write(rows, quant_weights, out, tables("IQ2_S"))


@kernel
def search_and_write(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray, grid: Tables) -> None:
    """The kernel of quantize."""
    S = scratch(ROWS, WIDTH)
    pending = np.empty(N_GROUPS * WIDTH + 1, np.int64)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // SUPER_BLOCK):
            start = block * SUPER_BLOCK
            gather(rows, first, start, SUPER_BLOCK, S)
            variance = TWO * sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
            for j in range(SUB_BLOCKS):
                if quant_weights is None:
                    for i in range(SUB_BLOCK):
                        x = load(S, j * SUB_BLOCK + i)
                        store(S, WEIGHTS + i, np.float32(0.25) * variance + x * x)
                else:
                    weigh(S, j * SUB_BLOCK, SUB_BLOCK, quant_weights, start + j * SUB_BLOCK, variance, WEIGHTS)
                for k in range(N_GROUPS):
                    take_signs(S, j * N_GROUPS + k)
                largest = largest_weight(S, j * SUB_BLOCK, SUB_BLOCK)
                empty = where(largest < NEARLY_ZERO, ONE, ZERO)
                search(S, j, N_GROUPS, largest, largest / FIVE, empty, 9, False, pending, grid)
            # ggml quirk: where all scales are zero, the codes and signs stay, unlike in IQ2_XS.
            d, _ = round_scales(S, SCALES, SUB_BLOCKS, 15)
            store(S, D, d * np.float32(0.9875))
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                write(S, lane, grid, out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])


@inlined
def write(S: np.ndarray, lane: int, grid: Tables, y: np.ndarray) -> None:
    """Write one lane's super-block."""
    write_f16(S[D, lane], y[0:2])
    y[66:74] = np.uint8(0)
    for group in range(SUB_BLOCKS * N_GROUPS):
        index = find_place(grid, S[CODES + group, lane])
        y[2 + group] = np.uint8(index & 0xFF)
        y[34 + group] = np.uint8(S[SIGNS + group, lane])
        y[66 + group // 4] |= np.uint8((index >> 8) << 2 * (group % 4))
    for j in range(0, SUB_BLOCKS, 2):
        y[74 + j // 2] = np.uint8(np.int64(S[SCALES + j, lane]) | np.int64(S[SCALES + j + 1, lane]) << 4)
