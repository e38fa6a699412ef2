"""Q8_0: 32 weights, one scale, 8 bits each; 8.5 bits a weight.

    block (34 bytes)   d   float16         scale
                       qs  int8[32]        levels
    weight = d * qs[j],  d = max|x| / 127

Source: quantize_row_q8_0_ref in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import kernel, round_half_away, truncated, write_f16

BLOCK = 32
BLOCK_BYTES = 2 + BLOCK


@kernel
def quantize(rows: np.ndarray, out: np.ndarray) -> None:
    """Quantize float32 rows.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; out uint8[n_rows, n_per_row / 32 * 34].
    Exact: byte-equal to ggml.
    """
    for row in range(rows.shape[0]):
        for block in range(rows.shape[1] // BLOCK):
            x = rows[row, block * BLOCK : (block + 1) * BLOCK]
            y = out[row, block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            peak = np.float32(0.0)
            for j in range(BLOCK):
                peak = max(peak, abs(x[j]))
            d = peak / np.float32(127.0)
            inverse = np.float32(1.0) / d if d != np.float32(0.0) else np.float32(0.0)
            write_f16(d, y)
            for j in range(BLOCK):
                y[2 + j] = np.uint8(truncated(round_half_away(x[j] * inverse)))
