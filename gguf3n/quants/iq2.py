"""What the IQ2 types share: the search of a sub-block's scale and grid points, sixteen super-blocks at a time.

A sub-block is two or four groups of eight weights; its weights have lost their signs before the search. The search
tries a row of scales: it rounds the groups to the grid, computes the least-squares scale of the result, and keeps the
best. Groups that were off the grid (in IQ2_XXS all groups) are then rounded once more, with the scale found.

Source: quantize_row_iq2_xxs_impl, quantize_row_iq2_xs_impl and quantize_row_iq2_s_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.codes import digit, has_bit
from gguf3n.quants.lanes import SUPER_BLOCK, inlined, kernel
from gguf3n.quants.ternary import (
    GROUP,
    MOVED_BIT,
    ONE,
    TERMS,
    TWO,
    ZERO,
    Tables,
    find_terms,
    round_groups,
    settle,
)
from gguf3n.quants.vectors import Vector, any_lane, load, splat, sqrt, store, where

THREE = np.float32(3.0)
FIVE = np.float32(5.0)
TENTH = np.float32(0.1)

NEARLY_ZERO = np.float32(1e-15)
"""In IQ2_XXS and IQ2_XS, a sub-block whose largest weight is below this is empty."""

GROUPS = SUPER_BLOCK // GROUP
SUB_BLOCK = 32
"""The largest sub-block."""

# Rows of the scratch array; row i < 256 holds weight i of every lane, without its sign once its sub-block is done.
WEIGHTS = SUPER_BLOCK
ROOTS = WEIGHTS + SUB_BLOCK
PRODUCTS = ROOTS + SUB_BLOCK
TRIED = PRODUCTS + SUB_BLOCK  # codes
SOUND = TRIED + SUB_BLOCK // GROUP
TERM = SOUND + SUB_BLOCK // GROUP
SUM_QX = TERM + SUB_BLOCK // GROUP * TERMS
SUM_Q2 = SUM_QX + 1
CODES = SUM_Q2 + 1
SIGNS = CODES + GROUPS
SCALES = SIGNS + GROUPS
D = SCALES + SUPER_BLOCK // 16
LARGEST = D + 1
ROWS = LARGEST + 1


@inlined
def take_signs(S: np.ndarray, group: int) -> None:
    """Make a group's weights positive; signs: bit i for weight i."""
    signs = splat(ZERO)
    for i in range(GROUP):
        x = load(S, group * GROUP + i)
        positive = x >= ZERO
        signs = where(positive, signs, signs + np.float32(1 << i))
        store(S, group * GROUP + i, where(positive, x, -x))
    store(S, SIGNS + group, signs)


@inlined
def take_even_signs(S: np.ndarray, group: int, weights: int) -> None:
    """Make a group's weights positive; signs: bit i for weight i, always an even number of bits.

    Where the number of minus signs is odd, the weight that matters least gets the wrong sign, and becomes negative.
    """
    least = splat(ZERO)
    least_index = splat(ZERO)
    parity = splat(ONE)
    for i in range(GROUP):
        x = load(S, group * GROUP + i)
        parity = where(x >= ZERO, parity, -parity)
        matter = load(S, weights + i) * x * x
        less = matter < least
        least = where(less, matter, least) if i > 0 else matter
        least_index = where(less, np.float32(i), least_index) if i > 0 else least_index
    signs = splat(ZERO)
    for i in range(GROUP):
        x = load(S, group * GROUP + i)
        positive = x >= ZERO
        turned = (parity < ZERO) & (least_index == np.float32(i))
        magnitude = where(positive, x, -x)
        store(S, group * GROUP + i, where(turned, -magnitude, magnitude))
        bit = where(positive, ZERO, ONE)
        signs = signs + where(turned, ONE - bit, bit) * np.float32(1 << i)
    store(S, SIGNS + group, signs)


@inlined
def largest_weight(S: np.ndarray, x: int, n: int) -> Vector:
    """The largest of n rows."""
    largest = load(S, x)
    for i in range(1, n):
        value = load(S, x + i)
        largest = where(largest > value, largest, value)
    return largest


@inlined
def search(
    S: np.ndarray,
    sub_block: int,
    n_groups: int,
    reach: Vector,
    scale: Vector,
    empty: Vector,
    steps: int,
    all_again: bool,
    pending: np.ndarray,
    grid: Tables,
) -> None:
    """Find scale, codes and final signs of a sub-block whose weights and importances are ready.

    Args:
        reach: the weight that the first scale makes the largest value, 5.
        scale: what remains where no step is any good.
        empty: not zero in the lanes where scale and codes are to be zero.
        steps: how many scales below and above the first one to try.
        all_again: whether all groups are rounded once more in the end, or only those that were off the grid.
    """
    x = sub_block * n_groups * GROUP
    codes = CODES + sub_block * n_groups
    filled = empty == ZERO
    for i in range(n_groups * GROUP):
        weight = load(S, WEIGHTS + i)
        store(S, ROOTS + i, sqrt(weight))
        store(S, PRODUCTS + i, weight * load(S, x + i))
    for k in range(n_groups):
        store(S, codes + k, splat(ZERO))

    best = splat(ZERO)
    for step in range(-steps, steps + 1):
        inverse = (FIVE + np.float32(step) * TENTH) / reach
        round_groups(S, x, n_groups, inverse, TRIED, SOUND)
        for k in range(n_groups):
            store(S, TRIED + k, where(filled, load(S, TRIED + k), ZERO))
        evaluate(S, x, n_groups, ONE / inverse, pending, grid)
        sum_qx = load(S, SUM_QX)
        sum_q2 = load(S, SUM_Q2)
        better = (sum_q2 > ZERO) & (sum_qx * sum_qx > best * sum_q2)
        scale = where(better, sum_qx / sum_q2, scale)
        best = where(better, scale * sum_qx, best)
        for k in range(n_groups):
            store(S, codes + k, where(better, load(S, TRIED + k), load(S, codes + k)))

    again = filled & (scale > ZERO)
    if not all_again:
        moved = has_bit(load(S, codes), MOVED_BIT)
        for k in range(1, n_groups):
            moved = moved | has_bit(load(S, codes + k), MOVED_BIT)
        again = again & moved
    if any_lane(again):
        round_groups(S, x, n_groups, ONE / scale, TRIED, SOUND)
        for k in range(n_groups):
            code = load(S, codes + k)
            rounded_again = again if all_again else again & has_bit(code, MOVED_BIT)
            store(S, TRIED + k, where(rounded_again, load(S, TRIED + k), code))
        evaluate(S, x, n_groups, scale, pending, grid)
        sum_q2 = load(S, SUM_Q2)
        scale = where(again & (sum_q2 > ZERO), load(S, SUM_QX) / sum_q2, scale)
        for k in range(n_groups):
            store(S, codes + k, load(S, TRIED + k))

    negative = scale < ZERO
    store(S, SCALES + sub_block, where(filled, abs(scale), ZERO))
    for k in range(n_groups):
        signs = load(S, SIGNS + sub_block * n_groups + k)
        signs = where(negative, np.float32(255.0) - signs, signs)
        store(S, SIGNS + sub_block * n_groups + k, where(filled, signs, ZERO))


@kernel
def evaluate(S: np.ndarray, x: int, n_groups: int, scale: Vector, pending: np.ndarray, grid: Tables) -> None:
    """Move the codes in TRIED to the grid; SUM_QX and SUM_Q2: weighted sums of x * q and q * q for their values q."""
    find_terms(S, x, ROOTS, n_groups, (scale, scale * THREE, scale * FIVE), TERM)
    settle(S, n_groups, TRIED, TERM, SOUND, pending, grid)
    sum_qx = splat(ZERO)
    sum_q2 = splat(ZERO)
    for k in range(n_groups):
        code = load(S, TRIED + k)
        for i in range(GROUP):
            q = digit(code, i) * TWO + ONE
            sum_qx = sum_qx + load(S, PRODUCTS + k * GROUP + i) * q
            sum_q2 = sum_q2 + load(S, WEIGHTS + k * GROUP + i) * q * q
    store(S, SUM_QX, sum_qx)
    store(S, SUM_Q2, sum_q2)
