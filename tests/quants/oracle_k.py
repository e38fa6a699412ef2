"""Q2_K to Q6_K as plain loops over float32 scalars: slow, and meant to be read.

`quantize(row, qtype, quant_weights)` gives the bytes of one row. Each block function finds scales and levels and packs
them, as the head of the type's module describes it.

Source: quantize_row_q{2,3,4,5,6}_K_ref and _impl, make_qkx2_quants, make_qkx3_quants, make_qp_quants, make_qx_quants,
make_q3_quants in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from tests.quants.oracle_legacy import F, Floats, clamp, half, nearest, symmetric_search

NEARLY_ZERO = F(1e-15)


def half_value(x: np.float32) -> np.float32:
    """x after a trip through a float16."""
    return F(np.float16(x))


def total(values: Floats) -> np.float32:
    """Sum in order."""
    result = F(0)
    for value in values:
        result += value
    return result


def parts(values: Sequence, size: int) -> list:
    return [values[start : start + size] for start in range(0, len(values), size)]


# Searches -------------------------------------------------------------------------------------------------------------


def affine_search(
    x: Floats, w: Floats, n_max: int, first: float, step: float, n_steps: int, absolute: bool
) -> tuple[np.float32, np.float32, list[int]]:
    """Of several ways to make the levels, the one whose regression line leaves the smallest weighted error."""
    low, high = x[0], x[0]
    sum_w, sum_x = w[0], w[0] * x[0]
    for value, weight in zip(x[1:], w[1:], strict=True):
        low = value if value < low else low
        high = value if value > high else high
        sum_w += weight
        sum_x += weight * value
    low = F(0) if low > 0 else low
    if high == low:
        return F(0), low, [0] * len(x)

    def levels_for(factor: np.float32) -> list[int]:
        return [clamp(0, nearest(factor * (value - low)), n_max) for value in x]

    def error_of(scale: np.float32, low: np.float32, levels: list[int]) -> np.float32:
        error = F(0)
        for value, weight, level in zip(x, w, levels, strict=True):
            difference = scale * F(level) + low - value
            error += weight * (abs(difference) if absolute else difference * difference)
        return error

    factor = F(n_max) / (high - low)
    scale = F(1) / factor
    found = levels_for(factor)
    best = error_of(scale, low, found)
    for k in range(n_steps + 1):
        factor = (F(first) + F(step) * F(k) + F(n_max)) / (high - low)
        levels = levels_for(factor)
        sum_l = sum_l2 = sum_xl = F(0)
        for value, weight, level in zip(x, w, levels, strict=True):
            sum_l += weight * F(level)
            sum_l2 += weight * F(level) * F(level)
            sum_xl += weight * F(level) * value
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if determinant > 0:
            this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            if this_low > 0:
                this_low = F(0)
                this_scale = sum_xl / sum_l2
            error = error_of(this_scale, this_low, levels)
            if error < best:
                found, best, scale, low = levels, error, this_scale, this_low
    return scale, low, found


def unsigned_search(x: Floats, w: Floats, n_max: int) -> tuple[np.float32, list[int]]:
    """Of nine scales the best; then single levels move while that helps."""
    high = F(0)
    for value in x:
        high = high if high > value else value
    if high < NEARLY_ZERO:
        return F(0), [0] * len(x)

    def error_of(scale: np.float32, levels: list[int]) -> np.float32:
        error = F(0)
        for value, weight, level in zip(x, w, levels, strict=True):
            difference = value - scale * F(level)
            error += weight * difference * difference
        return error

    factor = F(n_max) / high
    best = error_of(F(1) / factor, [nearest(factor * value) & 0xFF for value in x])
    for offset in (-4, -3, -2, -1, 1, 2, 3, 4):
        candidate = (F(0.1) * F(offset) + F(n_max)) / high
        error = error_of(F(1) / candidate, [min(n_max, nearest(candidate * value)) for value in x])
        if error < best:
            best, factor = error, candidate
    unlimited = [min(n_max, nearest(factor * value)) for value in x]
    levels = [level & 0xFF for level in unlimited]
    sum_lx = sum_l2 = F(0)
    for value, weight, level in zip(x, w, unlimited, strict=True):
        sum_lx += weight * value * F(level)
        sum_l2 += weight * F(level) * F(level)
    for _ in range(5):
        changed = False
        for i, (value, weight) in enumerate(zip(x, w, strict=True)):
            slx = sum_lx - weight * value * F(levels[i])
            sl2 = sum_l2 - weight * F(levels[i]) * F(levels[i])
            if slx > 0 and sl2 > 0:
                level = min(n_max, nearest(value * sl2 / slx))
                if level != levels[i]:
                    slx += weight * value * F(level)
                    sl2 += weight * F(level) * F(level)
                    if slx * slx * sum_l2 > sum_lx * sum_lx * sl2:
                        levels[i], sum_lx, sum_l2, changed = level & 0xFF, slx, sl2, True
        if not changed:
            break
    return (sum_lx / sum_l2 if sum_l2 > 0 else F(0)), levels


def level_search(x: Floats, half_range: int) -> tuple[np.float32, list[int]]:
    """Levels that move one at a time while that helps; a weight's error counts by its square."""
    peak = F(0)
    for value in x:
        peak = value if abs(value) > abs(peak) else peak
    if abs(peak) < NEARLY_ZERO:
        return F(0), [0] * len(x)
    factor = F(-half_range) / peak
    levels = [clamp(-half_range, nearest(factor * value), half_range - 1) for value in x]
    sum_lx = sum_l2 = F(0)
    for value, level in zip(x, levels, strict=True):
        sum_lx += value * value * value * F(level)
        sum_l2 += value * value * F(level) * F(level)
    for _ in range(5):
        changed = False
        for i, value in enumerate(x):
            weight = value * value
            slx = sum_lx - weight * value * F(levels[i])
            if slx > 0:
                sl2 = sum_l2 - weight * F(levels[i]) * F(levels[i])
                level = clamp(-half_range, nearest(value * sl2 / slx), half_range - 1)
                if level != levels[i]:
                    slx += weight * value * F(level)
                    sl2 += weight * F(level) * F(level)
                    if sl2 > 0 and slx * slx * sum_l2 > sum_lx * sum_lx * sl2:
                        levels[i], sum_lx, sum_l2, changed = level, slx, sl2, True
        if not changed:
            break
    return (sum_lx / sum_l2 if sum_l2 > 0 else F(0)), [level + half_range for level in levels]


# Scales and minima: Q2_K, Q4_K, Q5_K ----------------------------------------------------------------------------------


def importances(x: Floats, w: Floats, factor: int) -> list[np.float32]:
    """quant_weight * sqrt(factor * mean square of the super-block + x**2)."""
    variance = F(factor) * total([value * value for value in x]) / F(256)
    return [weight * np.sqrt(variance + value * value) for value, weight in zip(x, w, strict=True)]


def rounded_to_largest(values: Floats, n_max: int) -> tuple[np.float32, list[int]]:
    """Scales (or minima) in units of the largest / n_max."""
    high = F(0)
    for value in values:
        high = value if value > high else high
    factor = F(n_max) / high if high > 0 else F(0)
    return high / F(n_max), [nearest(factor * value) & 0xFF for value in values]


def affine_levels(x: Floats, searched: list[int], scale: np.float32, minimum: np.float32, n_max: int) -> list[int]:
    """Levels for a rounded scale; where that is zero, those of the search."""
    if scale == 0:
        return searched
    return [clamp(0, nearest((value + minimum) / scale), n_max) for value in x]


def q2_k(x: Floats, w: Floats | None) -> bytes:
    if w is None:
        fits = [affine_search(sub, [abs(v) for v in sub], 3, -0.5, 0.1, 15, True) for sub in parts(x, 16)]
        d, scales = rounded_to_largest([scale for scale, _, _ in fits], 15)
        dmin, mins = rounded_to_largest([-low for _, low, _ in fits], 15)
    else:
        weights = parts(importances(x, w, 1), 16)
        fits = [affine_search(sub, v, 3, -0.9, 0.05, 36, False) for sub, v in zip(parts(x, 16), weights, strict=True)]
        sums = [total(v) for v in weights]
        d, scales = unsigned_search([scale for scale, _, _ in fits], sums, 15)
        dmin, mins = unsigned_search([-low for _, low, _ in fits], sums, 15)
    packed = [(scale | minimum << 4) & 0xFF for scale, minimum in zip(scales, mins, strict=True)]
    levels: list[int] = []
    for sub, (_, _, searched), byte in zip(parts(x, 16), fits, packed, strict=True):
        scale, minimum = half_value(d) * F(byte & 15), half_value(dmin) * F(byte >> 4)
        levels += affine_levels(sub, searched, scale, minimum, 3)
    return bytes(packed) + low_two_bits(levels) + half(d) + half(dmin)


def q45_k(x: Floats, w: Floats | None, bits: int) -> bytes:
    n_max = 2**bits - 1
    if w is None:
        fits = []
        for sub in parts(x, 32):
            rms = np.sqrt(total([value * value for value in sub]) / F(32))
            first, n_steps = (-1.0, 20) if bits == 4 else (-0.5, 15)
            fits.append(affine_search(sub, [rms + abs(value) for value in sub], n_max, first, 0.1, n_steps, False))
        d, scales = rounded_to_largest([scale for scale, _, _ in fits], 63)
        dmin, mins = rounded_to_largest([-low for _, low, _ in fits], 63)
    else:
        weights = parts(importances(x, w, 2), 32)
        fits = [
            affine_search(sub, v, n_max, -0.9, 0.05, 36, False) for sub, v in zip(parts(x, 32), weights, strict=True)
        ]
        sums = [total(v) for v in weights]
        d, scales = unsigned_search([scale for scale, _, _ in fits], sums, 63)
        dmin, mins = unsigned_search([-low for _, low, _ in fits], sums, 63)
    if w is None or bits == 5:
        scales = [min(63, scale) for scale in scales]
        mins = [min(63, minimum) for minimum in mins]
    packed = [0] * 12
    for j in range(4):
        packed[j] = scales[j] | (scales[j + 4] >> 4) << 6
        packed[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6
        packed[j + 8] = scales[j + 4] & 15 | (mins[j + 4] & 15) << 4
    packed = [byte & 0xFF for byte in packed]
    levels: list[int] = []
    for j, (sub, (_, _, searched)) in enumerate(zip(parts(x, 32), fits, strict=True)):
        if j < 4:
            scale, minimum = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
            minimum = packed[j + 4] >> 4 | packed[j] >> 6 << 4
        levels += affine_levels(sub, searched, half_value(d) * F(scale), half_value(dmin) * F(minimum), n_max)
    qh = bytes(sum((levels[32 * k + i] >> 4) << k for k in range(8)) for i in range(32)) if bits == 5 else b""
    qs = bytes(q[i] & 15 | (q[i + 32] & 15) << 4 for q in parts(levels, 64) for i in range(32))
    return half(d) + half(dmin) + bytes(packed) + qh + qs


# Scales alone: Q3_K, Q6_K ---------------------------------------------------------------------------------------------


def peak_of(scales: Floats) -> np.float32:
    peak = F(0)
    for scale in scales:
        peak = scale if abs(scale) > abs(peak) else peak
    return peak


def symmetric_levels(x: Floats, searched: list[int], scale: np.float32, half_range: int) -> list[int]:
    """Levels for a rounded scale; where that is zero, those of the search."""
    if scale == 0:
        return searched
    return [clamp(-half_range, nearest(value / scale), half_range - 1) + half_range for value in x]


def q3_k(x: Floats, w: Floats | None) -> bytes:
    d = F(0)
    scales = [0] * 16
    if w is None:
        fits = [level_search(sub, 4) for sub in parts(x, 16)]
        peak = peak_of([scale for scale, _ in fits])
        if peak != 0:
            factor = F(-32) / peak
            d = F(1) / factor
            scales = [clamp(-32, nearest(factor * scale), 31) + 32 for scale, _ in fits]
    else:
        weights = parts(importances(x, w, 2), 16)
        fits = [symmetric_search(sub, v, 4) for sub, v in zip(parts(x, 16), weights, strict=True)]
        d, scales = symmetric_search([scale for scale, _ in fits], [total(v) for v in weights], 32)
    packed = [scales[j] & 15 | (scales[j + 8] & 15) << 4 for j in range(8)]
    packed += [sum((scales[4 * k + j] >> 4) << 2 * k for k in range(4)) for j in range(4)]
    levels: list[int] = []
    for sub, (_, searched), scale in zip(parts(x, 16), fits, scales, strict=True):
        levels += symmetric_levels(sub, searched, half_value(d) * F(scale - 32), 4)
    hmask = bytes(sum((levels[32 * k + i] >> 2) << k for k in range(8)) for i in range(32))
    return hmask + low_two_bits([level & 3 for level in levels]) + bytes(packed) + half(d)


def q6_k(x: Floats, w: Floats | None) -> bytes:
    weights = [value * value for value in x] if w is None else w
    fits = [symmetric_search(sub, v, 32) for sub, v in zip(parts(x, 16), parts(weights, 16), strict=True)]
    peak = peak_of([scale for scale, _ in fits])
    if abs(peak) < NEARLY_ZERO:
        return bytes(210)
    factor = F(-128) / peak
    d = F(1) / factor
    scales = [min(127, nearest(factor * scale)) for scale, _ in fits]
    levels: list[int] = []
    for sub, (_, searched), scale in zip(parts(x, 16), fits, scales, strict=True):
        levels += symmetric_levels(sub, searched, half_value(d) * F(scale), 32)
    ql = b""
    qh = b""
    for q in parts(levels, 128):
        ql += bytes(q[i] & 15 | (q[i + 64] & 15) << 4 for i in range(64))
        qh += bytes(sum((q[i + 32 * k] >> 4) << 2 * k for k in range(4)) for i in range(32))
    return ql + qh + bytes(scale & 0xFF for scale in scales) + half(d)


def low_two_bits(levels: list[int]) -> bytes:
    """Four levels of 0-3 in a byte, 32 weights apart."""
    return bytes(sum(q[i + 32 * k] << 2 * k for k in range(4)) for q in parts(levels, 128) for i in range(32))


def block_bytes(x: Floats, w: Floats | None, qtype: QType) -> bytes:
    """One super-block."""
    if qtype is QType.Q2_K:
        return q2_k(x, w)
    if qtype is QType.Q3_K:
        return q3_k(x, w)
    if qtype is QType.Q6_K:
        return q6_k(x, w)
    return q45_k(x, w, bits=4 if qtype is QType.Q4_K else 5)


def quantize(row: np.ndarray, qtype: QType, quant_weights: np.ndarray | None = None) -> bytes:
    """The bytes of one float32 row."""
    with np.errstate(all="ignore"):
        return b"".join(
            block_bytes(
                list(row[start : start + 256]),
                None if quant_weights is None else list(quant_weights[start : start + 256]),
                qtype,
            )
            for start in range(0, len(row), 256)
        )
