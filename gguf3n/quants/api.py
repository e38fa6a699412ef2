"""Quantize and dequantize NumPy arrays: the kernels behind checks that name what is wrong."""

from __future__ import annotations

import math

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.errors import QuantizationError
from gguf3n.quants import QUANTIZERS, floats

LARGEST_HALF = 65504.0

LARGEST_QUANTIZABLE = 2.0**30
"""Beyond what the scales of any type with blocks reach: 65504 * 127 * 32, that of Q6_K, is the most."""


def quantize(array: np.ndarray, qtype: QType | str, quant_weights: np.ndarray | None = None) -> np.ndarray:
    """Quantize an array row by row, the last axis being the row.

    Args:
        array: float32, float16 or float64; float64 is rounded to float32 first.
        qtype: a type, or its name, such as "Q4_K".
        quant_weights: one importance a column, from an importance matrix; ignored by types that do not use them.

    Shapes: array [..., n_per_row], quant_weights [n_per_row] -> uint8[..., row_bytes].
    Exact: byte-equal to llama.cpp (stock x86-64 builds).
    Raises: QuantizationError for an unknown type, a row length that is not a multiple of the block size, NaN, infinity,
        values too large for the type, and quant_weights that are missing where the type needs them, of another
        length, negative, NaN or infinite.
    """
    qtype = resolve_type(qtype)
    rows = rows_of(array, qtype)
    n_rows, n_per_row = rows.shape
    largest = largest_magnitude(rows, array.shape, qtype)
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    out = np.empty((n_rows, n_per_row // block_size * block_bytes), dtype=np.uint8)
    weights = None if quant_weights is None else checked_weights(quant_weights, n_per_row, qtype)
    if QUANTIZERS[qtype].plain is None and weights is None:
        raise QuantizationError(
            f"{qtype.name} cannot be written without quant_weights",
            fix="pass quant_weights from an importance matrix, or choose another type",
        )
    if not quantize_rows(rows, qtype, weights, out, largest):
        raise QuantizationError(
            f"values are too large for {qtype.name}",
            expected=f"magnitudes whose scales fit into half precision (at most {LARGEST_HALF:g})",
            found=f"a value of magnitude {largest:g}",
            fix="use F32 or BF16 for this array",
        )
    return out.reshape(*array.shape[:-1], out.shape[1])


def quantize_rows(
    rows: np.ndarray, qtype: QType, quant_weights: np.ndarray | None, out: np.ndarray, largest: float
) -> bool:
    """Run the right kernel; False where values are too large for the type, and `out` is then worthless.

    Args:
        largest: the largest magnitude in rows, finite.

    Shapes: as for the kernels (see gguf3n.quants).
    Why: scales are of half precision and become infinite; and no kernel is given what overflows when it is squared.
    """
    if qtype not in (QType.F32, QType.BF16) and largest > LARGEST_QUANTIZABLE:
        return False
    quantizer = QUANTIZERS[qtype]
    if quant_weights is not None and quantizer.weighted is not None:
        quantizer.weighted(rows, quant_weights, out)
    else:
        assert quantizer.plain is not None, qtype
        quantizer.plain(rows, out)
    if largest <= LARGEST_HALF or qtype in (QType.F32, QType.BF16):
        return True
    with np.errstate(over="ignore", invalid="ignore"):  # infinite scales are what is looked for
        return bool(np.isfinite(gguf.quants.dequantize(out, qtype)).all())


def dequantize(blocks: np.ndarray | bytes, qtype: QType | str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The float32 values that blocks stand for.

    Args:
        blocks: bytes, or uint8[..., row_bytes].
        qtype: a type, or its name.
        shape: the shape of the result, where `blocks` is flat.

    Exact: equal to llama.cpp for every type.
    Why: NumPy code of the `gguf` package, fast enough to look at tensors.
        # measured: million weights a second, one core of a Xeon: IQ1 to IQ3 50 to 90, IQ4 160 to 200, the rest 220 to
        # 1100
    Raises: QuantizationError for an unknown type, or a number of bytes that does not fit.
    """
    qtype = resolve_type(qtype)
    data = np.frombuffer(blocks, dtype=np.uint8) if isinstance(blocks, bytes) else np.ascontiguousarray(blocks)
    if data.dtype != np.uint8:
        raise QuantizationError(f"blocks of {qtype.name} must be bytes", expected="uint8", found=str(data.dtype))
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    row_bytes = data.shape[-1] if data.ndim else 0
    if row_bytes % block_bytes or not data.ndim:
        raise QuantizationError(
            f"the bytes do not make whole blocks of {qtype.name}",
            expected=f"a multiple of {block_bytes} bytes a row",
            found=f"{row_bytes} bytes",
        )
    values = gguf.quants.dequantize(data, qtype).astype(np.float32, copy=False)
    values = values.reshape(*data.shape[:-1], row_bytes // block_bytes * block_size)
    if shape is None:
        return values
    if math.prod(shape) != values.size:
        raise QuantizationError(
            f"the blocks of {qtype.name} do not make an array of shape {tuple(shape)}",
            expected=f"{math.prod(shape)} values",
            found=f"{values.size} values",
        )
    return values.reshape(shape)


def resolve_type(qtype: QType | str) -> QType:
    """A type that can be written, from itself or its name."""
    found = QType.__members__.get(qtype.upper()) if isinstance(qtype, str) else qtype
    if found not in QUANTIZERS:
        name = qtype if isinstance(qtype, str) else getattr(qtype, "name", qtype)
        raise QuantizationError(
            f"{name!r} is not a type that can be written",
            expected=f"one of {', '.join(known.name for known in QUANTIZERS)}",
            fix="use one of these names, or a member of gguf.GGMLQuantizationType",
        )
    return QType(found)


def rows_of(array: np.ndarray, qtype: QType) -> np.ndarray:
    """The array as contiguous float32[n_rows, n_per_row]."""
    if array.dtype not in (np.float32, np.float16, np.float64):
        raise QuantizationError(
            f"an array of {array.dtype} cannot be quantized to {qtype.name}",
            expected="float32, float16 or float64",
            fix="convert it; bfloat16 bits b are (b.astype(np.uint32) << 16).view(np.float32)",
        )
    block_size = GGML_QUANT_SIZES[qtype][0]
    n_per_row = array.shape[-1] if array.ndim else 0
    if n_per_row == 0 or n_per_row % block_size:
        raise QuantizationError(
            f"rows of {n_per_row} values cannot be quantized to {qtype.name}",
            expected=f"a last axis that is a multiple of {block_size}",
            found=f"an array of shape {array.shape}",
            fix="choose a type with smaller blocks (Q8_0 and Q4_0 have 32 values, F16 and BF16 one)",
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(array, dtype=np.float32)
    # a read-only array would be compiled for once more
    return (rows if rows.flags.writeable else rows.copy()).reshape(-1, n_per_row)


def largest_magnitude(rows: np.ndarray, shape: tuple[int, ...], qtype: QType) -> float:
    """max|x|; an error where it is not finite."""
    if rows.size == 0:
        return 0.0
    largest = float(floats.largest_magnitude(rows.reshape(-1)))
    if not math.isfinite(largest):
        bad = np.flatnonzero(~np.isfinite(rows))
        first = tuple(int(i) for i in np.unravel_index(int(bad[0]), shape))
        raise QuantizationError(
            f"{qtype.name} cannot hold NaN or infinity",
            expected="finite float32 values",
            found=f"{bad.size} that are not; the first is {rows.reshape(-1)[bad[0]]} at index {first}",
            fix="the weights are damaged, or overflowed in training: repair them before quantizing",
        )
    return largest


def checked_weights(quant_weights: np.ndarray, n_per_row: int, qtype: QType) -> np.ndarray:
    """quant_weights as contiguous float32[n_per_row]."""
    with np.errstate(over="ignore"):
        weights = np.array(quant_weights, dtype=np.float32)
    if weights.shape != (n_per_row,):
        raise QuantizationError(
            f"quant_weights do not fit the rows that are quantized to {qtype.name}",
            expected=f"one importance a column: shape ({n_per_row},)",
            found=f"shape {weights.shape}",
        )
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise QuantizationError(
            f"quant_weights for {qtype.name} are not importances",
            expected="finite values that are not negative",
            found=f"{weights[first]} at index {first}",
            fix="check the importance matrix: its counts may be zero, or the file may be damaged",
        )
    return weights
