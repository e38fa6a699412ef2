"""Vectors in kernels mean what their NumPy definitions say, whatever the floats are."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
from numba.core.errors import TypingError

from gguf3n.quants.lanes import kernel
from gguf3n.quants.vectors import (
    WIDTH,
    any_lane,
    floor,
    level,
    load,
    nearest,
    splat,
    sqrt,
    store,
    transpose,
    where,
)

ODD_FLOATS = [
    0.0, -0.0, 0.5, -0.5, 1.5, 2.5, 3.5, -2.5, 0.49999997, 1e-45, -1e-38, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan,
    4194303.0, 4194304.0, -4194304.0, -4194305.0, 8388607.0, 1.3e8, -1.3e8, 1e10, -1e30, 15.5, 16.5, -32.5, 31.5,
]  # fmt: skip


def scratch_of(seed: int) -> np.ndarray:
    """20 rows: ordinary floats, then odd ones, then floats of random bits."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (20, WIDTH), dtype=np.uint32).view(np.float32)
    bits[:4] = rng.standard_normal((4, WIDTH)) * 20
    bits[4:8] = rng.choice(ODD_FLOATS, (4, WIDTH))
    return bits


@kernel
def arithmetic(S: np.ndarray) -> None:
    a = load(S, 0)
    b = load(S, 4)
    store(S, 8, a + b)
    store(S, 9, a - np.float32(1.5))
    store(S, 10, np.float32(3.0) * b)
    store(S, 11, a / b)
    store(S, 12, -b)
    store(S, 13, abs(b))
    store(S, 14, sqrt(abs(a)))
    store(S, 15, floor(a))
    store(S, 16, nearest(a))
    store(S, 17, splat(S[0, 3]))


@kernel
def comparisons(S: np.ndarray) -> None:
    a = load(S, 4)
    b = load(S, 5)
    store(S, 8, where(a < b, a, b))
    store(S, 9, where(a > b, np.float32(1.0), b))
    store(S, 10, where(a <= b, a, np.float32(2.0)))
    store(S, 11, where((a >= b) & (a != b), np.float32(1.0), np.float32(0.0)))
    store(S, 12, where((a == b) | (a != a), a, b))
    if any_lane(a > b):
        store(S, 13, a)
    if any_lane(a < np.float32(-np.inf)):
        store(S, 13, b)


@kernel
def levels(S: np.ndarray, out: np.ndarray) -> None:
    for row in range(8):
        store(out, row, level(load(S, row), 0, 255))
    for row in range(8):
        store(S, row, level(load(S, row), -32, 31))


@kernel
def swap(S: np.ndarray) -> None:
    transpose(S, 3)


def assert_same_floats(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bits, but for the sign and payload of a NaN."""
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), np.argwhere(~same)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("function", [arithmetic, comparisons, swap])
def test_compiled_is_numpy(function: Callable[..., None], seed: int) -> None:
    compiled, plain = scratch_of(seed), scratch_of(seed)
    function(compiled)
    function.py_func(plain)
    assert_same_floats(compiled, plain)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(5))
def test_compiled_levels_are_numpy(seed: int) -> None:
    compiled, plain = scratch_of(seed), scratch_of(seed)
    out, expected = np.zeros((2, 8 * WIDTH), dtype=np.uint8)
    levels(compiled, out)
    levels.py_func(plain, expected)
    assert_same_floats(compiled, plain)
    assert np.array_equal(out, expected)


def test_level_rounds_to_even() -> None:
    x = np.resize(np.array([0.5, 1.5, 2.5, -0.5, -1.5, 7.5, -9.0, 100.0], dtype=np.float32), WIDTH)
    assert level(x, -8, 7)[:8].tolist() == [0, 2, 2, 0, -2, 7, -8, 7]


def test_transpose_swaps_rows_and_lanes() -> None:
    S = np.arange(20 * WIDTH, dtype=np.float32).reshape(20, WIDTH)
    before = S.copy()
    swap(S)
    assert np.array_equal(S[3 : 3 + WIDTH], before[3 : 3 + WIDTH].T)
    assert np.array_equal(S[:3], before[:3])
    assert np.array_equal(S[3 + WIDTH :], before[3 + WIDTH :])


def test_float64_does_not_mix_in() -> None:
    def scaled(S: np.ndarray) -> None:
        store(S, 0, load(S, 0) * 0.5)

    with pytest.raises(TypingError):
        numba.njit(scaled)(np.zeros((1, WIDTH), dtype=np.float32))
