"""Two sets of float32 rows held against each other: the sums that every measure of an error is made of, in float64.

Each of LANES has accumulators of its own: LLVM does not reorder a sum, so one alone would wait for itself.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import kernel

LANES = 16


@kernel
def compare_rows(x: np.ndarray, q: np.ndarray, sums: np.ndarray) -> None:
    """The sums of (q - x)^2, x^2, q^2 and x q of each row, and its largest |q - x|; what is not finite shows in them.

    Shapes: x, q float32[n_rows, n_per_row], sums float64[n_rows, 5].
    Exact: a row that equals its source has an error of 0.
    """
    n_per_row = x.shape[1]
    whole = n_per_row - n_per_row % LANES
    lanes = np.empty((5, LANES), dtype=np.float64)
    for row in range(x.shape[0]):
        lanes[:] = 0.0
        for start in range(0, whole, LANES):
            for j in range(LANES):
                a = np.float64(x[row, start + j])
                b = np.float64(q[row, start + j])
                d = b - a
                lanes[0, j] += d * d
                lanes[1, j] += a * a
                lanes[2, j] += b * b
                lanes[3, j] += a * b
                lanes[4, j] = max(lanes[4, j], abs(d))
        for i in range(whole, n_per_row):
            a = np.float64(x[row, i])
            b = np.float64(q[row, i])
            d = b - a
            lanes[0, 0] += d * d
            lanes[1, 0] += a * a
            lanes[2, 0] += b * b
            lanes[3, 0] += a * b
            lanes[4, 0] = max(lanes[4, 0], abs(d))
        for k in range(4):
            sums[row, k] = lanes[k].sum()
        sums[row, 4] = lanes[4].max()
