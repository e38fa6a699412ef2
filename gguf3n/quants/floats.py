"""F32, F16, BF16: no blocks; 32 or 16 bits a weight.

    F32    IEEE single
    F16    IEEE half: sign, 5 bits of exponent, 10 of mantissa; the largest finite value is 65504
    BF16   the upper half of an IEEE single: sign, 8 bits of exponent, 7 of mantissa

Widening also tells, in the same pass, the largest magnitude: infinite or NaN where a value is not finite. Narrowing
rounds to nearest, ties to even, and keeps denormals; what is too large becomes infinity.

Source: ggml_fp32_to_fp16_row and ggml_fp32_to_bf16_row_ref in ggml.c.
"""

from __future__ import annotations

import numpy as np

from gguf3n.quants.lanes import f16_bits, f16_value, f32_bits, f32_from_bits, kernel

F32_INFINITY = np.uint32(0x7F800000)


@kernel
def bf16_to_f32(source: np.ndarray, out: np.ndarray) -> np.float32:
    """Widen BF16 bits; the largest magnitude.

    Shapes: source uint16[n], out float32[n], contiguous.
    Exact: for every input, NaN payloads included.
    """
    bits = out.view(np.uint32)
    largest = np.uint16(0)
    for i in range(source.size):
        bits[i] = np.uint32(source[i]) << np.uint32(16)
        largest = max(largest, np.uint16(source[i] & np.uint16(0x7FFF)))
    return f32_from_bits(np.uint32(largest) << np.uint32(16))


@kernel
def f16_to_f32(source: np.ndarray, out: np.ndarray) -> np.float32:
    """Widen F16 bits; the largest magnitude.

    Shapes: source uint16[n], out float32[n], contiguous.
    Exact: for every input that is not a NaN; a NaN stays one.
    """
    largest = np.uint16(0)
    for i in range(source.size):
        out[i] = f16_value(source[i])
        largest = max(largest, np.uint16(source[i] & np.uint16(0x7FFF)))
    return f16_value(largest)


@kernel
def largest_magnitude(values: np.ndarray) -> np.float32:
    """The largest magnitude: infinite or NaN where a value is not finite.

    Shapes: values float32[n], contiguous.
    """
    bits = values.view(np.uint32)
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, np.uint32(bits[i] & np.uint32(0x7FFFFFFF)))
    return f32_from_bits(largest)


@kernel
def f32_to_bf16(values: np.ndarray, out: np.ndarray) -> None:
    """Round to BF16 bits.

    Shapes: values float32[n], out uint16[n], contiguous.
    Exact: equal to ggml for every input; a NaN becomes a quiet NaN of the same sign and upper payload.
    """
    for i in range(values.size):
        bits = f32_bits(values[i])
        is_odd = np.uint32(bits >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint32(bits + np.uint32(0x7FFF) + is_odd)
        quiet = np.uint32(bits | np.uint32(0x00400000))
        is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > F32_INFINITY
        out[i] = np.uint16((quiet if is_nan else rounded) >> np.uint32(16))


@kernel
def f32_to_f16(values: np.ndarray, out: np.ndarray) -> None:
    """Round to F16 bits.

    Shapes: values float32[n], out uint16[n], contiguous.
    Exact: equal to ggml for every input.
    """
    for i in range(values.size):
        out[i] = f16_bits(values[i])


@kernel
def quantize_f32(rows: np.ndarray, out: np.ndarray) -> None:
    """Copy float32 rows: out uint8[n_rows, n_per_row * 4]."""
    source = rows.reshape(-1)
    target = out.reshape(-1).view(np.float32)
    for i in range(source.size):
        target[i] = source[i]


@kernel
def quantize_f16(rows: np.ndarray, out: np.ndarray) -> None:
    """Round float32 rows to F16: out uint8[n_rows, n_per_row * 2]."""
    f32_to_f16(rows.reshape(-1), out.reshape(-1).view(np.uint16))


@kernel
def quantize_bf16(rows: np.ndarray, out: np.ndarray) -> None:
    """Round float32 rows to BF16: out uint8[n_rows, n_per_row * 2]."""
    f32_to_bf16(rows.reshape(-1), out.reshape(-1).view(np.uint16))
