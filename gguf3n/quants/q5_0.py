"""Q5_0: 32 weights, one scale, 5 bits each; 5.5 bits a weight.

    block (22 bytes)   d   float16         scale
                       qh  uint32          bit 4 of the levels; bit j belongs to weight j
                       qs  uint8[16]       bits 0-3; byte j holds weight j (low half) and weight j + 16 (high half)
    weight = d * (level - 16),  d = (the weight of largest magnitude) / -16

Source: quantize_row_q5_0_ref and quantize_row_q5_0_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.blocks import round_symmetric, search_symmetric
from gguf3n.quants.lanes import kernel


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; with quant_weights, search the best scale.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 32 * 22].
    Exact: byte-equal to ggml.
    """
    if quant_weights is None:
        round_symmetric(rows, out, bits=5)
    else:
        search_symmetric(rows, quant_weights, out, bits=5)
