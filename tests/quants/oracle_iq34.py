"""IQ4_NL, IQ4_XS, IQ3_S, IQ3_XXS as plain loops over float32 scalars: slow, and meant to be read.

`quantize(row, qtype, quant_weights)` gives the bytes of one row. The grids are those of the gguf package; the
neighbours of a point off the grid are found by sorting all grid points.

Source: quantize_row_iq4_nl_impl, iq3xs_init_impl, quantize_row_iq3_s_impl, quantize_row_iq3_xxs_impl in ggml-quants.c.
"""

from __future__ import annotations

import functools

import gguf.quants
import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from tests.quants.oracle_legacy import F, Floats, clamp, half, nearest, nibbles, reciprocal

VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
Point = tuple[int, ...]


def importances(x: Floats, quant_weights: Floats | None) -> list[np.float32]:
    """Of a block or super-block: x**2, or quant_weight * sqrt(twice the mean square + x**2)."""
    if quant_weights is None:
        return [value * value for value in x]
    total = F(0)
    for value in x:
        total += value * value
    sigma2 = F(2) * total / F(len(x))
    return [weight * np.sqrt(sigma2 + value * value) for value, weight in zip(x, quant_weights, strict=True)]


# IQ4 ------------------------------------------------------------------------------------------------------------------


def nearest_value(x: np.float32) -> int:
    """Index of the value nearest to x, the upper one of two."""
    if x <= VALUES[0]:
        return 0
    for upper in range(1, 16):
        if x < VALUES[upper]:
            return upper - 1 if x - F(VALUES[upper - 1]) < F(VALUES[upper]) - x else upper
    return 15


def value_scale(x: Floats, w: Floats) -> np.float32:
    """Of 16 ways to choose values, the one whose best scale leaves the smallest weighted squared error."""
    peak = F(0)
    for value in x:
        if abs(value) > abs(peak):
            peak = value
    if abs(peak) < F(1e-15):
        return F(0)
    scale = best = F(0)
    for step in (None, *range(-7, 8)):
        inverse = F(1) / (-peak / F(-127)) if step is None else F(step - 127) / peak
        sumqx = sumq2 = F(0)
        for value, weight in zip(x, w, strict=True):
            q = F(VALUES[nearest_value(inverse * value)])
            sumqx += weight * q * value
            sumq2 += weight * q * q
        if step is None:
            scale = sumqx / sumq2 if sumq2 > 0 else F(0)
            best = scale * sumqx
        elif sumq2 > 0 and sumqx * sumqx > best * sumq2:
            scale = sumqx / sumq2
            best = scale * sumqx
    return scale


def value_levels(x: Floats, scale: np.float32) -> bytes:
    inverse = reciprocal(scale)
    return nibbles([nearest_value(inverse * value) for value in x])


def iq4_nl_block(x: Floats, quant_weights: Floats | None) -> bytes:
    scale = value_scale(x, importances(x, quant_weights))
    return half(scale) + value_levels(x, scale)


def iq4_xs_block(x: Floats, quant_weights: Floats | None) -> bytes:
    w = importances(x, quant_weights)
    scales = [value_scale(x[j : j + 32], w[j : j + 32]) for j in range(0, 256, 32)]
    peak = F(0)
    for scale in scales:
        if abs(scale) > abs(peak):
            peak = scale
    d = -peak / F(32)
    inverse = reciprocal(d)
    levels = [clamp(-32, nearest(inverse * scale), 31) for scale in scales]
    high = sum(((level + 32) >> 4) << (2 * b) for b, level in enumerate(levels))
    low = bytes(((levels[b] + 32) & 15) | ((levels[b + 1] + 32) & 15) << 4 for b in range(0, 8, 2))
    qs = b"".join(value_levels(x[32 * b : 32 * b + 32], d * F(level)) for b, level in enumerate(levels))
    return half(d) + high.to_bytes(2, "little") + low + qs


# IQ3 ------------------------------------------------------------------------------------------------------------------


@functools.cache
def grid(qtype: QType) -> list[Point]:
    """The values 1, 3 .. 15 of each grid point."""
    source = gguf.quants.IQ3_S if qtype is QType.IQ3_S else gguf.quants.IQ3_XXS
    digits = [int(digit, 16) for digit in source.grid_hex.decode()]
    levels = [digits[i + 1 - 2 * (i % 2)] for i in range(len(digits))]  # the low half of a byte comes first
    return [tuple(2 * level + 1 for level in levels[i : i + 4]) for i in range(0, len(levels), 4)]


@functools.cache
def neighbours(qtype: QType, values: Point) -> list[Point]:
    """The grid points at the three (IQ3_XXS: two) smallest distances, nearest first, then by grid index."""

    def distance(point: Point) -> int:
        return sum((a - b) ** 2 for a, b in zip(point, values, strict=True))

    shells = sorted({distance(point) for point in grid(qtype)})[: 3 if qtype is QType.IQ3_S else 2]
    return [point for shell in shells for point in grid(qtype) if distance(point) == shell]


def grid_point(x: Floats, root: Floats, inverse: np.float32, step: np.float32, qtype: QType) -> tuple[Point, bool]:
    """The grid point of a group of four, and whether the group's own cell is one."""
    values = tuple(2 * clamp(0, nearest(F(0.5) * (inverse * value - F(1))), 7) + 1 for value in x)
    if values in grid(qtype):
        return values, True
    best = np.finfo(F).max
    found = None
    for point in neighbours(qtype, values):
        distance = F(0)
        for q, value, weight in zip(point, x, root, strict=True):
            apart = step * F(q) - value
            distance += weight * apart * apart
        if distance < best:
            best, found = distance, point
    assert found is not None
    return found, False


def fit(points: list[Point], x: Floats, w: Floats) -> tuple[np.float32, np.float32]:
    """Weighted sums of x * q and q * q."""
    sumqx = sumq2 = F(0)
    for i, (value, weight) in enumerate(zip(x, w, strict=True)):
        q = F(points[i // 4][i % 4])
        sumqx += weight * value * q
        sumq2 += weight * q * q
    return sumqx, sumq2


def search_points(x: Floats, w: Floats, qtype: QType) -> tuple[np.float32, list[Point]]:
    """Of 19 (IQ3_XXS: 31) scales, the one whose points fit best; some points are then found again."""
    tries, again = (9, True) if qtype is QType.IQ3_S else (15, False)
    root = [np.sqrt(weight) for weight in w]
    peak = x[0]
    for value in x:
        peak = value if value > peak else peak
    groups = range(0, 32, 4)
    points = [(1, 1, 1, 1)] * 8
    on_grid = [not again] * 8
    scale = peak / F(15)
    best = F(0)
    for t in range(-tries, tries + 1):
        inverse = (F(15) + F(t) * F(0.2)) / peak
        step = F(1) / inverse
        found = [grid_point(x[i : i + 4], root[i : i + 4], inverse, step, qtype) for i in groups]
        sumqx, sumq2 = fit([point for point, _ in found], x, w)
        if sumq2 > 0 and sumqx * sumqx > best * sumq2:
            scale = sumqx / sumq2
            best = scale * sumqx
            points = [point for point, _ in found]
            on_grid = [on for _, on in found]
    if not all(on_grid) and scale > 0:
        inverse = F(1) / scale
        for k, i in enumerate(groups):
            if again or not on_grid[k]:
                points[k], _ = grid_point(x[i : i + 4], root[i : i + 4], inverse, scale, qtype)
        sumqx, sumq2 = fit(points, x, w)
        if sumq2 > 0:
            scale = sumqx / sumq2
    return scale, points


def scale_levels(scales: Floats, highest: np.float32) -> list[int]:
    inverse = F(1) / (highest / F(31))
    return [clamp(0, nearest(F(0.5) * (inverse * scale - F(1))), 15) for scale in scales]


def iq3_s_block(x: Floats, quant_weights: Floats | None) -> bytes:
    w = importances(x, quant_weights)
    scales: list[np.float32] = []
    qs, signs, qh = [], [], [0] * 8
    for b in range(8):
        part = x[32 * b : 32 * b + 32]
        if not any(part):
            scales.append(F(0))  # and nothing in qs and signs: later blocks move up
            continue
        scale, points = search_points([abs(value) for value in part], w[32 * b : 32 * b + 32], QType.IQ3_S)
        indices = [grid(QType.IQ3_S).index(point) for point in points]
        qs += [index & 255 for index in indices]
        qh[b] = sum((index >> 8) << k for k, index in enumerate(indices))
        signs += [sum(bool(part[8 * k + i] < 0) << i for i in range(8)) for k in range(4)]
        scales.append(scale)
    highest = max(scales)
    levels = scale_levels(scales, highest) if highest else [0] * 8
    packed = bytes(levels[b] | levels[b + 1] << 4 for b in range(0, 8, 2))
    d = half(highest / F(31) * F(1.033))
    return d + bytes(qs).ljust(64, b"\0") + bytes(qh) + bytes(signs).ljust(32, b"\0") + packed


def even_signs(x: Floats, w: Floats) -> tuple[list[np.float32], int]:
    """Magnitudes of eight weights and seven sign bits; the least important weight makes the signs even."""
    magnitudes = [-value if value < 0 else value for value in x]
    signs = sum(bool(value < 0) << i for i, value in enumerate(x))
    if signs.bit_count() % 2:
        importance = [weight * value * value for value, weight in zip(x, w, strict=True)]
        least = importance.index(min(importance))
        magnitudes[least] = -magnitudes[least]
        signs ^= 1 << least
    return magnitudes, signs & 127


def iq3_xxs_block(x: Floats, quant_weights: Floats | None) -> bytes:
    w = importances(x, quant_weights)
    scales: list[np.float32] = []
    qs, words = [0] * 64, [0] * 8
    for b in range(8):
        eights = [even_signs(x[i : i + 8], w[i : i + 8]) for i in range(32 * b, 32 * b + 32, 8)]
        magnitudes = [value for part, _ in eights for value in part]
        if max(magnitudes) < F(1e-8):
            scales.append(F(0))
            continue
        scale, points = search_points(magnitudes, w[32 * b : 32 * b + 32], QType.IQ3_XXS)
        flip = 127 if scale < 0 else 0
        qs[8 * b : 8 * b + 8] = [grid(QType.IQ3_XXS).index(point) for point in points]
        words[b] = sum((signs ^ flip) << (7 * k) for k, (_, signs) in enumerate(eights))
        scales.append(abs(scale))
    highest = max(scales)
    if not highest:
        return bytes(98)
    words = [word | level << 28 for word, level in zip(words, scale_levels(scales, highest), strict=True)]
    return half(highest / F(31) * F(1.0125)) + bytes(qs) + b"".join(word.to_bytes(4, "little") for word in words)


BLOCKS = {
    QType.IQ4_NL: (32, iq4_nl_block),
    QType.IQ4_XS: (256, iq4_xs_block),
    QType.IQ3_S: (256, iq3_s_block),
    QType.IQ3_XXS: (256, iq3_xxs_block),
}


def quantize(row: np.ndarray, qtype: QType, quant_weights: np.ndarray | None = None) -> bytes:
    """The bytes of one float32 row."""
    size, block_bytes = BLOCKS[qtype]
    with np.errstate(all="ignore"):
        return b"".join(
            block_bytes(list(row[j : j + size]), None if quant_weights is None else list(quant_weights[j : j + size]))
            for j in range(0, len(row), size)
        )
