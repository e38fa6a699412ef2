"""Two sets of float32 rows held against each other: the sums that every measure of an error is made of, in float64, and
what the worst unit of each row is like, a unit being some consecutive weights.

Each of LANES has accumulators of its own: LLVM does not reorder a sum, so one alone would wait for itself.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import inlined, kernel

LANES = 16


@inlined
def _folded(lanes: np.ndarray, k: int) -> np.float64:
    """The sum of one row of lanes, which is lost."""
    for j in range(8):
        lanes[k, j] += lanes[k, j + 8]
    for j in range(4):
        lanes[k, j] += lanes[k, j + 4]
    return (lanes[k, 0] + lanes[k, 2]) + (lanes[k, 1] + lanes[k, 3])


@kernel
def compare_rows(x: np.ndarray, q: np.ndarray, floor: float, sums: np.ndarray) -> None:
    """The sums of (q - x)^2, x^2, q^2 and x q of each row, and its largest |q - x|; then, of its units, the largest
    share (q - x)^2 / x^2, the least and the largest factor x q / q^2, and how many are zero in q only.

    What is not finite shows in the sums.

    Args:
        floor: added to both sides of each fraction of a unit; one whose x^2 are not more than that is not zero in q
            only. Why: scales of half precision can't hold what is too small.

    Shapes: x, q float32[n_units, unit], the units of a row together; sums float64[n_rows, 9].
    Exact: a row that equals its source has an error of 0.
    Why: no sum of x q of its own: it is half of x^2 + q^2 - (q - x)^2.
        # measured: million weights a second, one core of a Xeon with AVX-512: 1,200 as sums of rows alone, 1,100 with
        # units of 256, 800 with units of 64, 600 with units of 32
    """
    unit = x.shape[1]
    whole = unit - unit % LANES
    n_units = x.shape[0] // max(sums.shape[0], 1)
    lanes = np.empty((4, LANES), dtype=np.float64)
    row = 0
    left = n_units
    row_error = row_source = row_found = worst = gone = 0.0
    least = most = 1.0
    for j in range(LANES):
        lanes[3, j] = 0.0
    for i in range(x.shape[0]):
        for k in range(3):
            for j in range(LANES):
                lanes[k, j] = 0.0
        for start in range(0, whole, LANES):
            for j in range(LANES):
                a = np.float64(x[i, start + j])
                b = np.float64(q[i, start + j])
                d = b - a
                lanes[0, j] += d * d
                lanes[1, j] += a * a
                lanes[2, j] += b * b
                lanes[3, j] = max(lanes[3, j], abs(d))
        for j in range(whole, unit):
            a = np.float64(x[i, j])
            b = np.float64(q[i, j])
            d = b - a
            lanes[0, 0] += d * d
            lanes[1, 0] += a * a
            lanes[2, 0] += b * b
            lanes[3, 0] = max(lanes[3, 0], abs(d))
        error = _folded(lanes, 0)
        source = _folded(lanes, 1)
        found = _folded(lanes, 2)
        row_error += error
        row_source += source
        row_found += found
        share = error / (source + floor)
        factor = (0.5 * (source + found - error) + floor) / (found + floor)
        worst = share if error > 0.0 and share > worst else worst
        least = factor if error > 0.0 and factor < least else least
        most = factor if error > 0.0 and factor > most else most
        gone += 1.0 if found == 0.0 and source > floor else 0.0
        left -= 1
        if left == 0:
            sums[row, 0] = row_error
            sums[row, 1] = row_source
            sums[row, 2] = row_found
            sums[row, 3] = 0.5 * (row_source + row_found - row_error)
            sums[row, 4] = lanes[3].max()
            sums[row, 5] = worst
            sums[row, 6] = least
            sums[row, 7] = most
            sums[row, 8] = gone
            row += 1
            left = n_units
            row_error = row_source = row_found = worst = gone = 0.0
            least = most = 1.0
            for j in range(LANES):
                lanes[3, j] = 0.0
