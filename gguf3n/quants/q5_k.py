"""Q5_K: 256 weights in 8 sub-blocks of 32; a 6-bit scale and minimum each, 5 bits a weight; 5.5 bits a weight in all.

    block (176 bytes)  d       float16      scale of the scales
                       dmin    float16      scale of the minima
                       scales  uint8[12]    scales and minima, see six_bits.write_six_bits
                       qh      uint8[32]    high bit of the levels
                       qs      uint8[128]   low four bits
    weight = d * scale[sub-block] * level - dmin * min[sub-block]
    quarter k (64 weights), i < 32:   qs[32 k + i]   weights i (low half) and i + 32 (high half)
                                     qh[i]          bits 2 k and 2 k + 1 belong to these two

Source: quantize_row_q5_K_ref and quantize_row_q5_K_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import kernel
from gguf3n.quants.six_bits import search_and_write


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 176].
    Exact: byte-equal to ggml.
    """
    search_and_write(rows, quant_weights, out, bits=5, first_step=np.float32(-0.5), n_steps=15)
