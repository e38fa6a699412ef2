"""What an adapter does to rows: a low-rank product added, a length given.

The order of additions is fixed, so that no value depends on how many rows are read together, on the number of workers
or on the machine, as it would with a BLAS; and it is that of the plain NumPy in formats/rows.py, so the bytes are the
same. A product of two float32 is exact in float64, so it does not matter whether it is rounded before it is added.

Source: E. Hu et al., LoRA, 2021, section 4.1; S.-Y. Liu et al., DoRA, 2024, equation 5.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import kernel

STRIP = 512
"""Columns whose sums are kept in float64 while the ranks go by.

# measured: 2026-11-21, one core of a Xeon at 2.5 GHz with AVX-512, rank 16: 3.8 ns a weight; NumPy 54. Four ranks in
one pass, strips of 128 or 256 columns and a copy of the factor in float64, in all combinations: 3.2 to 5.9.
"""


@kernel
def add_product(rows: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> None:
    """rows += scale * (b @ a), one rank after the other in float64, rounded once.

    Shapes: rows float32[n, m], a float32[rank, m], b float32[n, rank], contiguous.
    """
    n, m = rows.shape
    sums = np.empty(STRIP, np.float64)
    for first in range(0, m, STRIP):
        width = min(STRIP, m - first)
        for i in range(n):
            row = rows[i, first : first + width]
            for j in range(width):
                sums[j] = 0.0
            for k in range(a.shape[0]):
                factor = np.float64(b[i, k])
                other = a[k, first : first + width]
                for j in range(width):
                    sums[j] += factor * np.float64(other[j])
            for j in range(width):
                row[j] = np.float32(np.float64(row[j]) + scale * sums[j])


@kernel
def set_lengths(rows: np.ndarray, lengths: np.ndarray) -> None:
    """Multiply each row so that its Euclidean length is the one given; a row of zeros becomes NaN.

    Shapes: rows float32[n, m], lengths float32[n], contiguous.
    """
    for i in range(rows.shape[0]):
        row = rows[i]
        squares = 0.0
        for j in range(row.size):
            squares += np.float64(row[j]) * np.float64(row[j])
        factor = np.float64(lengths[i]) / np.sqrt(squares)
        for j in range(row.size):
            row[j] = np.float32(np.float64(row[j]) * factor)
