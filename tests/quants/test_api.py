"""quantize and dequantize as a user calls them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.engines import ggml
from gguf3n.errors import QuantizationError
from gguf3n.quants import QUANTIZERS
from gguf3n.quants.api import dequantize, quantize
from tests.quants import inputs

every_type = pytest.mark.parametrize("qtype", QUANTIZERS, ids=lambda qtype: qtype.name)


def weights_for(qtype: QType, n_per_row: int = 512) -> np.ndarray | None:
    """quant_weights where the type requires them."""
    return inputs.quant_weights("random_weights", n_per_row) if QUANTIZERS[qtype].plain is None else None


@every_type
def test_shapes_and_bytes(qtype: QType) -> None:
    array = inputs.rows("gaussian", 6, 512).reshape(2, 3, 512)
    blocks = quantize(array, qtype, weights_for(qtype))
    assert blocks.dtype == np.uint8
    assert blocks.shape == (2, 3, ggml.row_bytes(qtype, 512))
    assert np.array_equal(blocks.reshape(6, -1), ggml.quantize(array.reshape(6, 512), qtype, weights_for(qtype)))


@every_type
def test_dequantize_is_that_of_ggml(qtype: QType) -> None:
    rows = inputs.rows("student_t3", 5, 1024)
    blocks = quantize(rows, qtype, weights_for(qtype, 1024))
    values = dequantize(blocks, qtype)
    assert values.dtype == np.float32
    assert values.shape == rows.shape
    assert np.array_equal(values, rows if qtype is QType.F32 else ggml.dequantize(blocks, qtype))


@every_type
def test_values_come_back_near(qtype: QType) -> None:
    rows = inputs.rows("gaussian", 4, 1024)
    values = dequantize(quantize(rows, qtype, weights_for(qtype, 1024)), qtype)
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    a_bit_halves_it = 2.8 * 2.0 ** (-8 * block_bytes / block_size)
    limits = {QType.F32: 0.0, QType.F16: 3e-4, QType.BF16: 2e-3, QType.TQ1_0: 0.85, QType.TQ2_0: 0.85}
    assert np.sqrt(np.mean((values - rows) ** 2)) <= limits.get(qtype, a_bit_halves_it)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(dtype: type) -> None:
    array = inputs.rows("gaussian", 3, 64).astype(np.float16).astype(dtype)
    assert np.array_equal(quantize(array, "Q8_0"), quantize(array.astype(np.float32), QType.Q8_0))


def test_any_layout_of_memory() -> None:
    rows = inputs.rows("gaussian", 4, 64)
    expected = quantize(rows, "q4_1")
    assert np.array_equal(quantize(np.asfortranarray(rows), "Q4_1"), expected)
    assert np.array_equal(quantize(rows[::-1], "Q4_1"), expected[::-1])
    read_only = rows.copy()
    read_only.flags.writeable = False
    assert np.array_equal(quantize(read_only, "Q4_1"), expected)
    assert np.array_equal(quantize(rows[0], "Q4_1"), expected[0])
    assert quantize(rows[:0], "Q4_1").shape == (0, 40)


def test_quant_weights() -> None:
    rows = inputs.rows("gaussian", 3, 64)
    weights = inputs.quant_weights("random_weights", 64)
    assert np.array_equal(quantize(rows, "Q4_0", weights), ggml.quantize(rows, QType.Q4_0, weights))
    assert np.array_equal(quantize(rows, "Q4_0", weights.astype(np.float64)), quantize(rows, "Q4_0", weights))
    assert np.array_equal(quantize(rows, "Q8_0", weights), quantize(rows, "Q8_0")), "Q8_0 does not use them"


def test_dequantize_flat_bytes() -> None:
    rows = inputs.rows("gaussian", 3, 64)
    blocks = quantize(rows, "Q5_0")
    values = dequantize(blocks, "Q5_0")
    assert np.array_equal(dequantize(blocks.tobytes(), "Q5_0", (3, 64)), values)
    assert np.array_equal(dequantize(blocks.reshape(-1), "Q5_0"), values.reshape(-1))


def assert_refused(match: str, array: np.ndarray, qtype: QType | str, quant_weights: np.ndarray | None = None) -> None:
    with pytest.raises(QuantizationError, match=re.escape(match)):
        quantize(array, qtype, quant_weights)


def test_unknown_types() -> None:
    rows = np.zeros((1, 256), dtype=np.float32)
    assert_refused("'Q4_X' is not a type that can be written", rows, "Q4_X")
    assert_refused("'Q8_K' is not a type that can be written", rows, QType.Q8_K)
    assert_refused("one of F32, F16, BF16, Q4_0", rows, "")
    with pytest.raises(QuantizationError, match="not a type"):
        dequantize(np.zeros(18, dtype=np.uint8), "I32")


def test_arrays_that_do_not_fit() -> None:
    assert_refused("rows of 48 values cannot be quantized to Q4_0", np.zeros((2, 48), dtype=np.float32), "Q4_0")
    assert_refused("a multiple of 32", np.zeros((2, 48), dtype=np.float32), "Q4_0")
    assert_refused("rows of 0 values", np.zeros((2, 0), dtype=np.float32), "F16")
    assert_refused("rows of 0 values", np.float32(1).reshape(()), "F16")
    assert_refused("an array of int32 cannot be quantized to Q4_0", np.zeros((2, 32), dtype=np.int32), "Q4_0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value: float) -> None:
    array = np.zeros((2, 3, 64))
    array[1, 2, 5:7] = value
    assert_refused("Q8_0 cannot hold NaN or infinity", array, "Q8_0")
    assert_refused(f"2 that are not; the first is {value} at index (1, 2, 5)", array, "Q8_0")


def test_a_float64_that_overflows() -> None:
    assert_refused("the first is inf at index (0, 3)", np.array([[0, 0, 0, 1e300]]), "F32")


@pytest.mark.parametrize("qtype", ["F16", "Q4_0", "Q4_1", "Q8_0"])
def test_values_too_large(qtype: str) -> None:
    assert_refused(f"values are too large for {qtype}", np.full((1, 256), 1e30), qtype)


def test_large_values_that_fit() -> None:
    rows = np.full((1, 64), 1e30, dtype=np.float32)
    assert np.isfinite(dequantize(quantize(rows, "BF16"), "BF16")).all()
    assert np.allclose(dequantize(quantize(rows * np.float32(1e-25), "Q8_0"), "Q8_0"), 1e5, rtol=0.01)


def test_quant_weights_that_do_not_fit() -> None:
    rows = inputs.rows("gaussian", 2, 64)
    weights = np.ones(64)
    assert_refused("one importance a column: shape (64,)", rows, "Q4_0", np.ones(32))
    for value in (-1.0, np.nan, np.inf):
        weights[7] = value
        assert_refused(f"found:    {value} at index 7", rows, "Q4_0", weights)


def test_quant_weights_missing() -> None:
    for qtype, quantizer in QUANTIZERS.items():
        if quantizer.plain is None:
            message = f"{qtype.name} cannot be written without quant_weights"
            assert_refused(message, np.zeros((1, 256), dtype=np.float32), qtype)


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(QuantizationError, match="a multiple of 18 bytes"):
        dequantize(np.zeros((2, 20), dtype=np.uint8), "Q4_0")
    with pytest.raises(QuantizationError, match="must be bytes"):
        dequantize(np.zeros((2, 18), dtype=np.float32), "Q4_0")
    with pytest.raises(QuantizationError, match=re.escape("shape (3, 32)")):
        dequantize(np.zeros((2, 18), dtype=np.uint8), "Q4_0", (3, 32))
