"""IQ1_S: 256 weights in 8 sub-blocks of 32, four groups of eight each; 1.5625 bits a weight.

    block (50 bytes)   d   float16     scale of the scales
                       qs  uint8[32]   low eight bits of the grid indices, one a group
                       qh  uint16[8]   a sub-block each: high three bits of its four grid indices, low to high; then
                                       three bits of the scale; the highest bit is set where the shift is negative
    weight = d * (2 * scale + 1) * (level - 1 +- 1/8), level 0, 1 or 2

With three levels, the best one of each weight follows from where the sorted weights are split in three. So the search
tries every pair of splits, with both shifts, and takes the scale of the best; the codes are then moved to the grid.

Source: quantize_row_iq1_s_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.codes import as_code, digit, has_bit
from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, kernel, scratch, sum_of_squares, weigh, write_f16
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
from gguf3n.quants.vectors import WIDTH, Mask, Vector, any_lane, load, splat, store, where

SUB_BLOCK = 32
SUB_BLOCKS = SUPER_BLOCK // SUB_BLOCK
N_GROUPS = SUB_BLOCK // GROUP
BLOCK_BYTES = 2 + 32 + 16
NEARLY_ZERO = np.float32(1e-12)
LOWEST = -np.finfo(np.float32).max

# values of the levels with a positive and with a negative shift
PLUS_0, PLUS_1, PLUS_2 = np.float32(-0.875), np.float32(0.125), np.float32(1.125)
MINUS_0, MINUS_1, MINUS_2 = np.float32(-1.125), np.float32(-0.125), np.float32(0.875)

# rows of the scratch array; row i < 256 holds weight i of every lane
WEIGHTS = SUPER_BLOCK
RANK = WEIGHTS + SUB_BLOCK
SUM_X = RANK + SUB_BLOCK  # of the weights below a split, times their importance
SUM_W = SUM_X + SUB_BLOCK + 1  # of their importances
ABOVE = SUM_W + SUB_BLOCK + 1  # what the weights above a split add to each of four sums
TERM = ABOVE + 4 * (SUB_BLOCK + 1)
SOUND = TERM + N_GROUPS * TERMS
CODES = SOUND + N_GROUPS
SCALES = CODES + SUB_BLOCKS * N_GROUPS
SHIFTS = SCALES + SUB_BLOCKS
D = SHIFTS + SUB_BLOCKS
LARGEST = D + 1
ROWS = LARGEST + 1


def quantize(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight and its size.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row];
        out uint8[n_rows, n_per_row / 256 * 50].
    Exact: byte-equal to ggml.
    """
    search_and_write(rows, quant_weights, out, tables("IQ1_S"))


@kernel
def search_and_write(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray, grid: Tables) -> None:
    """The kernel of quantize."""
    S = scratch(ROWS, WIDTH)
    pending = np.empty(N_GROUPS * WIDTH + 1, np.int64)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // SUPER_BLOCK):
            start = block * SUPER_BLOCK
            gather(rows, first, start, SUPER_BLOCK, S)
            variance = TWO * sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
            for j in range(SUB_BLOCKS):
                weigh(S, j * SUB_BLOCK, SUB_BLOCK, quant_weights, start + j * SUB_BLOCK, variance, WEIGHTS)
                fit_sub_block(S, j, pending, grid)
            d, largest = round_scales(S, SCALES, SUB_BLOCKS, 7)
            store(S, D, d * np.float32(1.125))
            store(S, LARGEST, largest)
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                write(S, lane, grid, out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])


@inlined
def magnitude(S: np.ndarray, x: int, n: int) -> Vector:
    """The largest magnitude of n rows."""
    largest = abs(load(S, x))
    for i in range(1, n):
        value = abs(load(S, x + i))
        largest = where(largest > value, largest, value)
    return largest


@inlined
def find_ranks(S: np.ndarray, x: int, n: int, ranks: int) -> None:
    """Where each of n rows comes when they are sorted; equal ones keep their order.

    Source: ggml leaves equal weights to qsort, which is a merge sort in glibc, so stable.
    """
    for i in range(n):
        value = load(S, x + i)
        rank = splat(ZERO)
        for k in range(i):
            rank = where(load(S, x + k) <= value, rank + ONE, rank)
        for k in range(i + 1, n):
            rank = where(load(S, x + k) < value, rank + ONE, rank)
        store(S, ranks + i, rank)


@inlined
def fit_sub_block(S: np.ndarray, j: int, pending: np.ndarray, grid: Tables) -> None:
    """Search the scale, the shift and the codes of sub-block j."""
    x = j * SUB_BLOCK
    codes = CODES + j * N_GROUPS
    find_ranks(S, x, SUB_BLOCK, RANK)
    for i in range(SUB_BLOCK):
        for lane in range(WIDTH):
            rank = np.int64(S[RANK + i, lane])
            S[SUM_X + 1 + rank, lane] = S[WEIGHTS + i, lane] * S[x + i, lane]
            S[SUM_W + 1 + rank, lane] = S[WEIGHTS + i, lane]
    sum_x = splat(ZERO)
    sum_w = splat(ZERO)
    store(S, SUM_X, sum_x)
    store(S, SUM_W, sum_w)
    for i in range(1, SUB_BLOCK + 1):
        sum_x = sum_x + load(S, SUM_X + i)
        sum_w = sum_w + load(S, SUM_W + i)
        store(S, SUM_X + i, sum_x)
        store(S, SUM_W + i, sum_w)

    scale, shift, split_1, split_2 = best_splits(S)
    filled = (magnitude(S, x, SUB_BLOCK) >= NEARLY_ZERO) & (shift != ZERO)
    negative = scale < ZERO
    scale = where(negative, -scale, scale)
    shift = where(negative, -shift, shift)
    for k in range(N_GROUPS):
        code = code_of_ranks(S, RANK + k * GROUP, split_1, split_2, negative)
        store(S, codes + k, where(filled, code, ZERO))

    values = values_of(shift > ZERO)
    scaled = scale * values[0], scale * values[1], scale * values[2]
    check_codes(S, x, N_GROUPS, scaled, codes, SOUND)
    find_terms(S, x, WEIGHTS, N_GROUPS, scaled, TERM)
    settle(S, N_GROUPS, codes, TERM, SOUND, pending, grid)
    moved = splat(ZERO)
    sum_qx = splat(ZERO)
    sum_q2 = splat(ZERO)
    for k in range(N_GROUPS):
        code = load(S, codes + k)
        moved = where(has_bit(code, MOVED_BIT), ONE, moved)
        for i in range(GROUP):
            q = choose(digit(code, i), values)
            weighted = load(S, WEIGHTS + k * GROUP + i) * q
            sum_qx = sum_qx + weighted * load(S, x + k * GROUP + i)
            sum_q2 = sum_q2 + weighted * q
    scale = where((moved > ZERO) & (sum_qx > ZERO) & (sum_q2 > ZERO), sum_qx / sum_q2, scale)
    store(S, SCALES + j, where(filled, scale, ZERO))
    store(S, SHIFTS + j, where(filled, shift, ONE))


@inlined
def code_of_ranks(S: np.ndarray, ranks: int, split_1: Vector, split_2: Vector, negative: Mask) -> Vector:
    """The code of a group whose levels 1 and 2 begin at these ranks; where `negative`, levels are exchanged."""
    code = splat(ZERO)
    for i in range(GROUP):
        rank = load(S, ranks + i)
        own = where(rank >= split_2, TWO, where(rank >= split_1, ONE, ZERO))
        code = code + where(negative, TWO - own, own) * np.float32(1 << 2 * i)
    return as_code(code)


@inlined
def values_of(plus: Mask) -> tuple[Vector, Vector, Vector]:
    """Values of the levels, with a positive shift or a negative one."""
    return where(plus, PLUS_0, MINUS_0), where(plus, PLUS_1, MINUS_1), where(plus, PLUS_2, MINUS_2)


@inlined
def best_splits(S: np.ndarray) -> tuple[Vector, Vector, Vector, Vector]:
    """Try every pair of splits with both shifts.

    Returns scale, shift (1 or -1, or 0 if there is no solution), and the ranks from which levels 1 and 2 begin.
    """
    all_x = load(S, SUM_X + SUB_BLOCK)
    all_w = load(S, SUM_W + SUB_BLOCK)
    for i in range(SUB_BLOCK + 1):
        above_x = all_x - load(S, SUM_X + i)
        above_w = all_w - load(S, SUM_W + i)
        store(S, ABOVE + 4 * i, above_x * PLUS_2)
        store(S, ABOVE + 4 * i + 1, above_x * MINUS_2)
        store(S, ABOVE + 4 * i + 2, above_w * PLUS_2 * PLUS_2)
        store(S, ABOVE + 4 * i + 3, above_w * MINUS_2 * MINUS_2)

    best = splat(LOWEST)
    scale = splat(ZERO)
    shift = splat(ZERO)
    split_1 = splat(ZERO)
    split_2 = splat(ZERO)
    for i1 in range(SUB_BLOCK + 1):
        below_x = load(S, SUM_X + i1)
        below_w = load(S, SUM_W + i1)
        plus_x = below_x * PLUS_0
        minus_x = below_x * MINUS_0
        plus_w = below_w * PLUS_0 * PLUS_0
        minus_w = below_w * MINUS_0 * MINUS_0
        for i2 in range(i1, SUB_BLOCK + 1):
            between_x = (load(S, SUM_X + i2) - below_x) * PLUS_1
            between_w = (load(S, SUM_W + i2) - below_w) * PLUS_1 * PLUS_1
            plus_qx = plus_x + between_x + load(S, ABOVE + 4 * i2)
            minus_qx = minus_x - between_x + load(S, ABOVE + 4 * i2 + 1)
            plus_q2 = plus_w + between_w + load(S, ABOVE + 4 * i2 + 2)
            minus_q2 = minus_w + between_w + load(S, ABOVE + 4 * i2 + 3)
            plus_better = improves(plus_qx, plus_q2, best)
            if any_lane(plus_better | improves(minus_qx, minus_q2, best)):
                scale = where(plus_better, plus_qx / plus_q2, scale)
                best = where(plus_better, scale * plus_qx, best)
                minus_better = improves(minus_qx, minus_q2, best)
                scale = where(minus_better, minus_qx / minus_q2, scale)
                best = where(minus_better, scale * minus_qx, best)
                shift = where(minus_better, -ONE, where(plus_better, ONE, shift))
                either = plus_better | minus_better
                split_1 = where(either, np.float32(i1), split_1)
                split_2 = where(either, np.float32(i2), split_2)
    return scale, shift, split_1, split_2


@inlined
def improves(sum_qx: Vector, sum_q2: Vector, best: Vector) -> Mask:
    """Whether a fit with these sums is better than the best one."""
    return (sum_q2 > ZERO) & (sum_qx * sum_qx > best * sum_q2)


@inlined
def write(S: np.ndarray, lane: int, grid: Tables, y: np.ndarray) -> None:
    """Write one lane's super-block."""
    write_f16(S[D, lane], y[0:2])
    for j in range(SUB_BLOCKS):
        high = np.int64(0)
        for k in range(N_GROUPS):
            index = find_place(grid, S[CODES + j * N_GROUPS + k, lane])
            y[2 + j * N_GROUPS + k] = np.uint8(index & 0xFF)
            high |= (index >> 8) << 3 * k
        # ggml quirk: where all scales are zero, the codes stay, but the shifts do not.
        if S[LARGEST, lane] != ZERO:
            high |= np.int64(S[SCALES + j, lane]) << 12 | np.int64(S[SHIFTS + j, lane] < ZERO) << 15
        y[34 + 2 * j] = np.uint8(high & 0xFF)
        y[35 + 2 * j] = np.uint8(high >> 8)
