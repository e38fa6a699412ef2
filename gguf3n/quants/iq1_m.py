"""IQ1_M: 256 weights in 16 sub-blocks of 16, two groups of eight each; 1.75 bits a weight.

    block (56 bytes)   qs      uint8[32]   low eight bits of the grid indices, one a group
                       qh      uint8[16]   a sub-block each: for its first group (low half) and its second, the high
                                           three bits of the grid index, and a bit that is set where the shift is
                                           negative
                       scales  uint16[4]   three bits of the scale of four sub-blocks, low to high; the upper four
                                           bits of all are a float16, the scale of the scales
    weight = d * (2 * scale + 1) * (level - 1 +- 1/8), level 0, 1 or 2

The search is that of IQ1_S, with four pairs of shifts in place of two shifts.

Source: quantize_row_iq1_m_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.codes import digit, has_bit
from gguf3n.quants.iq1_s import (
    LOWEST,
    MINUS_0,
    MINUS_1,
    MINUS_2,
    PLUS_0,
    PLUS_1,
    PLUS_2,
    code_of_ranks,
    find_ranks,
    improves,
    magnitude,
    values_of,
)
from gguf3n.quants.lanes import SUPER_BLOCK, f16_bits, gather, inlined, kernel, scratch, sum_of_squares, weigh
from gguf3n.quants.ternary import (
    GROUP,
    MOVED_BIT,
    ONE,
    TERMS,
    TWO,
    ZERO,
    Tables,
    check_codes,
    choose,
    find_place,
    find_terms,
    round_scales,
    settle,
    tables,
)
from gguf3n.quants.vectors import WIDTH, Vector, any_lane, load, splat, store, where

THREE = np.float32(3.0)

SUB_BLOCK = 16
SUB_BLOCKS = SUPER_BLOCK // SUB_BLOCK
N_GROUPS = SUB_BLOCK // GROUP
BLOCK_BYTES = 32 + 16 + 8
NEARLY_ZERO = np.float32(1e-7)

# rows of the scratch array; row i < 256 holds weight i of every lane
WEIGHTS = SUPER_BLOCK
RANK = WEIGHTS + SUPER_BLOCK
SUMS = RANK + SUB_BLOCK  # four a split: of both groups, of the weights below it times their importance, and of these
ABOVE = SUMS + 4 * (SUB_BLOCK + 1)  # what the second split adds to each of four sums
TERM = ABOVE + 4 * (SUB_BLOCK + 1)
SOUND = TERM + N_GROUPS * TERMS
CODES = SOUND + N_GROUPS
SCALES = CODES + SUB_BLOCKS * N_GROUPS
SHIFTS = SCALES + SUB_BLOCKS
D = SHIFTS + SUB_BLOCKS
LARGEST = D + 1
ROWS = LARGEST + 1


def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight and its size, or else by its square.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 56].
    Exact: byte-equal to ggml.
    """
    search_and_write(rows, quant_weights, out, tables("IQ1_S"))


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
            weigh(S, 0, SUPER_BLOCK, quant_weights, start, variance, WEIGHTS)
            for j in range(SUB_BLOCKS):
                fit_sub_block(S, j, pending, grid)
            fit_scales(S)
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                write(S, lane, grid, out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])


@inlined
def fit_sub_block(S: np.ndarray, j: int, pending: np.ndarray, grid: Tables) -> None:
    """Search the scale, the shifts and the codes of sub-block j."""
    x = j * SUB_BLOCK
    weights = WEIGHTS + x
    codes = CODES + j * N_GROUPS
    find_ranks(S, x, SUB_BLOCK, RANK)
    add_up(S, x, weights)
    scale, shifts, split_1, split_2 = best_splits(S)
    filled = (magnitude(S, x, SUB_BLOCK) >= NEARLY_ZERO) & (shifts >= ZERO)
    negative = scale < ZERO
    scale = where(negative, -scale, scale)
    shifts = where(filled, where(negative, THREE - shifts, shifts), ZERO)
    store(S, SHIFTS + j, shifts)
    for k in range(N_GROUPS):
        first = k * GROUP
        code = code_of_ranks(S, RANK + first, split_1, split_2, negative)
        store(S, codes + k, where(filled, code, ZERO))
        values = shifted_values(shifts, k)
        scaled = scale * values[0], scale * values[1], scale * values[2]
        check_codes(S, x + first, 1, scaled, codes + k, SOUND + k)
        find_terms(S, x + first, weights + first, 1, scaled, TERM + k * TERMS)
    settle(S, N_GROUPS, codes, TERM, SOUND, pending, grid)

    moved = splat(ZERO)
    sum_qx = splat(ZERO)
    sum_q2 = splat(ZERO)
    for k in range(N_GROUPS):
        code = load(S, codes + k)
        moved = where(has_bit(code, MOVED_BIT), ONE, moved)
        values = shifted_values(shifts, k)
        for i in range(GROUP):
            q = choose(digit(code, i), values)
            weighted = load(S, weights + k * GROUP + i) * q
            sum_qx = sum_qx + weighted * load(S, x + k * GROUP + i)
            sum_q2 = sum_q2 + weighted * q
    scale = where((moved > ZERO) & (sum_qx > ZERO) & (sum_q2 > ZERO), sum_qx / sum_q2, scale)
    store(S, SCALES + j, where(filled, scale, ZERO))


@inlined
def shifted_values(shifts: Vector, k: int) -> tuple[Vector, Vector, Vector]:
    """Values of the levels in group k; shifts 0, 1, 2 and 3 mean + +, + -, - + and - -."""
    return values_of(shifts < TWO if k == 0 else (shifts == ZERO) | (shifts == TWO))


@inlined
def add_up(S: np.ndarray, x: int, weights: int) -> None:
    """Sums over the weights below each split, group by group."""
    for i in range(4 * (SUB_BLOCK + 1)):
        store(S, SUMS + i, splat(ZERO))
    for i in range(SUB_BLOCK):
        group = 0 if i < GROUP else 2
        for lane in range(WIDTH):
            row = SUMS + 4 + 4 * np.int64(S[RANK + i, lane]) + group
            S[row, lane] = S[weights + i, lane] * S[x + i, lane]
            S[row + 1, lane] = S[weights + i, lane]
    for i in range(4, 4 * (SUB_BLOCK + 1)):
        store(S, SUMS + i, load(S, SUMS + i - 4) + load(S, SUMS + i))


@inlined
def best_splits(S: np.ndarray) -> tuple[Vector, Vector, Vector, Vector]:
    """Try every pair of splits with every pair of shifts.

    Returns scale, shifts (0 to 3, or -1 if there is no solution), and the ranks from which levels 1 and 2 begin.
    """
    all_x0 = load(S, SUMS + 4 * SUB_BLOCK)
    all_w0 = load(S, SUMS + 4 * SUB_BLOCK + 1)
    all_x1 = load(S, SUMS + 4 * SUB_BLOCK + 2)
    all_w1 = load(S, SUMS + 4 * SUB_BLOCK + 3)
    for i in range(SUB_BLOCK + 1):
        below_w0 = load(S, SUMS + 4 * i + 1)
        below_w1 = load(S, SUMS + 4 * i + 3)
        store(S, ABOVE + 4 * i, below_w0 * (PLUS_1 * PLUS_1 - PLUS_2 * PLUS_2))
        store(S, ABOVE + 4 * i + 1, below_w0 * (MINUS_1 * MINUS_1 - MINUS_2 * MINUS_2))
        store(S, ABOVE + 4 * i + 2, below_w1 * (PLUS_1 * PLUS_1 - PLUS_2 * PLUS_2))
        store(S, ABOVE + 4 * i + 3, below_w1 * (MINUS_1 * MINUS_1 - MINUS_2 * MINUS_2))

    best = splat(LOWEST)
    scale = splat(ZERO)
    shifts = splat(-ONE)
    split_1 = splat(ZERO)
    split_2 = splat(ZERO)
    for i1 in range(SUB_BLOCK + 1):
        below_x0 = load(S, SUMS + 4 * i1)
        below_w0 = load(S, SUMS + 4 * i1 + 1)
        below_x1 = load(S, SUMS + 4 * i1 + 2)
        below_w1 = load(S, SUMS + 4 * i1 + 3)
        plus_w0 = all_w0 * PLUS_2 * PLUS_2 + below_w0 * (PLUS_0 * PLUS_0 - PLUS_1 * PLUS_1)
        plus_w1 = all_w1 * PLUS_2 * PLUS_2 + below_w1 * (PLUS_0 * PLUS_0 - PLUS_1 * PLUS_1)
        minus_w0 = all_w0 * MINUS_2 * MINUS_2 + below_w0 * (MINUS_0 * MINUS_0 - MINUS_1 * MINUS_1)
        minus_w1 = all_w1 * MINUS_2 * MINUS_2 + below_w1 * (MINUS_0 * MINUS_0 - MINUS_1 * MINUS_1)
        for i2 in range(i1, SUB_BLOCK + 1):
            sum_x0 = below_x0 + load(S, SUMS + 4 * i2)
            sum_x1 = below_x1 + load(S, SUMS + 4 * i2 + 2)
            plus_x0 = all_x0 * PLUS_2 - sum_x0
            plus_x1 = all_x1 * PLUS_2 - sum_x1
            minus_x0 = all_x0 * MINUS_2 - sum_x0
            minus_x1 = all_x1 * MINUS_2 - sum_x1
            plus_q0 = plus_w0 + load(S, ABOVE + 4 * i2)
            plus_q1 = plus_w1 + load(S, ABOVE + 4 * i2 + 2)
            minus_q0 = minus_w0 + load(S, ABOVE + 4 * i2 + 1)
            minus_q1 = minus_w1 + load(S, ABOVE + 4 * i2 + 3)
            qx_0, q2_0 = plus_x0 + plus_x1, plus_q0 + plus_q1
            qx_1, q2_1 = plus_x0 + minus_x1, plus_q0 + minus_q1
            qx_2, q2_2 = minus_x0 + plus_x1, minus_q0 + plus_q1
            qx_3, q2_3 = minus_x0 + minus_x1, minus_q0 + minus_q1
            better_0 = improves(qx_0, q2_0, best)
            if any_lane(
                better_0 | improves(qx_1, q2_1, best) | improves(qx_2, q2_2, best) | improves(qx_3, q2_3, best)
            ):
                scale = where(better_0, qx_0 / q2_0, scale)
                best = where(better_0, scale * qx_0, best)
                better_1 = improves(qx_1, q2_1, best)
                scale = where(better_1, qx_1 / q2_1, scale)
                best = where(better_1, scale * qx_1, best)
                better_2 = improves(qx_2, q2_2, best)
                scale = where(better_2, qx_2 / q2_2, scale)
                best = where(better_2, scale * qx_2, best)
                better_3 = improves(qx_3, q2_3, best)
                scale = where(better_3, qx_3 / q2_3, scale)
                best = where(better_3, scale * qx_3, best)
                found = where(better_1, ONE, where(better_0, ZERO, shifts))
                shifts = where(better_3, THREE, where(better_2, TWO, found))
                better = better_0 | better_1 | better_2 | better_3
                split_1 = where(better, np.float32(i1), split_1)
                split_2 = where(better, np.float32(i2), split_2)
    return scale, shifts, split_1, split_2


@inlined
def fit_scales(S: np.ndarray) -> None:
    """Round the scales to three bits, then fit d to all weights."""
    d, largest = round_scales(S, SCALES, SUB_BLOCKS, 7)
    sum_qx = splat(ZERO)
    sum_q2 = splat(ZERO)
    for group in range(SUB_BLOCKS * N_GROUPS):
        j = group // N_GROUPS
        code = load(S, CODES + group)
        values = shifted_values(load(S, SHIFTS + j), group % N_GROUPS)
        step = TWO * load(S, SCALES + j) + ONE
        for i in range(group * GROUP, group * GROUP + GROUP):
            q = choose(digit(code, i - group * GROUP), values) * step
            weighted = load(S, WEIGHTS + i) * q
            sum_qx = sum_qx + weighted * load(S, i)
            sum_q2 = sum_q2 + weighted * q
    d = where(sum_q2 > ZERO, sum_qx / sum_q2, d)
    store(S, D, d * np.float32(1.1125))
    store(S, LARGEST, largest)


@inlined
def write(S: np.ndarray, lane: int, grid: Tables, y: np.ndarray) -> None:
    """Write one lane's super-block."""
    # ggml quirk: where all scales are zero, the codes stay, but not the shifts and d.
    filled = S[LARGEST, lane] != ZERO
    for j in range(SUB_BLOCKS):
        first = find_place(grid, S[CODES + j * N_GROUPS, lane])
        second = find_place(grid, S[CODES + j * N_GROUPS + 1, lane])
        shifts = np.int64(S[SHIFTS + j, lane]) if filled else 0
        y[2 * j] = np.uint8(first & 0xFF)
        y[2 * j + 1] = np.uint8(second & 0xFF)
        y[32 + j] = np.uint8(first >> 8 | (shifts >> 1) << 3 | (second >> 8) << 4 | (shifts & 1) << 7)
    half = np.int64(f16_bits(S[D, lane])) if filled else 0
    for part in range(4):
        word = (half >> 4 * part & 15) << 12
        for j in range(4):
            word |= np.int64(S[SCALES + 4 * part + j, lane]) << 3 * j
        y[48 + 2 * part] = np.uint8(word & 0xFF)
        y[49 + 2 * part] = np.uint8(word >> 8)
