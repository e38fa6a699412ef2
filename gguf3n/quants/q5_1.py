"""Q5_1: 32 weights, a scale and a minimum, 5 bits each; 6 bits a weight.

    block (24 bytes)   d   float16         scale
                       m   float16         minimum
                       qh  uint32          bit 4 of the levels; bit j belongs to weight j
                       qs  uint8[16]       bits 0-3; byte j holds weight j (low half) and weight j + 16 (high half)
    weight = d * level + m,  m = min(x),  d = (max(x) - min(x)) / 31

Source: quantize_row_q5_1_ref and quantize_row_q5_1_impl in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.blocks import round_between_extremes, search_between_extremes
from gguf3n.quants.lanes import kernel


@kernel
def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; with quant_weights, search the best scale and minimum.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 32; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 32 * 24].
    Exact: byte-equal to ggml.
    """
    if quant_weights is None:
        round_between_extremes(rows, out, bits=5)
    else:
        search_between_extremes(rows, quant_weights, out, bits=5)
