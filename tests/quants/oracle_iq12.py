"""IQ2_XXS, IQ2_XS, IQ2_S, IQ1_S, IQ1_M as plain loops over float32 scalars: slow, and meant to be read.

`quantize(row, qtype, quant_weights)` gives the bytes of one row. The grids are those of the gguf package; the
neighbours of a group that is off the grid are found by sorting all grid points.

Source: iq2xs_init_impl, iq2_find_best_neighbour, iq1_find_best_neighbour2, quantize_row_iq2_xxs_impl, _iq2_xs_impl,
_iq2_s_impl, _iq1_s_impl and _iq1_m_impl in ggml-quants.c.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import gguf.quants
import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from tests.quants.oracle_iq34 import even_signs
from tests.quants.oracle_k import NEARLY_ZERO, parts, total, unsigned_search
from tests.quants.oracle_legacy import F, Floats, clamp, half, nearest

Point = tuple[int, ...]
"""Eight levels 0, 1 or 2."""

PLUS = [F(-0.875), F(0.125), F(1.125)]
MINUS = [F(-1.125), F(-0.125), F(0.875)]

# Grids ----------------------------------------------------------------------------------------------------------------


@functools.cache
def grid(qtype: QType) -> dict[Point, int]:
    """The index of each grid point."""
    name = "IQ1_S" if qtype is QType.IQ1_M else qtype.name
    packed = bytes.fromhex(getattr(gguf.quants, name).grid_hex.decode())
    levels = [byte >> shift & 3 for byte in packed for shift in (0, 2, 4, 6)]
    return {tuple(point): index for index, point in enumerate(parts(levels, 8))}


@functools.cache
def neighbours(qtype: QType, levels: Point) -> list[Point]:
    """The grid points at the three (IQ2_XXS, IQ2_XS: two, IQ2_S: one) smallest distances, nearest first, then by
    grid index."""
    shells = {QType.IQ2_XXS: 2, QType.IQ2_XS: 2, QType.IQ2_S: 1}.get(qtype, 3)
    distances = [sum((a - b) ** 2 for a, b in zip(point, levels, strict=True)) for point in grid(qtype)]
    limit = sorted(set(distances))[shells - 1]
    near = [(distance, point) for point, distance in zip(grid(qtype), distances, strict=True) if distance <= limit]
    return [point for _, point in sorted(near, key=lambda entry: entry[0])]


def nearest_point(x: Floats, w: Floats, levels: Point, values: Floats, scale: np.float32, qtype: QType) -> Point:
    """The group's levels if they are a grid point, else the neighbour at the smallest weighted squared distance."""
    if levels in grid(qtype):
        return levels
    best = np.finfo(F).max
    found = None
    for point in neighbours(qtype, levels):
        distance = F(0)
        for level, value, weight in zip(point, x, w, strict=True):
            apart = scale * values[level] - value
            distance += weight * apart * apart
        if distance < best:
            best, found = distance, point
    assert found is not None
    return found


def fit(points: list[Point], values: list[Floats], x: Floats, w: Floats) -> tuple[np.float32, np.float32]:
    """Weighted sums of x * q and q * q, where group k has values[k]."""
    sumqx = sumq2 = F(0)
    for i, (value, weight) in enumerate(zip(x, w, strict=True)):
        q = values[i // 8][points[i // 8][i % 8]]
        sumqx += weight * q * value
        sumq2 += weight * q * q
    return sumqx, sumq2


def scale_levels(scales: Floats, highest: int) -> tuple[np.float32, list[int]]:
    """d, and the scales as d * (2 * level + 1)."""
    d = max(scales) / F(2 * highest + 1)
    return d, [clamp(0, nearest(F(0.5) * (F(1) / d * scale - F(1))), highest) for scale in scales]


def importances(x: Floats, quant_weights: Floats, factor: int) -> list[np.float32]:
    """quant_weight * sqrt(factor times the mean square + x**2), of a super-block."""
    sigma2 = F(factor) * total([value * value for value in x]) / F(256)
    return [weight * np.sqrt(sigma2 + value * value) for value, weight in zip(x, quant_weights, strict=True)]


# IQ2 ------------------------------------------------------------------------------------------------------------------

ODD = [F(1), F(3), F(5)]


def odd_fit(points: list[Point], x: Floats, w: Floats) -> tuple[np.float32, np.float32]:
    """As `fit`, for the values 1, 3 and 5; the products are in another order."""
    sumqx = sumq2 = F(0)
    for i, (value, weight) in enumerate(zip(x, w, strict=True)):
        q = ODD[points[i // 8][i % 8]]
        sumqx += weight * value * q
        sumq2 += weight * q * q
    return sumqx, sumq2


def search_points(
    x: Floats, w: Floats, reach: np.float32, scale: np.float32, steps: int, qtype: QType
) -> tuple[np.float32, list[Point]]:
    """Of a row of scales the one whose points fit best; some points are then found again.

    At first `reach` is to get the largest value, 5; `scale` is the result where no other is any good.
    """

    def find(k: int, inverse: np.float32, step_scale: np.float32) -> tuple[Point, bool]:
        group = x[8 * k : 8 * k + 8]
        root = [np.sqrt(weight) for weight in w[8 * k : 8 * k + 8]]
        levels = tuple(clamp(0, nearest(F(0.5) * (inverse * value - F(1))), 2) for value in group)
        return nearest_point(group, root, levels, ODD, step_scale, qtype), levels in grid(qtype)

    n_groups = len(x) // 8
    points = [(0,) * 8] * n_groups
    on_grid = [qtype is not QType.IQ2_XXS] * n_groups
    best = F(0)
    for step in range(-steps, steps + 1):
        inverse = (F(5) + F(step) * F(0.1)) / reach
        found = [find(k, inverse, F(1) / inverse) for k in range(n_groups)]
        sumqx, sumq2 = odd_fit([point for point, _ in found], x, w)
        if sumq2 > 0 and sumqx * sumqx > best * sumq2:
            scale = sumqx / sumq2
            best = scale * sumqx
            points = [point for point, _ in found]
            on_grid = [on and qtype is not QType.IQ2_XXS for _, on in found]
    if not all(on_grid) and scale > 0:
        for k in range(n_groups):
            if not on_grid[k]:
                points[k], _ = find(k, F(1) / scale, scale)
        sumqx, sumq2 = odd_fit(points, x, w)
        if sumq2 > 0:
            scale = sumqx / sumq2
    return scale, points


def iq2_sub_blocks(
    x: Floats, w: Floats, size: int, nearly_zero: np.float32, qtype: QType
) -> tuple[list[np.float32], list[int], list[int]]:
    """Scales, grid indices and signs of a super-block's sub-blocks."""
    scales, indices, signs = [], [], []
    for values, weights in zip(parts(x, size), parts(w, size), strict=True):
        groups = zip(parts(values, 8), parts(weights, 8), strict=True)
        if qtype is QType.IQ2_S:
            signed = [
                ([abs(v) for v in eight], sum(bool(v < 0) << i for i, v in enumerate(eight))) for eight, _ in groups
            ]
        else:
            signed = [even_signs(eight, weight) for eight, weight in groups]
        magnitudes = [value for eight, _ in signed for value in eight]
        largest = max(magnitudes)
        reach, scale, steps = largest, largest / F(5), 9
        if qtype is QType.IQ2_XXS:
            scale, _ = unsigned_search(magnitudes, weights, 4)
            reach, steps = scale * F(3), 6
        if largest < nearly_zero or reach <= 0:
            scales.append(F(0))
            indices += [0] * (size // 8)
            signs += [0] * (size // 8)
            continue
        scale, points = search_points(magnitudes, weights, reach, scale, steps, qtype)
        flip = (255 if qtype is QType.IQ2_S else 127) if scale < 0 else 0
        scales.append(abs(scale))
        indices += [grid(qtype)[point] for point in points]
        signs += [sign ^ flip for _, sign in signed]
    return scales, indices, signs


def iq2_xxs_block(x: Floats, quant_weights: Floats | None) -> bytes:
    assert quant_weights is not None
    w = importances(x, quant_weights, 1)
    scales, indices, signs = iq2_sub_blocks(x, w, 32, NEARLY_ZERO, QType.IQ2_XXS)
    if not any(scales):
        return bytes(66)
    d, levels = scale_levels(scales, 15)
    block = half(d)
    for level, index, sign in zip(levels, parts(indices, 4), parts(signs, 4), strict=True):
        word = sum(bits << (7 * k) for k, bits in enumerate(sign)) | level << 28
        block += bytes(index) + word.to_bytes(4, "little")
    return block


def iq2_xs_block(x: Floats, quant_weights: Floats | None) -> bytes:
    assert quant_weights is not None
    w = importances(x, quant_weights, 1)
    scales, indices, signs = iq2_sub_blocks(x, w, 16, NEARLY_ZERO, QType.IQ2_XS)
    if not any(scales):
        return bytes(74)
    d, levels = scale_levels(scales, 15)
    qs = b"".join((index | sign << 9).to_bytes(2, "little") for index, sign in zip(indices, signs, strict=True))
    return half(d) + qs + bytes(low | high << 4 for low, high in parts(levels, 2))


def iq2_s_block(x: Floats, quant_weights: Floats | None) -> bytes:
    if quant_weights is None:
        sigma2 = F(2) * total([value * value for value in x]) / F(256)
        w = [F(0.25) * sigma2 + value * value for value in x]
    else:
        w = importances(x, quant_weights, 2)
    scales, indices, signs = iq2_sub_blocks(x, w, 16, F(1e-8), QType.IQ2_S)
    d, levels = scale_levels(scales, 15) if any(scales) else (F(0), [0] * 16)
    qh = bytes(sum(index >> 8 << (2 * k) for k, index in enumerate(four)) for four in parts(indices, 4))
    packed = bytes(low | high << 4 for low, high in parts(levels, 2))
    return half(d * F(0.9875)) + bytes(index & 255 for index in indices) + bytes(signs) + qh + packed


# IQ1 ------------------------------------------------------------------------------------------------------------------

Score = tuple[np.float32, np.float32, int]
"""Weighted sums of x * q and of q * q, and what makes them."""


def best_split(n: int, scores: Callable[[int, int], list[Score]]) -> tuple[np.float32, int, int, int] | None:
    """Scale, both splits and the choice with the best score, over all ways to split n sorted weights in three."""
    best, found = -np.finfo(F).max, None
    for i1 in range(n + 1):
        for i2 in range(i1, n + 1):
            for sumqx, sumq2, choice in scores(i1, i2):
                if sumq2 > 0 and sumqx * sumqx > best * sumq2:
                    scale = sumqx / sumq2
                    best, found = scale * sumqx, (scale, i1, i2, choice)
    return found


def running(values: Floats) -> list[np.float32]:
    """Sums of the first 0, 1, 2 ... values."""
    sums = [F(0)]
    for value in values:
        sums.append(sums[-1] + value)
    return sums


def levels_of(order: list[int], i1: int, i2: int, mirrored: bool) -> list[int]:
    levels = [0] * len(order)
    for rank, i in enumerate(order):
        level = (rank >= i1) + (rank >= i2)
        levels[i] = 2 - level if mirrored else level
    return levels


def on_grid(
    x: Floats, w: Floats, levels: list[int], scale: np.float32, values: list[Floats], qtype: QType
) -> tuple[np.float32, list[int]]:
    """Scale and grid indices, once the groups are moved to the grid."""
    groups = [tuple(group) for group in parts(levels, 8)]
    points = [
        nearest_point(x[8 * k : 8 * k + 8], w[8 * k : 8 * k + 8], group, values[k], scale, qtype)
        for k, group in enumerate(groups)
    ]
    if points != groups:
        sumqx, sumq2 = fit(points, values, x, w)
        if sumqx > 0 and sumq2 > 0:
            scale = sumqx / sumq2
    return scale, [grid(qtype)[point] for point in points]


def iq1_s_sub_block(x: Floats, w: Floats) -> tuple[np.float32, bool, list[int]]:
    """Scale, whether the shift is negative, and grid indices of 32 weights."""
    order = sorted(range(32), key=lambda i: x[i])
    sumx = running([w[i] * x[i] for i in order])
    sumw = running([w[i] for i in order])

    def scores(i1: int, i2: int) -> list[Score]:
        results = []
        for choice, q in enumerate((PLUS, MINUS)):
            sumqx = (sumx[i1] - sumx[0]) * q[0] + (sumx[i2] - sumx[i1]) * q[1] + (sumx[32] - sumx[i2]) * q[2]
            low, middle, high = sumw[i1] - sumw[0], sumw[i2] - sumw[i1], sumw[32] - sumw[i2]
            results.append((sumqx, low * q[0] * q[0] + middle * q[1] * q[1] + high * q[2] * q[2], choice))
        return results

    best = best_split(32, scores)
    if max(abs(value) for value in x) < F(1e-12) or best is None:
        return F(0), False, [0] * 4
    scale, i1, i2, choice = best
    negative = (choice == 1) != bool(scale < 0)
    levels = levels_of(order, i1, i2, bool(scale < 0))
    scale, indices = on_grid(x, w, levels, abs(scale), [MINUS if negative else PLUS] * 4, QType.IQ1_S)
    return scale, negative, indices


def iq1_s_block(x: Floats, quant_weights: Floats | None) -> bytes:
    assert quant_weights is not None
    w = importances(x, quant_weights, 2)
    found = [iq1_s_sub_block(values, weights) for values, weights in zip(parts(x, 32), parts(w, 32), strict=True)]
    scales = [scale for scale, _, _ in found]
    qs = bytes(index & 255 for _, _, indices in found for index in indices)
    words = [sum(index >> 8 << (3 * k) for k, index in enumerate(indices)) for _, _, indices in found]
    d = F(0)
    if any(scales):
        d, levels = scale_levels(scales, 7)
        for j, (_, negative, _) in enumerate(found):
            words[j] |= levels[j] << 12 | negative << 15
    return half(d * F(1.125)) + qs + b"".join(word.to_bytes(2, "little") for word in words)


def iq1_m_sub_block(x: Floats, w: Floats) -> tuple[np.float32, int, list[int]]:
    """Scale, shifts (bit 1: of the first group, bit 0: of the second one negative), grid indices of 16 weights."""
    order = sorted(range(16), key=lambda i: x[i])
    sumx = [running([w[i] * x[i] if i // 8 == k else F(0) for i in order]) for k in (0, 1)]
    sumw = [running([w[i] if i // 8 == k else F(0) for i in order]) for k in (0, 1)]

    def scores(i1: int, i2: int) -> list[Score]:
        qx, q2 = [], []  # of both groups, each with both shifts
        for k in (0, 1):
            below = sumx[k][i1] + sumx[k][i2]
            qx.append([sumx[k][16] * q[2] - below for q in (PLUS, MINUS)])
            q2.append(
                [
                    sumw[k][16] * q[2] * q[2]
                    + sumw[k][i1] * (q[0] * q[0] - q[1] * q[1])
                    + sumw[k][i2] * (q[1] * q[1] - q[2] * q[2])
                    for q in (PLUS, MINUS)
                ]
            )
        return [(qx[0][c >> 1] + qx[1][c & 1], q2[0][c >> 1] + q2[1][c & 1], c) for c in range(4)]

    best = best_split(16, scores)
    if max(abs(value) for value in x) < F(1e-7) or best is None:
        return F(0), 0, [0] * 2
    scale, i1, i2, shifts = best
    if scale < 0:
        shifts = 3 - shifts
    levels = levels_of(order, i1, i2, bool(scale < 0))
    scale, indices = on_grid(x, w, levels, abs(scale), shifted(shifts), QType.IQ1_M)
    return scale, shifts, indices


def shifted(shifts: int) -> list[Floats]:
    return [MINUS if shifts & 2 else PLUS, MINUS if shifts & 1 else PLUS]


def iq1_m_block(x: Floats, quant_weights: Floats | None) -> bytes:
    w = [value * value for value in x] if quant_weights is None else importances(x, quant_weights, 2)
    found = [iq1_m_sub_block(values, weights) for values, weights in zip(parts(x, 16), parts(w, 16), strict=True)]
    qs = bytes(index & 255 for _, _, indices in found for index in indices)
    if not any(scale for scale, _, _ in found):
        return qs + bytes(indices[0] >> 8 | indices[1] >> 8 << 4 for _, _, indices in found) + bytes(8)
    qh = bytes(
        indices[0] >> 8 | (shifts >> 1) << 3 | indices[1] >> 8 << 4 | (shifts & 1) << 7 for _, shifts, indices in found
    )
    d, levels = scale_levels([scale for scale, _, _ in found], 7)
    points = list(grid(QType.IQ1_M))
    sumqx = sumq2 = F(0)
    for j, (_, shifts, indices) in enumerate(found):
        for i in range(16):
            q = shifted(shifts)[i // 8][points[indices[i // 8]][i % 8]] * F(2 * levels[j] + 1)
            sumqx += w[16 * j + i] * q * x[16 * j + i]
            sumq2 += w[16 * j + i] * q * q
    if sumq2 > 0:
        d = sumqx / sumq2
    bits = int.from_bytes(half(d * F(1.1125)), "little")
    words = [
        sum(level << (3 * k) for k, level in enumerate(four)) | (bits >> (4 * n) & 15) << 12
        for n, four in enumerate(parts(levels, 4))
    ]
    return qs + qh + b"".join(word.to_bytes(2, "little") for word in words)


BLOCKS = {
    QType.IQ2_XXS: iq2_xxs_block,
    QType.IQ2_XS: iq2_xs_block,
    QType.IQ2_S: iq2_s_block,
    QType.IQ1_S: iq1_s_block,
    QType.IQ1_M: iq1_m_block,
}


def quantize(row: np.ndarray, qtype: QType, quant_weights: np.ndarray | None = None) -> bytes:
    """The bytes of one float32 row."""
    with np.errstate(all="ignore"):
        return b"".join(
            BLOCKS[qtype](list(row[j : j + 256]), None if quant_weights is None else list(quant_weights[j : j + 256]))
            for j in range(0, len(row), 256)
        )
