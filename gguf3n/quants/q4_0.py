"""Q4_0: 32 weights, one scale, 4 bits each; 4.5 bits a weight.

    block (18 bytes)   d   float16         scale
                       qs  uint8[16]       levels 0-15; byte j holds weight j (low half) and weight j + 16 (high half)
    weight = d * (level - 8),  d = (the weight of largest magnitude) / -8

Source: quantize_row_q4_0_ref and quantize_row_q4_0_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.blocks import round_symmetric, search_symmetric
from gguf3n.quants.lanes import kernel


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; with quant_weights, search the best scale.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 32 * 18].
    Exact: byte-equal to ggml.
    """
    if quant_weights is None:
        round_symmetric(rows, out, bits=4)
    else:
        search_symmetric(rows, quant_weights, out, bits=4)
