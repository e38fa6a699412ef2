"""TQ2_0: 256 weights, one scale, one of three values each; 2.0625 bits a weight.

    block (66 bytes)   qs  uint8[64]   levels, two bits each: weight 128 h + 32 n + m in bits 2 n of byte 32 h + m
                       d   float16     scale
    weight = d * (level - 1),  level 0, 1 or 2,  d = max|x|

Source: quantize_row_tq2_0_ref in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import inlined, kernel, write_f16

BLOCK = 256
BLOCK_BYTES = 64 + 2
STRIP = 16

ZERO = np.float32(0.0)
ONE = np.float32(1.0)
HALF = np.float32(0.5)
LARGEST = np.float32(3.4028235e38)


@inlined
def ternary_levels(x: np.ndarray, levels: np.ndarray) -> np.float32:
    """Levels of 256 weights: 0, 1, 2 for the nearest of -d, 0, d, ties away from zero. Returns d.

    Why: 16 maxima side by side, since LLVM does not reorder a single one.
    """
    peaks = np.zeros(STRIP, dtype=np.float32)
    for start in range(0, BLOCK, STRIP):
        for j in range(STRIP):
            peaks[j] = max(peaks[j], abs(x[start + j]))
    d = ZERO
    for j in range(STRIP):
        d = max(d, peaks[j])
    inverse = ONE / d if d != ZERO else ZERO
    # ggml quirk: the inverse of a tiny denormal is infinite, which makes every level 1
    inverse = inverse if inverse <= LARGEST else ZERO
    for j in range(BLOCK):
        t = x[j] * inverse
        levels[j] = np.uint8(1 + np.int32(t >= HALF) - np.int32(t <= -HALF))
    return d


@kernel
def quantize(rows: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; out uint8[n_rows, n_per_row / 256 * 66].
    Exact: byte-equal to ggml.
    """
    values = rows.reshape(-1)
    target = out.reshape(-1)
    levels = np.empty(BLOCK, dtype=np.uint8)
    for block in range(values.size // BLOCK):
        y = target[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        d = ternary_levels(values[block * BLOCK : (block + 1) * BLOCK], levels)
        for part in range(2):
            for m in range(32):
                four = levels[part * 128 + m : part * 128 + 128]
                y[part * 32 + m] = np.uint8(four[0] | four[32] << 2 | four[64] << 4 | four[96] << 6)
        write_f16(d, y[64:])
