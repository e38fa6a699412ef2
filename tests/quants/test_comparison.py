"""The sums of compare_rows: exact zeros, any row length, what is not finite, and what the worst units are like."""

from __future__ import annotations

import numpy as np
import pytest

from gguf3n.quants.comparison import compare_rows
from gguf3n.validation.yardsticks import ERROR, FOUND, LARGEST, LEAST, MOST, N_SUMS, PRODUCT, SOURCE, VANISHED, WORST
from tests.quants import inputs

LENGTHS = (1, 4, 15, 16, 17, 256, 2048)


def sums_of(x: np.ndarray, q: np.ndarray, unit: int = 0, floor: float = 0.0) -> np.ndarray:
    sums = np.full((len(x), N_SUMS), np.nan)
    unit = unit or x.shape[1]
    compare_rows(x.reshape(-1, unit), q.reshape(-1, unit), floor, sums)
    return sums


@pytest.mark.parametrize("n_per_row", LENGTHS)
@pytest.mark.parametrize("family", ["gaussian", "outlier", "tiny", "large"])
def test_sums_are_those_of_numpy(family: str, n_per_row: int) -> None:
    x, q = (inputs.rows(family, 5, n_per_row, seed) for seed in (0, 1))
    a, b = x.astype(np.float64), q.astype(np.float64)
    sums = sums_of(x, q)
    expected = {ERROR: (b - a) ** 2, SOURCE: a**2, FOUND: b**2, PRODUCT: a * b}
    for column, terms in expected.items():
        assert np.allclose(sums[:, column], terms.sum(axis=1), rtol=1e-12, atol=1e-12 * np.abs(terms).max())
    assert np.array_equal(sums[:, LARGEST], np.abs(b - a).max(axis=1))


@pytest.mark.parametrize("n_per_row", LENGTHS)
def test_equal_rows_have_no_error(n_per_row: int) -> None:
    x = inputs.rows("student_t3", 3, n_per_row)
    assert not sums_of(x, x.copy())[:, [ERROR, LARGEST]].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 20])
def test_what_is_not_finite_shows_in_its_row_only(bad: float, place: int) -> None:
    x, q = inputs.rows("gaussian", 3, 21), inputs.rows("gaussian", 3, 21)
    q[1, place] = bad
    assert np.isfinite(sums_of(x, q)).all(axis=1).tolist() == [True, False, True]


def test_the_plain_function_does_the_same() -> None:
    x, q = inputs.rows("laplace", 2, 37), inputs.rows("laplace", 2, 37, seed=1)
    sums = np.empty((2, N_SUMS))
    compare_rows.py_func(x, q, 0.0, sums)
    assert np.allclose(sums, sums_of(x, q), rtol=1e-12)


@pytest.mark.parametrize("floor", [0.0, 20.0])
@pytest.mark.parametrize("unit", [32, 40, 256])
def test_the_worst_units_are_those_of_numpy(unit: int, floor: float) -> None:
    x, noise = (inputs.rows("gaussian", 4, 4 * unit, seed) for seed in (0, 1))
    q = x + np.float32(0.3) * noise
    q[1, unit : 2 * unit] = 0
    q[2, :unit] *= 3
    x[3, :unit] = q[3, :unit] = 0
    a, b = (values.astype(np.float64).reshape(4, 4, unit) for values in (x, q))
    source, found = (a * a).sum(axis=2), (b * b).sum(axis=2)
    shares = np.divide(((b - a) ** 2).sum(axis=2), source + floor, out=np.zeros_like(source), where=source > 0)
    factors = np.divide((a * b).sum(axis=2) + floor, found + floor, out=np.ones_like(found), where=found + floor > 0)
    sums = sums_of(x, q, unit, floor)
    assert np.allclose(sums[:, WORST], shares.max(axis=1))
    assert np.allclose(sums[:, LEAST], np.minimum(factors.min(axis=1), 1))
    assert np.allclose(sums[:, MOST], np.maximum(factors.max(axis=1), 1))
    assert sums[:, VANISHED].tolist() == [0, 1, 0, 0]
