"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0 as plain loops over float32 scalars: slow, and meant to be read.

`quantize(row, qtype, quant_weights)` gives the bytes of one row. Levels are found a block at a time by one of four
functions; the rest is packing.

Source: quantize_row_*_ref, quantize_row_*_impl, make_qx_quants, make_qkx3_quants in ggml-quants.c.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType as QType

F = np.float32
Floats = Sequence[np.float32]


def half(x: np.float32) -> bytes:
    """Little-endian bytes of a float16."""
    return struct.pack("<H", int(np.float16(x).view(np.uint16)))


def int8(x: np.float32) -> int:
    """Towards zero; what no int8 holds becomes 0."""
    return int(x) if abs(x) < 128 else 0


def half_away(x: np.float32) -> int:
    """C's roundf, then stored in an int8."""
    if not math.isfinite(x):
        return 0
    return int(math.copysign(math.floor(abs(float(x)) + 0.5), x))


def nearest(x: np.float32) -> int:
    """nearest_int: the low mantissa bits of x + 1.5 * 2**23."""
    return (int(F(x + F(12582912)).view(np.uint32)) & 0x7FFFFF) - 0x400000


def clamp(low: int, level: int, high: int) -> int:
    return max(low, min(high, level))


def reciprocal(d: np.float32) -> np.float32:
    return F(1) / d if d != 0 else F(0)


# Levels of a block ----------------------------------------------------------------------------------------------------


def symmetric(x: Floats, half_range: int) -> tuple[np.float32, list[int]]:
    """The weight of largest magnitude falls on level 0, which means -half_range."""
    peak = F(0)
    for value in x:
        if abs(value) > abs(peak):
            peak = value
    d = peak / F(-half_range)
    inverse = reciprocal(d)
    return d, [min(2 * half_range - 1, int8(value * inverse + F(half_range + 0.5))) for value in x]


def affine(x: Floats, n_max: int) -> tuple[np.float32, np.float32, list[int]]:
    """The smallest weight falls on level 0, the largest on n_max."""
    low = high = x[0]
    for value in x:
        low = value if value < low else low
        high = value if value > high else high
    d = (high - low) / F(n_max)
    inverse = reciprocal(d)
    return d, low, [min(n_max, int8((value - low) * inverse + F(0.5))) for value in x]


def symmetric_search(x: Floats, w: Floats, half_range: int) -> tuple[np.float32, list[int]]:
    """Of 19 ways to make the levels, the one whose best scale leaves the smallest weighted squared error."""
    peak = F(0)
    for value in x:
        if abs(value) > abs(peak):
            peak = value
    if abs(peak) < F(1e-15):
        return F(0), [0] * len(x)
    found: list[int] = []
    scale = best = F(0)
    for offset in (0, *range(-9, 0), *range(1, 10)):
        factor = -(F(half_range) + F(0.1) * F(offset)) / peak
        levels = [clamp(-half_range, nearest(factor * value), half_range - 1) for value in x]
        sum_lx = sum_l2 = F(0)
        for value, weight, level in zip(x, w, levels, strict=True):
            sum_lx += weight * value * F(level)
            sum_l2 += weight * F(level) * F(level)
        if offset == 0:
            scale = sum_lx / sum_l2 if sum_l2 != 0 else F(0)
            best = scale * sum_lx
            found = levels
        elif sum_l2 > 0 and sum_lx * sum_lx > best * sum_l2:
            scale = sum_lx / sum_l2
            best = scale * sum_lx
            found = levels
    return scale, [level + half_range for level in found]


def affine_search(x: Floats, w: Floats, n_max: int) -> tuple[np.float32, np.float32, list[int]]:
    """Of 38 ways to make the levels, the one whose regression line leaves the smallest weighted squared error."""
    low = min(x)
    high = max(x)
    sum_w, sum_x = w[0], w[0] * x[0]
    for value, weight in zip(x[1:], w[1:], strict=True):
        sum_w += weight
        sum_x += weight * value
    if low > 0:
        low = F(0)
    if high <= low:
        return F(0), low, [0] * len(x)

    def levels_for(factor: np.float32) -> list[int]:
        return [clamp(0, nearest(factor * (value - low)), n_max) for value in x]

    def error_of(scale: np.float32, low: np.float32, levels: list[int]) -> np.float32:
        total = F(0)
        for value, weight, level in zip(x, w, levels, strict=True):
            difference = scale * F(level) + low - value
            total += weight * (difference * difference)
        return total

    factor = F(n_max) / (high - low)
    scale = F(1) / factor
    found = levels_for(factor)
    best = error_of(scale, low, found)
    for step in range(37):
        factor = (F(-0.9) + F(0.05) * F(step) + F(n_max)) / (high - low)
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


# Packing --------------------------------------------------------------------------------------------------------------


def nibbles(levels: list[int]) -> bytes:
    """Weight j in the low half of byte j, weight j + 16 in the high half."""
    return bytes((levels[j] & 15) | (levels[j + 16] & 15) << 4 for j in range(16))


def fifth_bits(levels: list[int]) -> bytes:
    return sum((level >> 4) << j for j, level in enumerate(levels)).to_bytes(4, "little")


def trits(levels: Sequence[int]) -> int:
    """Five levels of 0-2 in a byte, as a fraction of 256 whose ternary digits they are."""
    number = 0
    for level in levels:
        number = 3 * number + level
    return (number * 256 + 242) // 243


def importances(row: np.ndarray, quant_weights: np.ndarray) -> list[np.float32]:
    total = F(0)
    for value in row:
        total += value * value
    sigma2 = total / F(len(row))
    return [weight * np.sqrt(sigma2 + value * value) for value, weight in zip(row, quant_weights, strict=True)]


def ternary_block(x: Floats, qtype: QType) -> bytes:
    d = max(abs(value) for value in x)
    inverse = reciprocal(d)
    levels = [half_away(value * inverse) + 1 for value in x]
    if qtype is QType.TQ2_0:
        qs = [
            sum((levels[half_start + 32 * n + m] & 3) << (2 * n) for n in range(4))
            for half_start in (0, 128)
            for m in range(32)
        ]
        return bytes(qs) + half(d)
    qs = [trits([levels[32 * n + m] for n in range(5)]) for m in range(32)]
    qs += [trits([levels[160 + 16 * n + m] for n in range(5)]) for m in range(16)]
    qh = [trits([levels[240 + 4 * n + m] for n in range(4)] + [0]) for m in range(4)]
    return bytes(qs) + bytes(qh) + half(d)


def block_bytes(x: Floats, w: Floats | None, qtype: QType) -> bytes:
    """One block of 32."""
    if qtype is QType.Q8_0:
        d = max(abs(value) for value in x) / F(127)
        inverse = reciprocal(d)
        return half(d) + bytes(half_away(value * inverse) & 0xFF for value in x)
    bits = 5 if qtype in (QType.Q5_0, QType.Q5_1) else 4
    if qtype in (QType.Q4_0, QType.Q5_0):
        half_range = 2 ** (bits - 1)
        d, levels = symmetric(x, half_range) if w is None else symmetric_search(x, w, half_range)
        scales = half(d)
    else:
        n_max = 2**bits - 1
        d, low, levels = affine(x, n_max) if w is None else affine_search(x, w, n_max)
        scales = half(d) + half(low)
    return scales + (fifth_bits(levels) if bits == 5 else b"") + nibbles(levels)


def quantize(row: np.ndarray, qtype: QType, quant_weights: np.ndarray | None = None) -> bytes:
    """The bytes of one float32 row."""
    with np.errstate(all="ignore"):
        if qtype in (QType.TQ1_0, QType.TQ2_0):
            return b"".join(ternary_block(row[start : start + 256], qtype) for start in range(0, len(row), 256))
        weights = None if quant_weights is None else importances(row, quant_weights)
        return b"".join(
            block_bytes(list(row[j : j + 32]), None if weights is None else weights[j : j + 32], qtype)
            for j in range(0, len(row), 32)
        )
