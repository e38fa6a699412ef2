"""What Q2_K, Q4_K and Q5_K share: sub-blocks of 16 or 32 weights, each with a scale and a minimum, both small integers.

    rows of the scratch array S     0..255         weights of a super-block
                                    WEIGHTS + i    importances of a sub-block
                                    SEARCH + i     free for the search
                                    SCALES + j     scale of sub-block j, MINS + j its negated minimum
                                    INVERSES + j   and LOWS + j what makes the levels of the search
                                    SUMS + j       sum of the importances
                                    D, DMIN        scales of the scales and of the minima
                                    INT_SCALES + j and INT_MINS + j: scale and minimum in units of these, 0..255

Source: quantize_row_q4_K_ref, quantize_row_q4_K_impl and their Q2_K and Q5_K siblings in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import SUPER_BLOCK, inlined
from gguf3n.quants.vector_search import HIGHEST, LOWEST, ZERO, as_uint8, scale_and_min, unsigned_scale
from gguf3n.quants.vectors import Vector, level, load, splat, store, where

MAX_SUB_BLOCK = 32
MAX_SUB_BLOCKS = 16

WEIGHTS = SUPER_BLOCK
SEARCH = WEIGHTS + MAX_SUB_BLOCK
SCALES = SEARCH + MAX_SUB_BLOCK
MINS = SCALES + MAX_SUB_BLOCKS
INVERSES = MINS + MAX_SUB_BLOCKS
LOWS = INVERSES + MAX_SUB_BLOCKS
SUMS = LOWS + MAX_SUB_BLOCKS
INT_SCALES = SUMS + MAX_SUB_BLOCKS
INT_MINS = INT_SCALES + MAX_SUB_BLOCKS
D = INT_MINS + MAX_SUB_BLOCKS
DMIN = D + 1
ROWS = DMIN + 1


@inlined
def fit_sub_block(
    S: np.ndarray,
    j: int,
    sub_block: int,
    n_max: int,
    first_step: np.float32,
    step: np.float32,
    n_steps: int,
    absolute: bool,
) -> None:
    """Search scale and minimum of sub-block j, which has sub_block weights."""
    scale, minimum, inverse, low, sum_w = scale_and_min(
        S, j * sub_block, WEIGHTS, SEARCH, sub_block, n_max, first_step, step, n_steps, absolute
    )
    store(S, SCALES + j, scale)
    store(S, MINS + j, -minimum)
    store(S, INVERSES + j, inverse)
    store(S, LOWS + j, low)
    store(S, SUMS + j, sum_w)


@inlined
def fit_scales(S: np.ndarray, sub_blocks: int, n_max: int) -> None:
    """Scales and minima as integers: the largest becomes n_max."""
    store(S, D, round_to_largest(S, SCALES, INT_SCALES, sub_blocks, n_max))
    store(S, DMIN, round_to_largest(S, MINS, INT_MINS, sub_blocks, n_max))


@inlined
def fit_scales_weighted(S: np.ndarray, sub_blocks: int, n_max: int) -> None:
    """Scales and minima as integers 0..n_max with the least error, weighted by the sub-blocks' importances."""
    store(S, D, unsigned_scale(S, SCALES, SUMS, INT_SCALES, sub_blocks, n_max))
    store(S, DMIN, unsigned_scale(S, MINS, SUMS, INT_MINS, sub_blocks, n_max))


@inlined
def round_to_largest(S: np.ndarray, values: int, levels: int, n: int, n_max: int) -> Vector:
    """Round n rows in units of their largest / n_max, which is returned."""
    largest = splat(ZERO)
    for j in range(n):
        value = load(S, values + j)
        largest = where(value > largest, value, largest)
    inverse = where(largest > ZERO, np.float32(n_max) / largest, ZERO)
    for j in range(n):
        # ggml quirk: a scale can be slightly negative; it passes through a byte.
        store(S, levels + j, as_uint8(level(inverse * load(S, values + j), LOWEST, HIGHEST)))
    return largest / np.float32(n_max)


@inlined
def final_levels(
    x: np.ndarray,
    S: np.ndarray,
    lane: int,
    j: int,
    sub_block: int,
    scale: np.float32,
    minimum: np.float32,
    n_max: int,
    levels: np.ndarray,
) -> None:
    """Levels of sub-block j for its rounded scale; for a scale of zero, those of the search."""
    for i in range(sub_block // 16):
        part = j * (sub_block // 16) + i
        values = load(x, part)
        if scale != ZERO:
            store(levels, part, level((values + minimum) / scale, 0, n_max))
        else:
            store(levels, part, level((values - S[LOWS + j, lane]) * S[INVERSES + j, lane], 0, n_max))
