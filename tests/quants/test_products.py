"""Products and lengths: the compiled code's bits are plain NumPy's, and a slow oracle's."""

from __future__ import annotations

import numpy as np
import pytest

from gguf3n.formats.rows import WITH_NUMPY
from gguf3n.pipeline import compiled_arithmetic
from gguf3n.quants.products import STRIP


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Of many magnitudes."""
    rng = np.random.default_rng([seed, *shape])
    return (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("n", "m", "rank"), [(1, 1, 1), (3, 40, 5), (2, STRIP - 1, 4), (3, STRIP + 1, 17), (2, 3 * STRIP, 2)]
)
def test_a_product(n: int, m: int, rank: int) -> None:
    """Rank by rank in float64, rounded once; nothing depends on how many rows are together."""
    compiled = compiled_arithmetic()
    rows, a, b = numbers(n, m), numbers(rank, m, seed=1), numbers(n, rank, seed=2)
    expected = rows.copy()
    for i in range(n):
        for j in range(m):
            total = 0.0
            for k in range(rank):
                total += float(b[i, k]) * float(a[k, j])
            expected[i, j] = float(rows[i, j]) + 0.7 * total
    for arithmetic in (WITH_NUMPY, compiled):
        found = rows.copy()
        assert arithmetic.add_product(found, a, b, 0.7) == np.abs(expected).max()
        assert found.tobytes() == expected.tobytes()
        alone = rows.copy()
        for i in range(n):
            arithmetic.add_product(alone[i : i + 1], a, b[i : i + 1], 0.7)
        assert alone.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 41), (2, 1300)])
def test_a_length(n: int, m: int) -> None:
    rows, lengths = numbers(n, m), numbers(n, seed=1)
    expected = rows.copy()
    for row, length in zip(expected, lengths, strict=True):
        total = 0.0
        for value in row:
            total += float(value) * float(value)
        row[:] = row.astype(np.float64) * (float(length) / np.sqrt(total))
    for arithmetic in (WITH_NUMPY, compiled_arithmetic()):
        found = rows.copy()
        assert arithmetic.set_lengths(found, lengths) == np.abs(expected).max()
        assert found.tobytes() == expected.tobytes()


def test_what_is_not_finite() -> None:
    """A row of zeros has no direction; a sum may be too large."""
    for arithmetic in (WITH_NUMPY, compiled_arithmetic()):
        assert np.isnan(arithmetic.set_lengths(np.zeros((1, 4), np.float32), np.ones(1, np.float32)))
        huge = np.full((1, 4), 3e38, np.float32)
        assert arithmetic.add_product(huge, np.ones((1, 4), np.float32), np.full((1, 1), 3e38, np.float32), 1) == np.inf
