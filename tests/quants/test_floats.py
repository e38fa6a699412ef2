"""Widening and narrowing of float formats: every 16-bit input, and every kind of float32."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.engines import ggml
from gguf3n.quants import floats

EVERY_HALF = np.arange(65536, dtype=np.uint16)


def every_kind_of_float() -> np.ndarray:
    """Random bits; denormals, infinities, NaN of both signs; halfway cases of both narrow formats."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    kinds = [
        bits,
        bits & 0x807FFFFF,  # denormal
        bits & 0x80000000,  # zero
        bits & 0x80000000 | 0x7F800000,  # infinite
        bits | 0x7F800000,  # mostly NaN
        bits & 0x807FFFFF | 0x7F000000,  # the largest
        bits & 0xFFFF0000 | 0x8000,  # halfway between two BF16
        bits & 0x87FFE000 | 0x38001000,  # halfway between two F16
        bits & 0x80FFFFFF | 0x33000000,  # denormal in F16, and below
    ]
    return np.concatenate(kinds).view(np.float32)


def test_bf16_widens_exactly() -> None:
    out = np.empty(65536, dtype=np.float32)
    assert np.isnan(floats.bf16_to_f32(EVERY_HALF, out))
    assert np.array_equal(out.view(np.uint32), EVERY_HALF.astype(np.uint32) << 16)


def test_f16_widens_exactly() -> None:
    out = np.empty(65536, dtype=np.float32)
    assert np.isnan(floats.f16_to_f32(EVERY_HALF, out))
    expected = EVERY_HALF.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(expected)
    assert np.array_equal(out.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])
    assert np.isnan(out[~numbers]).all()


@pytest.mark.parametrize(
    ("widen", "infinity", "nan", "largest"),
    [(floats.bf16_to_f32, 0x7F80, 0x7F81, 0x7F7F), (floats.f16_to_f32, 0x7C00, 0x7C01, 0x7BFF)],
    ids=["bf16", "f16"],
)
def test_widening_tells_the_largest_magnitude(widen: object, infinity: int, nan: int, largest: int) -> None:
    assert callable(widen)
    out = np.empty(1000, dtype=np.float32)
    source = np.full(1000, largest, dtype=np.uint16)
    source[::2] |= 0x8000
    assert widen(source, out) == abs(out[0])
    assert widen(source[:0], out[:0]) == 0
    for bad in (infinity, nan, infinity | 0x8000, nan | 0x8000):
        for place in (0, 513, 999):
            broken = source.copy()
            broken[place] = bad
            assert not np.isfinite(widen(broken, out))


def test_largest_magnitude() -> None:
    values = np.full(1000, np.finfo(np.float32).max, dtype=np.float32)
    values[1::2] *= -1
    assert floats.largest_magnitude(values) == values[0]
    assert floats.largest_magnitude(values[:0]) == 0
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        for place in (0, 500, 999):
            broken = values.copy()
            broken[place] = bad
            assert not np.isfinite(floats.largest_magnitude(broken))


@pytest.mark.parametrize(
    ("narrow", "qtype"), [(floats.f32_to_bf16, QType.BF16), (floats.f32_to_f16, QType.F16)], ids=["bf16", "f16"]
)
def test_narrowing_is_that_of_ggml(narrow: object, qtype: QType) -> None:
    assert callable(narrow)
    values = every_kind_of_float()
    out = np.empty(values.size, dtype=np.uint16)
    narrow(values, out)
    assert np.array_equal(out, ggml.quantize(values.reshape(1, -1), qtype).view(np.uint16)[0])


def test_bf16_keeps_denormals_and_quiets_nan() -> None:
    bits = np.array([0x00010000, 0x80018000, 0x00018001, 0x7F800001, 0xFF812345, 0x7F7FFFFF], dtype=np.uint32)
    out = np.empty(bits.size, dtype=np.uint16)
    floats.f32_to_bf16(bits.view(np.float32), out)
    assert [f"{x:04x}" for x in out] == ["0001", "8002", "0002", "7fc0", "ffc1", "7f80"]


def test_narrow_and_wide_again_changes_nothing() -> None:
    for widen, narrow, infinity in (
        (floats.bf16_to_f32, floats.f32_to_bf16, 0x7F80),
        (floats.f16_to_f32, floats.f32_to_f16, 0x7C00),
    ):
        magnitudes = EVERY_HALF & 0x7FFF
        source = EVERY_HALF[magnitudes <= infinity]
        wide = np.empty(source.size, dtype=np.float32)
        again = np.empty_like(source)
        widen(source, wide)
        narrow(wide, again)
        assert np.array_equal(again, source)
