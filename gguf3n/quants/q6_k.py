"""Q6_K: 256 weights in 16 sub-blocks of 16; a scale each, 6 bits a weight; 6.5625 bits a weight in all.

    block (210 bytes)  ql      uint8[128]   low four bits of the levels
                       qh      uint8[64]    high two bits
                       scales  int8[16]     scales of the sub-blocks
                       d       float16      scale of the scales
    weight = d * scales[sub-block] * (level - 32)
    half h (128 weights), i < 32:   ql[64 h + i]       weights i (low half) and i + 64 (high half)
                                    ql[64 h + 32 + i]  weights i + 32 and i + 96
                                    qh[32 h + i]       weights i, i + 32, i + 64, i + 96, two bits each, low to high

Source: quantize_row_q6_K_ref and quantize_row_q6_K_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import SUPER_BLOCK, gather, inlined, kernel, scratch, write_f16
from gguf3n.quants.vector_search import LOWEST, NEARLY_ZERO, ONE, ZERO, symmetric_scale
from gguf3n.quants.vectors import WIDTH, level, load, splat, store, where

SUB_BLOCK = 16
SUB_BLOCKS = 16
BLOCK_BYTES = 128 + 64 + 16 + 2
N_MAX = 32

# rows of the scratch array; row i < 256 holds weight i of every lane
WEIGHTS = SUPER_BLOCK
SEARCH = WEIGHTS + SUB_BLOCK
SCALES = SEARCH + SUB_BLOCK
INVERSES = SCALES + SUB_BLOCKS
D = INVERSES + SUB_BLOCKS
LARGEST = D + 1
ROWS = LARGEST + 1


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight, or else by its square.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 210].
    Exact: byte-equal to ggml.
    """
    S = scratch(ROWS, WIDTH)
    levels = np.empty(SUPER_BLOCK, np.uint8)
    for first in range(0, rows.shape[0], WIDTH):
        for block in range(rows.shape[1] // SUPER_BLOCK):
            start = block * SUPER_BLOCK
            gather(rows, first, start, SUPER_BLOCK, S)
            for j in range(SUB_BLOCKS):
                for i in range(SUB_BLOCK):
                    if quant_weights is None:
                        x = load(S, j * SUB_BLOCK + i)
                        store(S, WEIGHTS + i, x * x)
                    else:
                        store(S, WEIGHTS + i, splat(quant_weights[start + j * SUB_BLOCK + i]))
                fit_sub_block(S, j)
            fit_scales(S)
            write(rows, first, block, S, levels, out)


@inlined
def fit_sub_block(S: np.ndarray, j: int) -> None:
    """Search the scale of sub-block j."""
    scale, inverse = symmetric_scale(S, j * SUB_BLOCK, WEIGHTS, SEARCH, SUB_BLOCK, N_MAX)
    store(S, SCALES + j, scale)
    store(S, INVERSES + j, inverse)


@inlined
def fit_scales(S: np.ndarray) -> None:
    """Turn the scales into int8: the one of largest magnitude becomes -128."""
    peak = splat(ZERO)
    largest = splat(ZERO)
    for j in range(SUB_BLOCKS):
        scale = load(S, SCALES + j)
        larger = abs(scale) > largest
        largest = where(larger, abs(scale), largest)
        peak = where(larger, scale, peak)
    inverse = np.float32(-128.0) / peak
    for j in range(SUB_BLOCKS):
        store(S, SCALES + j, level(inverse * load(S, SCALES + j), LOWEST, 127))
    store(S, D, ONE / inverse)
    store(S, LARGEST, largest)


@inlined
def write(rows: np.ndarray, first: int, block: int, S: np.ndarray, levels: np.ndarray, out: np.ndarray) -> None:
    """Write the super-block of every lane that has a row."""
    for lane in range(min(WIDTH, rows.shape[0] - first)):
        x = rows[first + lane, block * SUPER_BLOCK : (block + 1) * SUPER_BLOCK]
        y = out[first + lane, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        if S[LARGEST, lane] < NEARLY_ZERO:
            y[:] = np.uint8(0)
            continue
        d = write_f16(S[D, lane], y[208:210])
        for j in range(SUB_BLOCKS):
            scale = np.int8(np.int32(S[SCALES + j, lane]))
            y[192 + j] = np.uint8(scale)
            d_sub = d * np.float32(scale)
            inverse = S[INVERSES + j, lane]
            values = load(x, j)
            if d_sub != ZERO:
                store(levels, j, level(values / splat(d_sub), -N_MAX, N_MAX - 1) + np.float32(N_MAX))
            elif inverse != ZERO:
                store(levels, j, level(values * inverse, -N_MAX, N_MAX - 1) + np.float32(N_MAX))
            else:
                store(levels, j, splat(ZERO))
        pack(levels, y)


@inlined
def pack(levels: np.ndarray, y: np.ndarray) -> None:
    """Levels to ql and qh."""
    for half in range(2):
        part = levels[128 * half : 128 * half + 128]
        ql = y[64 * half : 64 * half + 64]
        qh = y[128 + 32 * half : 160 + 32 * half]
        for i in range(32):
            ql[i] = (part[i] & 15) | ((part[i + 64] & 15) << 4)
            ql[i + 32] = (part[i + 32] & 15) | ((part[i + 96] & 15) << 4)
            qh[i] = (
                (part[i] >> 4) | ((part[i + 32] >> 4) << 2) | ((part[i + 64] >> 4) << 4) | ((part[i + 96] >> 4) << 6)
            )
