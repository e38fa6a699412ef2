"""Q4_1: 32 weights, a scale and a minimum, 4 bits each; 5 bits a weight.

    block (20 bytes)   d   float16         scale
                       m   float16         minimum
                       qs  uint8[16]       levels 0-15; byte j holds weight j (low half) and weight j + 16 (high half)
    weight = d * level + m,  m = min(x),  d = (max(x) - min(x)) / 15

Source: quantize_row_q4_1_ref and quantize_row_q4_1_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.blocks import round_between_extremes, search_between_extremes
from gguf3n.quants.lanes import kernel


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; with quant_weights, search the best scale and minimum.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 32 * 20].
    Exact: byte-equal to ggml.
    """
    if quant_weights is None:
        round_between_extremes(rows, out, bits=4)
    else:
        search_between_extremes(rows, quant_weights, out, bits=4)
