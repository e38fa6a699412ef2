"""float32 <-> blocks: every ggml type that gguf3n writes, one module a type.

`QUANTIZERS` is the whole truth about what can be written; nothing registers itself.

A type's module has one function, a kernel (`lanes.kernel`) or one that hands its tables to a kernel:
    quantize(rows, quant_weights, out)  or, where the bytes do not depend on importances,
    quantize(rows, out)
    rows           float32[n_rows, n_per_row], C-contiguous, finite, n_per_row a multiple of the block size
    quant_weights  float32[n_per_row], one importance a column, finite and not negative; None where there are none
    out            uint8[n_rows, row_bytes], C-contiguous; every byte is written
It is pure: no byte depends on other rows, on the number of rows in a call, or on threads. Fast in calls of whole
multiples of 16 rows: most kernels work on 16 at a time, and fewer take as long.

No importances are None in the parts of a kernel, too. numba compiles a kernel once for None and once for an array, each
when it is first used, and leaves out what `if quant_weights is None` excludes: nothing is asked at run time.
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
    """The kernels of one type: plain(rows, out) and weighted(rows, quant_weights, out).

    `plain` is None for a type that ggml writes only with quant_weights; `weighted` is None for a type whose bytes do
    not depend on them.
    """

    plain: Plain | None
    weighted: Weighted | None = None


def both(quantize: Callable[[np.ndarray, np.ndarray | None, np.ndarray], None]) -> Quantizer:
    """Of a type that can be written without quant_weights and with them."""
    return Quantizer(lambda rows, out: quantize(rows, None, out), quantize)


QUANTIZERS: dict[QType, Quantizer] = {
    QType.F32: Quantizer(floats.quantize_f32),
    QType.F16: Quantizer(floats.quantize_f16),
    QType.BF16: Quantizer(floats.quantize_bf16),
    QType.Q4_0: both(q4_0.quantize),
    QType.Q4_1: both(q4_1.quantize),
    QType.Q5_0: both(q5_0.quantize),
    QType.Q5_1: both(q5_1.quantize),
    QType.Q8_0: Quantizer(q8_0.quantize),
    QType.Q2_K: both(q2_k.quantize),
    QType.Q3_K: both(q3_k.quantize),
    QType.Q4_K: both(q4_k.quantize),
    QType.Q5_K: both(q5_k.quantize),
    QType.Q6_K: both(q6_k.quantize),
    QType.IQ4_NL: both(iq4_nl.quantize),
    QType.IQ4_XS: both(iq4_xs.quantize),
    QType.IQ3_S: both(iq3_s.quantize),
    QType.IQ3_XXS: both(iq3_xxs.quantize),
    QType.IQ2_XXS: Quantizer(None, iq2_xxs.quantize),
    QType.IQ2_XS: Quantizer(None, iq2_xs.quantize),
    QType.IQ2_S: both(iq2_s.quantize),
    QType.IQ1_S: Quantizer(None, iq1_s.quantize),
    QType.IQ1_M: both(iq1_m.quantize),
    QType.TQ1_0: Quantizer(tq1_0.quantize),
    QType.TQ2_0: Quantizer(tq2_0.quantize),
}
