"""What Q4_0, Q4_1, Q5_0 and Q5_1 share: blocks of 32 weights.

    block   d   float16       scale
            m   float16       minimum; Q4_1 and Q5_1 only
            qh  uint32        bit 4 of the levels, bit j belongs to weight j; Q5_0 and Q5_1 only
            qs  uint8[16]     bits 0-3; byte j holds weight j (low half) and weight j + 16 (high half)

Without quant_weights, the peak of a block, or its range, gives the scale; block after block, as LLVM vectorizes what
lies within one. With quant_weights, a search finds it, one block a lane:

    rows of the scratch array S     j           column j of the rows
                                    n + j       importance of weight j of a block
                                    n + 32 + j  free for the search, then level j
                                    n + 64      the scale, then the minimum

Source: quantize_row_q4_0_ref, quantize_row_q4_0_impl and their siblings in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import (
    first_peak,
    gather,
    inlined,
    pasted,
    scratch,
    sum_of_squares,
    truncated,
    weigh,
    write_f16,
)
from gguf3n.quants.vector_search import scale_and_min, symmetric_scale
from gguf3n.quants.vectors import WIDTH, level, load, splat, store, where

BLOCK = 32
EXTRA_ROWS = BLOCK + BLOCK + 2
"""Rows of S besides the columns; 16384 columns make S 1 MiB large."""

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
HALF = np.float32(0.5)
SIXTEEN = np.float32(16.0)

FIRST_STEP = np.float32(-0.9)
STEP = np.float32(0.05)
STEPS = 36


@pasted
def round_symmetric(rows: np.ndarray, out: np.ndarray, bits: int) -> None:
    """Quantize to levels of this many bits, of which the middle one is zero and level 0 the weight of most magnitude.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; out uint8[n_rows, row_bytes].
    """
    middle = np.float32(1 << (bits - 1))
    block_bytes = 2 + 4 * bits
    values = rows.reshape(-1)
    target = out.reshape(-1)
    for block in range(values.size // BLOCK):
        x = values[block * BLOCK : (block + 1) * BLOCK]
        y = target[block * block_bytes : (block + 1) * block_bytes]
        d = first_peak(x) / -middle
        write_f16(d, y)
        write_rounded(x, ZERO, d, middle + HALF, bits, True, y[2:])


@pasted
def round_between_extremes(rows: np.ndarray, out: np.ndarray, bits: int) -> None:
    """Quantize to levels of this many bits, of which the first one is the minimum and the last one the maximum.

    Shapes: as for round_symmetric.
    """
    block_bytes = 2 + 2 + 4 * bits
    values = rows.reshape(-1)
    target = out.reshape(-1)
    for block in range(values.size // BLOCK):
        x = values[block * BLOCK : (block + 1) * BLOCK]
        y = target[block * block_bytes : (block + 1) * block_bytes]
        low = x[0]
        high = x[0]
        for j in range(BLOCK):
            low = x[j] if x[j] < low else low
            high = x[j] if x[j] > high else high
        d = (high - low) / np.float32((1 << bits) - 1)
        write_f16(d, y)
        write_f16(low, y[2:])
        write_rounded(x, low, d, HALF, bits, False, y[4:])


@inlined
def write_rounded(
    x: np.ndarray, low: np.float32, d: np.float32, half: np.float32, bits: int, limited: bool, y: np.ndarray
) -> None:
    """Write qh and qs for the levels (x - low) / d + half, rounded down.

    Args:
        limited: whether a level may come out too large, as that of a weight as large as the peak, of the other sign.
            Why: between extremes none can, though ggml limits Q4_1.
            # measured: a limit made Q5_1 a twentieth slower
    """
    inverse = ONE / d if d != ZERO else ZERO
    highest = np.int32((1 << bits) - 1)
    qs = y[4 * (bits - 4) :]
    qh = np.uint32(0)
    for j in range(BLOCK // 2):
        lower = truncated((x[j] - low) * inverse + half)
        upper = truncated((x[j + BLOCK // 2] - low) * inverse + half)
        first = np.uint32(min(lower, highest) if limited else lower)
        second = np.uint32(min(upper, highest) if limited else upper)
        qs[j] = np.uint8((first & 15) | ((second & 15) << 4))
        qh |= np.uint32((first >> 4) << j) | np.uint32((second >> 4) << (j + BLOCK // 2))
    if bits == 5:
        for j in range(4):
            y[j] = np.uint8(qh >> np.uint32(8 * j))


@pasted
def search_symmetric(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray, bits: int) -> None:
    """Quantize as round_symmetric does, with the scale that has the least error by quant_weights.

    Shapes: as for round_symmetric; quant_weights float32[n_per_row].
    """
    n_rows, n_per_row = rows.shape
    middle = 1 << (bits - 1)
    S = scratch(n_per_row + EXTRA_ROWS, WIDTH)
    levels = n_per_row + BLOCK
    packed = np.empty((4 * bits, WIDTH), dtype=np.uint8)
    for first in range(0, n_rows, WIDTH):
        gather(rows, first, 0, n_per_row, S)
        variance = sum_of_squares(S, 0, n_per_row) / np.float32(n_per_row)
        for column in range(0, n_per_row, BLOCK):
            weigh(S, column, BLOCK, quant_weights, column, variance, n_per_row)
            d, inverse = symmetric_scale(S, column, n_per_row, levels, BLOCK, middle)
            for j in range(BLOCK):
                found = level(inverse * load(S, column + j), -middle, middle - 1) + np.float32(middle)
                # ggml quirk: a block of zeros gets level 0, not the level that means zero
                store(S, levels + j, where(inverse == ZERO, ZERO, found))
            store(S, levels + BLOCK, d)
            pack(S, levels, bits, packed)
            write(S, levels + BLOCK, 1, packed, first, column // BLOCK, out)


@pasted
def search_between_extremes(rows: np.ndarray, quant_weights: np.ndarray, out: np.ndarray, bits: int) -> None:
    """Quantize with the scale and the minimum that have the least error by quant_weights.

    Shapes: as for search_symmetric.
    """
    n_rows, n_per_row = rows.shape
    highest = (1 << bits) - 1
    S = scratch(n_per_row + EXTRA_ROWS, WIDTH)
    levels = n_per_row + BLOCK
    packed = np.empty((4 * bits, WIDTH), dtype=np.uint8)
    for first in range(0, n_rows, WIDTH):
        gather(rows, first, 0, n_per_row, S)
        variance = sum_of_squares(S, 0, n_per_row) / np.float32(n_per_row)
        for column in range(0, n_per_row, BLOCK):
            weigh(S, column, BLOCK, quant_weights, column, variance, n_per_row)
            d, m, inverse, low, _ = scale_and_min(
                S, column, n_per_row, levels, BLOCK, highest, FIRST_STEP, STEP, STEPS, False
            )
            for j in range(BLOCK):
                store(S, levels + j, level(inverse * (load(S, column + j) - low), 0, highest))
            store(S, levels + BLOCK, d)
            store(S, levels + BLOCK + 1, m)
            pack(S, levels, bits, packed)
            write(S, levels + BLOCK, 2, packed, first, column // BLOCK, out)


@inlined
def pack(S: np.ndarray, levels: int, bits: int, packed: np.ndarray) -> None:
    """qh, if there are five bits, and qs of the levels in rows `levels` + j of S, to rows of `packed`.

    Shapes: packed uint8[4 * bits, WIDTH].
    """
    if bits == 5:
        for byte in range(BLOCK // 8):
            total = splat(ZERO)
            for bit in range(8):
                value = load(S, levels + 8 * byte + bit)
                total = total + where(value >= SIXTEEN, np.float32(1 << bit), ZERO)
            store(packed, byte, total)
    for j in range(BLOCK // 2):
        low = load(S, levels + j)
        high = load(S, levels + j + BLOCK // 2)
        low = where(low >= SIXTEEN, low - SIXTEEN, low)
        high = where(high >= SIXTEEN, high - SIXTEEN, high)
        store(packed, 4 * (bits - 4) + j, low + high * SIXTEEN)


@inlined
def write(
    S: np.ndarray, scales: int, n_scales: int, packed: np.ndarray, first: int, block: int, out: np.ndarray
) -> None:
    """Write the block of every lane that has a row: the rows from `scales` as half precision, then `packed`."""
    head = 2 * n_scales
    block_bytes = head + packed.shape[0]
    for lane in range(min(WIDTH, out.shape[0] - first)):
        y = out[first + lane, block * block_bytes : (block + 1) * block_bytes]
        for i in range(n_scales):
            write_f16(S[scales + i, lane], y[2 * i :])
        for j in range(packed.shape[0]):
            y[head + j] = packed[j, lane]
