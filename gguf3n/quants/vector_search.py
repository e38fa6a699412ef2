"""The scale searches that several types share, as functions of vectors: one lane is one group of weights.

Each tries a row of candidate scales, computes the best least-squares fit for the levels that a candidate gives, and
keeps the fit with the smallest weighted error. Groups lie in scratch rows S[row, lane], one weight a row.

A search does not keep the best levels but what made them (`inverse`, `low`): only sub-blocks whose final scale rounds
to zero need these levels again.

Exact: as ggml's source in strict float32. Where a search leads to levels beyond 2**22, which nearest_int excludes by an
assertion (a weight of no importance, a million times the others), builds of ggml differ from each other.
    # measured: of 400,000 random super-blocks a type, most of them extreme, none differs from a build by GCC 12. From a
    # wheel built by GCC 10, up to 5 in 100,000 differ with quant_weights (Q2_K; fewer Q4_K, Q5_K), none without.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import inlined, pasted
from gguf3n.quants.vectors import Mask, Vector, any_lane, floor, level, load, nearest, splat, store, where

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
TENTH = np.float32(0.1)
NEARLY_ZERO = np.float32(1e-15)
"""A group whose largest magnitude is below this counts as all zero."""

LOWEST = -0x400000
HIGHEST = 0x3FFFFF
"""The range of nearest_int: limits that change nothing."""


@inlined
def scale_and_min(
    S: np.ndarray,
    x: int,
    weights: int,
    scratch: int,
    n: int,
    n_max: int,
    first_step: np.float32,
    step: np.float32,
    n_steps: int,
    absolute: bool,
) -> tuple[Vector, Vector, Vector, Vector, Vector]:
    """Fit x ~ scale * level + minimum, levels 0..n_max and minimum <= 0, by weighted squared (or absolute) error.

    Shapes: S float32[rows, WIDTH]; x, weights, scratch are the first of n rows each; scratch is overwritten.
    Returns scale, minimum, inverse, low, sum of weights; the levels of the fit are those of inverse * (x - low).
    Exact: equal to ggml for every float32, infinite and NaN intermediates included.
    Source: make_qkx2_quants and make_qkx3_quants in ggml-quants.c.
    """
    value = load(S, x)
    weight = load(S, weights)
    low = value
    high = value
    sum_w = weight
    sum_x = weight * value
    for i in range(1, n):
        value = load(S, x + i)
        weight = load(S, weights + i)
        low = where(value < low, value, low)
        high = where(value > high, value, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * value
    low = where(low > ZERO, ZERO, low)
    flat = high == low

    inverse = np.float32(n_max) / (high - low)
    scale = ONE / inverse
    minimum = low
    best_error = splat(ZERO)
    for i in range(n):
        value = load(S, x + i)
        deviation = scale * level(inverse * (value - low), 0, n_max) + low - value
        deviation = abs(deviation) if absolute else deviation * deviation
        best_error = best_error + load(S, weights + i) * deviation

    scale = where(flat, ZERO, scale)
    best_inverse = where(flat, ZERO, inverse)
    best_low = low
    best_error = where(flat, -ONE, best_error)  # no candidate improves on it

    for k in range(n_steps + 1):
        # ggml quirk: a candidate starts from the minimum of the best fit so far, not from the smallest weight.
        inverse = (first_step + step * np.float32(k) + np.float32(n_max)) / (high - minimum)
        sum_l = splat(ZERO)
        sum_l2 = splat(ZERO)
        sum_xl = splat(ZERO)
        for i in range(n):
            value = load(S, x + i)
            q = level(inverse * (value - minimum), 0, n_max)
            store(S, scratch + i, q)
            weighted = load(S, weights + i) * q
            sum_l = sum_l + weighted
            sum_l2 = sum_l2 + weighted * q
            sum_xl = sum_xl + weighted * value
        determinant = sum_w * sum_l2 - sum_l * sum_l
        fit_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        fit_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = fit_minimum > ZERO
        fit_scale = where(positive, sum_xl / sum_l2, fit_scale)
        fit_minimum = where(positive, ZERO, fit_minimum)
        error = splat(ZERO)
        for i in range(n):
            deviation = fit_scale * load(S, scratch + i) + fit_minimum - load(S, x + i)
            deviation = abs(deviation) if absolute else deviation * deviation
            error = error + load(S, weights + i) * deviation
        better = (determinant > ZERO) & (error < best_error)
        best_error = where(better, error, best_error)
        best_inverse = where(better, inverse, best_inverse)
        best_low = where(better, minimum, best_low)
        scale = where(better, fit_scale, scale)
        minimum = where(better, fit_minimum, minimum)
    return scale, minimum, best_inverse, best_low, sum_w


@inlined
def symmetric_scale(S: np.ndarray, x: int, weights: int, scratch: int, n: int, n_max: int) -> tuple[Vector, Vector]:
    """Fit x ~ scale * level, levels -n_max..n_max - 1, by weighted squared error.

    Shapes: as in scale_and_min.
    Returns scale, inverse; the levels of the fit are those of inverse * x, or, where inverse is zero, ggml leaves the
        unshifted level 0, which means -n_max.
    Exact: equal to ggml for finite x; else use symmetric_scale_of_any.
    Source: make_qx_quants in ggml-quants.c, rmse_type 1.
    """
    peak, empty = weigh_and_find_peak(S, x, weights, scratch, n)
    fit = plain_candidate(S, x, weights, scratch, n, n_max, peak)
    # Why three calls: |inverse * x| is at most n_max + offset / 10, which tells what has to be clamped.
    # measured: Q6_K 350 million weights/s, 290 with both clamps everywhere.
    fit = symmetric_candidates(S, x, weights, scratch, n, n_max, peak, fit, -9, -5, 0)
    fit = symmetric_candidates(S, x, weights, scratch, n, n_max, peak, fit, -5, 5, 1)
    fit = symmetric_candidates(S, x, weights, scratch, n, n_max, peak, fit, 5, 10, 2)
    scale, _, inverse = fit
    return where(empty, ZERO, scale), where(empty, ZERO, inverse)


@pasted
def symmetric_scale_of_any(
    S: np.ndarray, x: int, weights: int, scratch: int, n: int, n_max: int
) -> tuple[Vector, Vector, Mask]:
    """symmetric_scale for x that may be infinite or NaN; also tells where ggml leaves the levels 0."""
    peak, empty = weigh_and_find_peak(S, x, weights, scratch, n)
    fit = plain_candidate(S, x, weights, scratch, n, n_max, peak)
    fit = symmetric_candidates(S, x, weights, scratch, n, n_max, peak, fit, -9, 10, 2)
    scale, _, inverse = fit
    return where(empty, ZERO, scale), inverse, empty


@inlined
def weigh_and_find_peak(S: np.ndarray, x: int, weights: int, weighted: int, n: int) -> tuple[Vector, Mask]:
    """Store weight * x; return the x of largest magnitude, and where that is nearly zero."""
    peak = splat(ZERO)
    magnitude = splat(ZERO)
    for i in range(n):
        value = load(S, x + i)
        larger = abs(value) > magnitude
        magnitude = where(larger, abs(value), magnitude)
        peak = where(larger, value, peak)
        store(S, weighted + i, load(S, weights + i) * value)
    return peak, magnitude < NEARLY_ZERO


@inlined
def plain_candidate(
    S: np.ndarray, x: int, weights: int, weighted: int, n: int, n_max: int, peak: Vector
) -> tuple[Vector, Vector, Vector]:
    """The first fit (scale, merit, inverse): the scale that makes the peak -n_max."""
    inverse = np.float32(-n_max) / peak
    sum_xl, sum_l2 = symmetric_sums(S, x, weights, weighted, n, n_max, inverse, 2)
    scale = where(sum_l2 != ZERO, sum_xl / sum_l2, ZERO)
    return scale, scale * sum_xl, inverse


@inlined
def symmetric_candidates(
    S: np.ndarray,
    x: int,
    weights: int,
    weighted: int,
    n: int,
    n_max: int,
    peak: Vector,
    fit: tuple[Vector, Vector, Vector],
    start: int,
    stop: int,
    clamps: int,
) -> tuple[Vector, Vector, Vector]:
    """The best of a fit (scale, merit, inverse) and the candidates n_max + offset / 10 for start <= offset < stop."""
    scale, best, best_inverse = fit
    for offset in range(start, stop):
        if offset == 0:
            continue
        inverse = -(np.float32(n_max) + TENTH * np.float32(offset)) / peak
        sum_xl, sum_l2 = symmetric_sums(S, x, weights, weighted, n, n_max, inverse, clamps)
        better = (sum_l2 > ZERO) & (sum_xl * sum_xl > best * sum_l2)
        candidate = sum_xl / sum_l2
        scale = where(better, candidate, scale)
        best = where(better, candidate * sum_xl, best)
        best_inverse = where(better, inverse, best_inverse)
    return scale, best, best_inverse


@inlined
def symmetric_sums(
    S: np.ndarray,
    x: int,
    weights: int,
    weighted: int,
    n: int,
    n_max: int,
    inverse: Vector,
    clamps: int,
) -> tuple[Vector, Vector]:
    """Sums of weight * x * level and of weight * level**2 for one candidate.

    `clamps`: 0, 1 or 2, for levels that lie within -n_max..n_max - 1, may be n_max, or may be anything.
    """
    sum_xl = splat(ZERO)
    sum_l2 = splat(ZERO)
    for i in range(n):
        q = inverse * load(S, x + i)
        if clamps == 2:
            q = level(q, -n_max, n_max - 1)
        elif clamps == 1:
            q = nearest(q)
            q = where(q < np.float32(n_max - 1), q, np.float32(n_max - 1))
        else:
            q = nearest(q)
        sum_xl = sum_xl + load(S, weighted + i) * q
        sum_l2 = sum_l2 + load(S, weights + i) * q * q
    return sum_xl, sum_l2


@inlined
def unsigned_scale(S: np.ndarray, x: int, weights: int, levels: int, n: int, n_max: int) -> Vector:
    """Fit x ~ scale * level, levels 0..n_max, by weighted squared error, then move single levels while that helps.

    Shapes: as in scale_and_min; `levels` is the first of n rows for the levels, whole numbers 0..255.
    Exact: equal to ggml for every float32; a negative x, which should not be there, gets ggml's uint8 level.
    Source: make_qp_quants in ggml-quants.c.
    """
    largest = splat(ZERO)
    for i in range(n):
        value = load(S, x + i)
        largest = where(largest > value, largest, value)
    filled = largest >= NEARLY_ZERO

    best_inverse = np.float32(n_max) / largest
    scale = ONE / best_inverse
    best_error = splat(ZERO)
    for i in range(n):
        value = load(S, x + i)
        # ggml quirk: only these first levels are stored in a byte without a limit.
        deviation = value - scale * as_uint8(level(best_inverse * value, LOWEST, HIGHEST))
        best_error = best_error + load(S, weights + i) * deviation * deviation
    for offset in range(-4, 5):
        if offset != 0:
            inverse = (TENTH * np.float32(offset) + np.float32(n_max)) / largest
            scale = ONE / inverse
            error = splat(ZERO)
            for i in range(n):
                value = load(S, x + i)
                deviation = value - scale * level(inverse * value, LOWEST, n_max)
                error = error + load(S, weights + i) * deviation * deviation
            better = error < best_error
            best_error = where(better, error, best_error)
            best_inverse = where(better, inverse, best_inverse)

    sum_xl = splat(ZERO)
    sum_l2 = splat(ZERO)
    for i in range(n):
        value = load(S, x + i)
        weight = load(S, weights + i)
        q = level(best_inverse * value, LOWEST, n_max)
        store(S, levels + i, as_uint8(q))
        sum_xl = sum_xl + weight * value * q
        sum_l2 = sum_l2 + weight * q * q
    for _ in range(5):
        changed = largest < ZERO
        for i in range(n):
            value = load(S, x + i)
            weight = load(S, weights + i)
            old = load(S, levels + i)
            rest_xl = sum_xl - weight * value * old
            rest_l2 = sum_l2 - weight * old * old
            new = level(value * rest_l2 / rest_xl, LOWEST, n_max)
            moved = filled & (rest_xl > ZERO) & (rest_l2 > ZERO) & (new != old)
            if not any_lane(moved):
                continue
            new_xl = rest_xl + weight * value * new
            new_l2 = rest_l2 + weight * new * new
            better = moved & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
            store(S, levels + i, where(better, as_uint8(new), old))
            sum_xl = where(better, new_xl, sum_xl)
            sum_l2 = where(better, new_l2, sum_l2)
            changed = changed | better
        if not any_lane(changed):
            break
    for i in range(n):
        store(S, levels + i, where(filled, load(S, levels + i), ZERO))
    return where(filled & (sum_l2 > ZERO), sum_xl / sum_l2, ZERO)


@inlined
def as_uint8(q: Vector) -> Vector:
    """What a whole number becomes in C when it is stored in a byte."""
    return q - np.float32(256.0) * floor(q / np.float32(256.0))
