"""float32 <-> blocks: every ggml type that gguf3n writes, one module a type.

`QUANTIZERS` is the whole truth about what can be written; nothing registers itself.

The contract of a kernel (a `lanes.kernel`):
    plain(rows, out)                    without importances
    weighted(rows, quant_weights, out)  with them
    rows           float32[n_rows, n_per_row], C-contiguous, finite, n_per_row a multiple of the block size
    quant_weights  float32[n_per_row], one importance a column, finite and not negative
    out            uint8[n_rows, row_bytes], C-contiguous; every byte is written
It is pure: no byte depends on other rows, on the number of rows in a call, or on threads. Fast in calls of whole
multiples of 16 rows: most kernels work on 16 at a time, and fewer take as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.quants import (
    floats,
    iq1_m,
    iq1_s,
    iq2_s,
    iq2_xs,
    iq2_xxs,
    iq3_s,
    iq3_xxs,
    iq4_nl,
    iq4_xs,
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
    tq1_0,
    tq2_0,
)

Plain: TypeAlias = Callable[[np.ndarray, np.ndarray], None]
Weighted: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Quantizer:
    """The kernels of one type.

    `plain` is None for a type that ggml writes only with quant_weights; `weighted` is None for a type whose bytes do
    not depend on them.
    """

    plain: Plain | None
    weighted: Weighted | None = None


QUANTIZERS: dict[QType, Quantizer] = {
    QType.F32: Quantizer(floats.quantize_f32),
    QType.F16: Quantizer(floats.quantize_f16),
    QType.BF16: Quantizer(floats.quantize_bf16),
    QType.Q4_0: Quantizer(q4_0.quantize, q4_0.quantize_weighted),
    QType.Q4_1: Quantizer(q4_1.quantize, q4_1.quantize_weighted),
    QType.Q5_0: Quantizer(q5_0.quantize, q5_0.quantize_weighted),
    QType.Q5_1: Quantizer(q5_1.quantize, q5_1.quantize_weighted),
    QType.Q8_0: Quantizer(q8_0.quantize),
    QType.Q2_K: Quantizer(q2_k.quantize, q2_k.quantize_weighted),
    QType.Q3_K: Quantizer(q3_k.quantize, q3_k.quantize_weighted),
    QType.Q4_K: Quantizer(q4_k.quantize, q4_k.quantize_weighted),
    QType.Q5_K: Quantizer(q5_k.quantize, q5_k.quantize_weighted),
    QType.Q6_K: Quantizer(q6_k.quantize, q6_k.quantize_weighted),
    QType.IQ4_NL: Quantizer(iq4_nl.quantize, iq4_nl.quantize_weighted),
    QType.IQ4_XS: Quantizer(iq4_xs.quantize, iq4_xs.quantize_weighted),
    QType.IQ3_S: Quantizer(iq3_s.quantize, iq3_s.quantize_weighted),
    QType.IQ3_XXS: Quantizer(iq3_xxs.quantize, iq3_xxs.quantize_weighted),
    QType.IQ2_XXS: Quantizer(None, iq2_xxs.quantize_weighted),
    QType.IQ2_XS: Quantizer(None, iq2_xs.quantize_weighted),
    QType.IQ2_S: Quantizer(iq2_s.quantize, iq2_s.quantize_weighted),
    QType.IQ1_S: Quantizer(None, iq1_s.quantize_weighted),
    QType.IQ1_M: Quantizer(iq1_m.quantize, iq1_m.quantize_weighted),
    QType.TQ1_0: Quantizer(tq1_0.quantize),
    QType.TQ2_0: Quantizer(tq2_0.quantize),
}
