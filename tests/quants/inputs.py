"""Named families of rows and of quant_weights: what a quantizer meets, and the corners of float arithmetic."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Shape = tuple[int, int]


def gaussian(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def laplace(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.laplace(size=shape)


def student_t3(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.standard_t(3, size=shape)


def uniform(rng: Rng, shape: Shape) -> np.ndarray:
    return rng.uniform(-1, 1, size=shape)


def outlier(rng: Rng, shape: Shape) -> np.ndarray:
    """One weight a row is a thousand times the rest."""
    rows = gaussian(rng, shape)
    rows[np.arange(shape[0]), rng.integers(shape[1], size=shape[0])] *= 1000
    return rows


def all_equal(rng: Rng, shape: Shape) -> np.ndarray:
    return np.repeat(rng.standard_normal((shape[0], 1)), shape[1], axis=1)


def zeros(rng: Rng, shape: Shape) -> np.ndarray:
    return np.zeros(shape)


def signed_zeros(rng: Rng, shape: Shape) -> np.ndarray:
    """Zeros of both signs; among them, in some rows, a few positive or a few negative weights."""
    rows = rng.choice(np.array([0.0, -0.0]), size=shape)
    few = rng.random(shape) < 0.02
    magnitude = np.abs(rng.standard_normal(shape))
    rows[1::3] = np.where(few, magnitude, rows)[1::3]
    rows[2::3] = np.where(few, -magnitude, rows)[2::3]
    return rows


def zero_sub_blocks(rng: Rng, shape: Shape) -> np.ndarray:
    """Runs of 16 zeros, aligned as sub-blocks are, between Gaussian runs."""
    runs = gaussian(rng, shape).reshape(-1, 16)
    runs[rng.random(len(runs)) < 0.4] = 0
    return runs.reshape(shape)


def zero_super_blocks(rng: Rng, shape: Shape) -> np.ndarray:
    """Alternating runs of 256: zeros, and Gaussian."""
    rows = gaussian(rng, shape)
    rows[:, np.arange(shape[1]) // 256 % 2 == 0] = 0
    return rows


def sparse(rng: Rng, shape: Shape) -> np.ndarray:
    """Nine in ten are zero."""
    return np.where(rng.random(shape) < 0.1, gaussian(rng, shape), 0)


def tiny(rng: Rng, shape: Shape) -> np.ndarray:
    """Near 1e-30: squares vanish in float32."""
    return gaussian(rng, shape) * 1e-30


def denormal(rng: Rng, shape: Shape) -> np.ndarray:
    """From 1e-38 down to a few units of the smallest float32, a row each."""
    sizes = np.array([1e-38, 1e-40, 1e-43, 5e-45])
    return gaussian(rng, shape).astype(np.float64) * sizes[np.arange(shape[0]) % 4, None]


def huge(rng: Rng, shape: Shape) -> np.ndarray:
    """Near 1e30: squares overflow, half-precision scales are infinite."""
    return gaussian(rng, shape).astype(np.float64) * 1e30


def large(rng: Rng, shape: Shape) -> np.ndarray:
    """Near 1e7: half-precision scales are infinite, float32 arithmetic is not."""
    return gaussian(rng, shape) * 1e7


def small_scale(rng: Rng, shape: Shape) -> np.ndarray:
    """Scales that are denormal in half precision."""
    return gaussian(rng, shape) * 1e-5


def negative_only(rng: Rng, shape: Shape) -> np.ndarray:
    return -np.abs(gaussian(rng, shape)) - 0.1


def positive_only(rng: Rng, shape: Shape) -> np.ndarray:
    return np.abs(gaussian(rng, shape)) + 0.1


def shifted(rng: Rng, shape: Shape) -> np.ndarray:
    """A narrow spread far from zero."""
    return gaussian(rng, shape) * 0.01 + 3


def ties(rng: Rng, shape: Shape) -> np.ndarray:
    """Small integers times a power of two, a row each: many exact halves and equal magnitudes."""
    return np.ldexp(rng.integers(-9, 10, size=shape).astype(np.float32), rng.integers(-12, 4, size=(shape[0], 1)))


def signs(rng: Rng, shape: Shape) -> np.ndarray:
    """Every weight has the same magnitude."""
    return rng.choice(np.array([-0.75, 0.75]), size=shape)


def ternary(rng: Rng, shape: Shape) -> np.ndarray:
    """-1, 0, 1, times a scale a row."""
    return rng.integers(-1, 2, size=shape) * np.abs(rng.standard_normal((shape[0], 1)))


def bf16_valued(rng: Rng, shape: Shape) -> np.ndarray:
    """As in a checkpoint: Gaussian of size 0.02, rounded to BF16."""
    rows = gaussian(rng, shape) * np.float32(0.02)
    return (rows.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def mixed_sizes(rng: Rng, shape: Shape) -> np.ndarray:
    """Runs of 32 whose size spans six orders of magnitude."""
    sizes = 10.0 ** rng.uniform(-5, 1, (shape[0], shape[1] // 32))
    return gaussian(rng, shape) * np.repeat(sizes, 32, axis=1)


ROWS: dict[str, Callable[[Rng, Shape], np.ndarray]] = {
    function.__name__: function
    for function in (
        gaussian, laplace, student_t3, uniform, outlier, all_equal, zeros, signed_zeros, zero_sub_blocks,
        zero_super_blocks, sparse, tiny, denormal, huge, large, small_scale, negative_only, positive_only, shifted,
        ties, signs, ternary, bf16_valued, mixed_sizes,
    )
}  # fmt: skip


def random_weights(rng: Rng, n: int) -> np.ndarray:
    """As an imatrix has them: squares of heavy-tailed activations."""
    return rng.standard_t(4, size=n) ** 2


def with_zeros(rng: Rng, n: int) -> np.ndarray:
    """A third of the columns was never active, and one run of 64 columns neither."""
    weights = np.where(rng.random(n) < 1 / 3, 0, rng.random(n))
    weights[n // 2 : n // 2 + 64] = 0
    return weights


def ones(rng: Rng, n: int) -> np.ndarray:
    return np.ones(n)


def ten_orders(rng: Rng, n: int) -> np.ndarray:
    """Spanning ten orders of magnitude."""
    return 10.0 ** rng.uniform(-8, 2, size=n)


WEIGHTS: dict[str, Callable[[Rng, int], np.ndarray]] = {
    function.__name__: function for function in (random_weights, with_zeros, ones, ten_orders)
}


def rows(family: str, n_rows: int, n_per_row: int, seed: int = 0) -> np.ndarray:
    """float32[n_rows, n_per_row] of a family; the same for the same arguments."""
    values = ROWS[family](np.random.default_rng([seed, zlib.crc32(family.encode())]), (n_rows, n_per_row))
    return np.ascontiguousarray(values, dtype=np.float32)


def quant_weights(family: str, n_per_row: int, seed: int = 0) -> np.ndarray:
    """float32[n_per_row] of a family; the same for the same arguments."""
    values = WEIGHTS[family](np.random.default_rng([seed, zlib.crc32(family.encode())]), n_per_row)
    return np.ascontiguousarray(values, dtype=np.float32)
