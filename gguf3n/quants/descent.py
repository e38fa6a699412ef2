"""Codes that make a matrix's output less wrong: coordinate descent on tr((W - Q) H (W - Q)^T), H = E[x x^T].

With R = W - Q and G = R H, moving column j's weights by `step` towards their source changes the error by
    step * (2 G[j] + step * H[j, j])
so the best point is the one nearest to  point + G[j] / (scale * H[j, j]),  and G changes by step * H[j, :]. After some
passes over the columns, scales and minima are fitted to the points by least squares under H, rounded to what the format
can store, and kept where the error falls.

One lane is one row; all lanes are at the same columns of WIDTH rows, so H is one number for all of them. A column that
no lane moves costs next to nothing. G is brought up to date at once inside a sub-block, and elsewhere when the
sub-block is done, so that it is read and written once: both add the same numbers in the same order.

The bytes are the same on every machine: lanes never meet, every sum has its order, nothing is contracted.

    scratch   X, P, G    of each column: weight, point, G
              Z          H times the points of a sub-block, in its rows
              F          of each sub-block: scale, minimum, and their units
              D          of the columns in `moved`: how much their weights moved

Source: "OPTQ" (Frantar et al., 2023), section 3.1, for the error; the descent on it is the textbook's.
# measured: 2026-11-21, Q4_K of Gaussian weights, H of random inputs with one large column; error after three passes,
# over that of the codes of the importance matrix: 0.689 without a fit, 0.678 with one after the first pass, 0.675 after
# the second, 0.677 after the third, 0.672 after the first two, 0.668 after each. A fit takes as long as most of a pass.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.iq4_nl import nearest_value
from gguf3n.quants.lanes import f16_bits, f16_value, gather, inlined, kernel, scratch
from gguf3n.quants.vectors import WIDTH, Vector, any_lane, level, load, splat, store, where

PASSES = 3
FIT_AFTER = 1
"""The number, from zero, of the pass that scales are fitted after."""

KEPT = np.float32(1 - 2.0**-7)
"""What a block's error must fall below, over what it was, for the block to be changed.

Why: sums of float32 are off by less than that, so no block gets worse.
"""

ZERO = np.float32(0)
ONE = np.float32(1)
TWO = np.float32(2)

SCALE, MINIMUM, UNIT, MINIMUM_UNIT, FACTORS = range(5)
MAX_SUB_BLOCK = 32
MIN_SUB_BLOCK = 16
AT_ONCE = 8
"""Columns of G that are brought up to date together. Why: so many sums do not wait for each other."""


@kernel
def descend(
    rows: np.ndarray,
    correlations: np.ndarray,
    points: np.ndarray,
    scales: np.ndarray,
    minima: np.ndarray,
    units: np.ndarray,
    has_minima: bool,
    lowest: int,
    highest: int,
    lowest_scale: int,
    highest_scale: int,
) -> None:
    """Improve points, scales and minima in place.

    Args:
        correlations: of each column, those with the columns of its block: blocks of as many columns as there are, and
            what is left of a row. Symmetric within a block.
        lowest, highest: of the points; equal for those of IQ4.
        lowest_scale, highest_scale: of scales and minima; equal where they are float16.

    Shapes: rows, points float32[n_rows, n_per_row]; correlations float32[n_per_row, block]; scales, minima
        float32[n_rows, n_sub_blocks]; units float32[n_rows, n_sub_blocks, 2]; sub-blocks have 16 or 32 columns.
    Exact: a row depends on no other; a block of it changes only if its error falls.
    """
    n_rows, n_per_row = rows.shape
    width = correlations.shape[1]
    sub_block = n_per_row // scales.shape[1]
    X = scratch(width, WIDTH)
    P = scratch(width, WIDTH)
    G = scratch(width, WIDTH)
    Z = scratch(width, WIDTH)
    F = scratch(FACTORS * (width // MIN_SUB_BLOCK), WIDTH)
    D = scratch(MAX_SUB_BLOCK, WIDTH)
    moved = np.empty(MAX_SUB_BLOCK, np.int64)
    sums = np.empty(width // MIN_SUB_BLOCK, np.float32)
    for start in range(0, n_per_row, width):
        n = min(width, n_per_row - start)
        H = correlations[start : start + n]
        n_sub_blocks, first_sub_block = n // sub_block, start // sub_block
        for s in range(n_sub_blocks):
            sums[s] = sum_of(H, s * sub_block, sub_block)
        for first in range(0, n_rows, WIDTH):
            gather(rows, first, start, n, X)
            gather(points, first, start, n, P)
            for lane in range(WIDTH):
                row = min(first + lane, n_rows - 1)
                for s in range(n_sub_blocks):
                    F[FACTORS * s + SCALE, lane] = scales[row, first_sub_block + s]
                    F[FACTORS * s + MINIMUM, lane] = minima[row, first_sub_block + s]
                    F[FACTORS * s + UNIT, lane] = units[row, first_sub_block + s, 0]
                    F[FACTORS * s + MINIMUM_UNIT, lane] = units[row, first_sub_block + s, 1]
            multiply(X, P, F, G, D, moved, H, n, sub_block)
            before = error_of(X, P, F, G, n, sub_block)
            for turn in range(PASSES):
                for s in range(n_sub_blocks):
                    move_points(P, F, G, D, moved, H, n, s, sub_block, lowest, highest)
                if turn == FIT_AFTER:
                    for s in range(n_sub_blocks):
                        fit(P, F, G, Z, D, moved, H, n, s, sub_block, sums, has_minima, lowest_scale, highest_scale)
            after = error_of(X, P, F, G, n, sub_block)
            store(D, 0, where(after < before * KEPT, ONE, ZERO))
            for lane in range(min(WIDTH, n_rows - first)):
                if D[0, lane] == ZERO:
                    continue
                row = first + lane
                for j in range(n):
                    points[row, start + j] = P[j, lane]
                for s in range(n_sub_blocks):
                    scales[row, first_sub_block + s] = F[FACTORS * s + SCALE, lane]
                    minima[row, first_sub_block + s] = F[FACTORS * s + MINIMUM, lane]


@inlined
def sum_of(H: np.ndarray, first: int, n: int) -> np.float32:
    """The sum over the square of n columns."""
    total = ZERO
    for j in range(first, first + n):
        for k in range(first, first + n):
            total += H[j, k]
    return total


@inlined
def residual(X: np.ndarray, P: np.ndarray, F: np.ndarray, j: int, sub_block: int) -> Vector:
    """W - Q of column j."""
    s = FACTORS * (j // sub_block)
    scale = load(F, s + SCALE) * load(F, s + UNIT)
    return load(X, j) - (scale * load(P, j) + load(F, s + MINIMUM) * load(F, s + MINIMUM_UNIT))


@inlined
def multiply(
    X: np.ndarray,
    P: np.ndarray,
    F: np.ndarray,
    G: np.ndarray,
    D: np.ndarray,
    moved: np.ndarray,
    H: np.ndarray,
    n: int,
    sub_block: int,
) -> None:
    """G = R H."""
    for j in range(n):
        store(G, j, splat(ZERO))
    for first in range(0, n, sub_block):
        for j in range(sub_block):
            store(D, j, residual(X, P, F, first + j, sub_block))
            moved[j] = first + j
        spread(G, D, moved, sub_block, H, 0, n)


@inlined
def error_of(X: np.ndarray, P: np.ndarray, F: np.ndarray, G: np.ndarray, n: int, sub_block: int) -> Vector:
    """The sum of R * G."""
    total = splat(ZERO)
    for j in range(n):
        total = total + load(G, j) * residual(X, P, F, j, sub_block)
    return total


@inlined
def spread(G: np.ndarray, D: np.ndarray, moved: np.ndarray, n_moved: int, H: np.ndarray, start: int, end: int) -> None:
    """Add D[c] * H[moved[c], k] to G[k] for the columns k from start to end, in the order of c."""
    for k in range(start, end, AT_ONCE):
        g0 = load(G, k)
        g1 = load(G, k + 1)
        g2 = load(G, k + 2)
        g3 = load(G, k + 3)
        g4 = load(G, k + 4)
        g5 = load(G, k + 5)
        g6 = load(G, k + 6)
        g7 = load(G, k + 7)
        for c in range(n_moved):
            d = load(D, c)
            h = H[moved[c], k : k + AT_ONCE]
            g0 = g0 + d * h[0]
            g1 = g1 + d * h[1]
            g2 = g2 + d * h[2]
            g3 = g3 + d * h[3]
            g4 = g4 + d * h[4]
            g5 = g5 + d * h[5]
            g6 = g6 + d * h[6]
            g7 = g7 + d * h[7]
        store(G, k, g0)
        store(G, k + 1, g1)
        store(G, k + 2, g2)
        store(G, k + 3, g3)
        store(G, k + 4, g4)
        store(G, k + 5, g5)
        store(G, k + 6, g6)
        store(G, k + 7, g7)


@inlined
def move_points(
    P: np.ndarray,
    F: np.ndarray,
    G: np.ndarray,
    D: np.ndarray,
    moved: np.ndarray,
    H: np.ndarray,
    n: int,
    s: int,
    sub_block: int,
    lowest: int,
    highest: int,
) -> None:
    """One pass over the columns of sub-block s."""
    scale = load(F, FACTORS * s + SCALE) * load(F, FACTORS * s + UNIT)
    inverse = where(scale != ZERO, ONE / scale, ZERO)
    start, end = s * sub_block, (s + 1) * sub_block
    n_moved = 0
    for j in range(start, end):
        variance = H[j, j]
        if not variance > ZERO:
            continue
        g = load(G, j)
        old = load(P, j)
        target = old + g * inverse * (ONE / variance)
        new = level(target, lowest, highest) if lowest < highest else nearest_value(target)
        step = (old - new) * scale
        better = step * (TWO * g + step * variance) < ZERO
        # Why: as it is seldom taken after the first pass, the next column need not wait for this one.
        if not any_lane(better):
            continue
        step = where(better, step, ZERO)
        store(P, j, where(better, new, old))
        store(D, n_moved, step)
        moved[n_moved] = j
        n_moved += 1
        for k in range(start, end):
            store(G, k, load(G, k) + step * H[j, k])
    if n_moved:
        spread(G, D, moved, n_moved, H, 0, start)
        spread(G, D, moved, n_moved, H, end, n)


@inlined
def fit(
    P: np.ndarray,
    F: np.ndarray,
    G: np.ndarray,
    Z: np.ndarray,
    D: np.ndarray,
    moved: np.ndarray,
    H: np.ndarray,
    n: int,
    s: int,
    sub_block: int,
    sums: np.ndarray,
    has_minima: bool,
    lowest: int,
    highest: int,
) -> None:
    """Fit scale and minimum of sub-block s to its points: the scale alone, the minimum alone, or both.

    Why: with t and v their changes, p the points, e ones, and all of it within the sub-block, the error changes by
        t (t pHp - 2 Gp) + v (v eHe - 2 Ge) + 2 t v pHe.
    """
    start = s * sub_block
    for j in range(sub_block):
        store(D, j, load(P, start + j))
        store(Z, start + j, splat(ZERO))
        moved[j] = start + j
    spread(Z, D, moved, sub_block, H, start, start + sub_block)
    gp = splat(ZERO)
    ge = splat(ZERO)
    pp = splat(ZERO)
    pe = splat(ZERO)
    ee = splat(sums[s])
    for j in range(start, start + sub_block):
        p, g, z = load(P, j), load(G, j), load(Z, j)
        gp = gp + p * g
        ge = ge + g
        pp = pp + p * z
        pe = pe + z

    scale, unit = load(F, FACTORS * s + SCALE), load(F, FACTORS * s + UNIT)
    minimum, minimum_unit = load(F, FACTORS * s + MINIMUM), load(F, FACTORS * s + MINIMUM_UNIT)
    new_scale = storable(scale + gp / pp / unit, D, lowest, highest)
    best_t = (new_scale - scale) * unit
    best = best_t * (best_t * pp - TWO * gp)
    best_v = splat(ZERO)
    new_minimum = minimum
    if has_minima:
        other_scale = storable(scale + (gp * ee - ge * pe) / (pp * ee - pe * pe) / unit, D, lowest, highest)
        t = (other_scale - scale) * unit
        other_minimum = storable(minimum + (ge - t * pe) / ee / minimum_unit, D, lowest, highest)
        v = (other_minimum - minimum) * minimum_unit
        change = t * (t * pp - TWO * gp) + v * (v * ee - TWO * ge) + TWO * t * v * pe
        better = (change < best) | (best != best)
        best, best_t, best_v = where(better, change, best), where(better, t, best_t), where(better, v, best_v)
        new_scale, new_minimum = where(better, other_scale, new_scale), where(better, other_minimum, new_minimum)

        other_minimum = storable(minimum + ge / ee / minimum_unit, D, lowest, highest)
        v = (other_minimum - minimum) * minimum_unit
        change = v * (v * ee - TWO * ge)
        better = (change < best) | (best != best)
        best, best_t, best_v = where(better, change, best), where(better, ZERO, best_t), where(better, v, best_v)
        new_scale, new_minimum = where(better, scale, new_scale), where(better, other_minimum, new_minimum)

    better = best < ZERO
    if not any_lane(better):
        return
    store(F, FACTORS * s + SCALE, where(better, new_scale, scale))
    store(F, FACTORS * s + MINIMUM, where(better, new_minimum, minimum))
    t, v = where(better, best_t, ZERO), where(better, best_v, ZERO)
    for j in range(sub_block):
        store(D, j, -(t * load(P, start + j) + v))
    spread(G, D, moved, sub_block, H, 0, n)


@inlined
def storable(x: Vector, D: np.ndarray, lowest: int, highest: int) -> Vector:
    """What a block can hold of a scale or a minimum: the nearest integer in a range, or half precision."""
    if lowest < highest:
        return level(x, lowest, highest)
    store(D, 0, x)
    for lane in range(WIDTH):
        D[0, lane] = f16_value(f16_bits(D[0, lane]))
    return load(D, 0)
