"""IQ4_NL: 32 weights, one scale, 4 bits each on a non-linear scale of values; 4.5 bits a weight.

    block (18 bytes)   d   float16      scale
                       qs  uint8[16]    levels: weight j in the low half of byte j, weight j + 16 in the high half
    weight = d * VALUES[level]

The search, which IQ4_XS shares, tries 16 scales a block and keeps the one with the least weighted squared error.

Source: quantize_row_iq4_nl_impl, quantize_iq4_nl and kvalues_iq4nl in ggml-quants.c and ggml-common.h.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import gather, inlined, kernel, scratch, sum_of_squares, weigh, write_f16
from gguf3n.quants.vectors import WIDTH, Vector, load, splat, store, where

BLOCK = 32
BLOCK_BYTES = 2 + BLOCK // 2

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
MIDDLES = (VALUES[:-1] + VALUES[1:]) / np.float32(2)
STEPS = VALUES[1:] - VALUES[:-1]
LOWEST = np.float32(-127)
TRIES = 7

# Rows of the scratch array S[row, lane], one block a lane: after the weights, 32 rows each for the block in work.
WEIGHTS = 256
LOW = WEIGHTS + BLOCK
HIGH = LOW + BLOCK
LIMIT = HIGH + BLOCK
SCALE = LIMIT + BLOCK
ROWS = SCALE + 1

ZERO = np.float32(0)
ONE = np.float32(1)
HALF = np.float32(0.5)
NEARLY_ZERO = np.float32(1e-15)


@inlined
def nearest_value(x: Vector) -> Vector:
    """The entry of VALUES nearest to x, the upper one of two.

    Exact: as best_index_int8, whose two differences are exact wherever they are close; NaN gives the last.
    """
    value = splat(LOWEST)
    for k in range(15):
        value = value + where(x < MIDDLES[k], ZERO, STEPS[k])
    return value


@inlined
def nearest_level(x: Vector) -> Vector:
    """The index of nearest_value(x)."""
    level = splat(ZERO)
    for k in range(15):
        level = level + where(x < MIDDLES[k], ZERO, ONE)
    return level


@inlined
def try_scale(S: np.ndarray, x: int, inverse: Vector) -> tuple[Vector, Vector]:
    """Weighted sums of x * q and of q * q, for the values q of an inverse scale, each LOW or HIGH."""
    sumqx = splat(ZERO)
    sumq2 = splat(ZERO)
    for j in range(BLOCK):
        value = load(S, x + j)
        q = where(inverse * value < load(S, LIMIT + j), load(S, LOW + j), load(S, HIGH + j))
        wq = load(S, WEIGHTS + j) * q
        sumqx = sumqx + wq * value
        sumq2 = sumq2 + wq * q
    return sumqx, sumq2


@inlined
def search_scale(S: np.ndarray, x: int) -> Vector:
    """The scale of each lane's block: the 32 weights from row x, their importances in rows WEIGHTS.

    Why: all tries but the first map the weight of largest magnitude to -134 .. -120. So they stretch a weight by less
        than the ratio of any two neighbouring MIDDLES, and it takes at most two values in them, LOW and HIGH: those of
        the outermost tries, as rounding is monotone. One comparison with the middle between them tells which.
        # measured: 270 million weights/s as vectors, 100 as loops over S[row, lane]; ggml 3.5 on the same core
    """
    peak = load(S, x)
    for j in range(1, BLOCK):
        value = load(S, x + j)
        peak = where(abs(value) > abs(peak), value, peak)

    inverse = ONE / (-peak / LOWEST)
    sumqx = splat(ZERO)
    sumq2 = splat(ZERO)
    first = np.float32(-127 - TRIES) / peak
    last = np.float32(-127 + TRIES) / peak
    for j in range(BLOCK):
        value = load(S, x + j)
        # ggml quirk: the first try maps the weight of largest magnitude to 127, where there is no value.
        q = nearest_value(inverse * value)
        wq = load(S, WEIGHTS + j) * q
        sumqx = sumqx + wq * value
        sumq2 = sumq2 + wq * q
        one = nearest_value(first * value)
        other = nearest_value(last * value)
        store(S, LOW + j, where(one < other, one, other))
        store(S, HIGH + j, where(one < other, other, one))
        store(S, LIMIT + j, (one + other) * HALF)

    scale = where(sumq2 > ZERO, sumqx / sumq2, ZERO)
    best = scale * sumqx
    for step in range(-TRIES, TRIES + 1):
        sumqx, sumq2 = try_scale(S, x, np.float32(step - 127) / peak)
        better = (sumq2 > ZERO) & (sumqx * sumqx > best * sumq2)
        fit = sumqx / sumq2
        scale = where(better, fit, scale)
        best = where(better, fit * sumqx, best)
    return where(abs(peak) < NEARLY_ZERO, ZERO, scale)


@inlined
def pack(S: np.ndarray, x: int, inverse: Vector, packed: np.ndarray, first: int) -> None:
    """The levels of the 32 weights from row x, two a byte, to 16 rows of `packed`, uint8[n, WIDTH]."""
    for j in range(BLOCK // 2):
        low = nearest_level(inverse * load(S, x + j))
        high = nearest_level(inverse * load(S, x + j + BLOCK // 2))
        store(packed, first + j, low + high * np.float32(16))


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight and its size, or else by its square.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 32 * 18].
    Exact: byte-equal to ggml.
    """
    S = scratch(ROWS, WIDTH)
    packed = np.empty((BLOCK // 2, WIDTH), dtype=np.uint8)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // BLOCK):
            gather(rows, first, block * BLOCK, BLOCK, S)
            variance = sum_of_squares(S, 0, BLOCK) * np.float32(2 / BLOCK)
            weigh(S, 0, BLOCK, quant_weights, block * BLOCK, variance, WEIGHTS)
            scale = search_scale(S, 0)
            pack(S, 0, where(scale != ZERO, ONE / scale, ZERO), packed, 0)
            store(S, SCALE, scale)
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                y = out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
                write_f16(S[SCALE, lane], y)
                for j in range(BLOCK // 2):
                    y[2 + j] = packed[j, lane]
