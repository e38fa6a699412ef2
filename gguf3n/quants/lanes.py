"""How every quantizer of this package is compiled, how weights get into lanes, and the scalar arithmetic shared by all.

The lane technique: one lane is one block, and a search runs in all lanes at once. State lies in one scratch array
`S[row, lane]`, lanes last, and kernels compute with its rows as vectors (vectors.py). All lanes are at the same columns
of `WIDTH` consecutive rows, so an importance is one number for all of them. A group of fewer rows repeats its last one;
only real rows are written.

Exactness: the bytes are those of ggml built without FMA contraction. So fastmath stays off (numba neither contracts
nor reorders then), every constant is a float32, and sums keep ggml's order.

Source: ggml/src/ggml-quants.c and ggml/src/ggml-impl.h of llama.cpp for formulas and the order of operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core.caching import IndexDataCacheFile

from gguf3n.quants.vectors import WIDTH, Vector, load, splat, sqrt, store, transpose

SUPER_BLOCK = 256
"""Weights of a block of the K and most IQ types."""

FLAGS: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": False, "error_model": "numpy"}

SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""What compiled kernels are kept for: the sources of the whole package."""


class _KernelFiles(IndexDataCacheFile):
    """numba's files of one kernel, kept for as long as SOURCES is the same, each named after what it is for.

    Why SOURCES: numba keeps a kernel for the file that it stands in. It would go on using one of which a part that is
        inlined from another file has changed, and can't load one whose lowerings are no longer there.
    Why names: numba numbers the files. Two processes that compile a kernel at the same time, one with importances and
        one without, give theirs the same number, and one signature then runs the other's code.
    """

    def __init__(self, of: Any) -> None:
        super().__init__(of._cache_path, of._impl.filename_base, of._impl.locator.get_source_stamp())
        self._base = of._impl.filename_base
        self._version += f" for {SOURCES}"  # looked at first; what another one has left is taken for nothing

    def save(self, key: Any, data: Any) -> None:
        """Write the file of a signature and a processor, then the index that has it."""
        name = f"{self._base}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"
        self._save_data(name, data)
        self._save_index({**self._load_index(), key: name})


def _compiler(**flags: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's compiler, with files of our own."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**FLAGS, **flags)(function)
        dispatcher._cache._cache_file = _KernelFiles(dispatcher._cache)
        return dispatcher

    return compiled


kernel = _compiler()
"""Compiles a plain function as a kernel; the plain one stays available as `.py_func`."""

inlined = _compiler(forceinline=True)
"""Compiles a part of a kernel that has to be specialized for the constants that the kernel passes."""

pasted = _compiler(inline="always")
"""Like `inlined`, but numba itself copies the body: compiles faster where a part is called only once."""


@inlined
def scratch(n_rows: int, n_lanes: int) -> np.ndarray:
    """Uninitialized float32[n_rows, n_lanes] that begins at a cache line.

    Why: numba aligns arrays to 32 bytes; a load of 64 then often crosses two lines.
        # measured: Q4_0 with quant_weights, one core of a Xeon with AVX-512: 341 and 380 million weights/s
    """
    memory = np.empty(n_rows * n_lanes + 16, dtype=np.float32)
    skipped = (-memory.ctypes.data) % 64 // 4
    return memory[skipped : skipped + n_rows * n_lanes].reshape((n_rows, n_lanes))


@inlined
def gather(rows: np.ndarray, first: int, column: int, n: int, S: np.ndarray) -> None:
    """Put n columns of rows first, first + 1, ... into rows 0 .. n - 1 of S, one a lane.

    Shapes: column and n are multiples of WIDTH.
    """
    for start in range(0, n, WIDTH):
        for lane in range(WIDTH):
            x = rows[min(first + lane, rows.shape[0] - 1)]
            store(S, start + lane, load(x, (column + start) // WIDTH))
        transpose(S, start)


@inlined
def sum_of_squares(S: np.ndarray, first: int, n: int) -> Vector:
    """Sum over n rows of S, in order."""
    total = splat(np.float32(0.0))
    for i in range(first, first + n):
        x = load(S, i)
        total = total + x * x
    return total


@inlined
def weigh(
    S: np.ndarray, x: int, n: int, quant_weights: np.ndarray | None, column: int, variance: Vector, weights: int
) -> None:
    """The importances of the n weights from row x, which stand at `column`: to the rows from `weights`.

    Exact: quant_weight * sqrt(variance + weight**2), in this order, for every type but Q6_K. The variance of
        ggml depends on the type, and so does its rounding, or where it overflows:
            Q4_0, Q4_1, Q5_0, Q5_1          sum of the squares of the row / their number
            Q2_K, IQ2_XXS, IQ2_XS           sum of the squares of the super-block / 256
            IQ4_NL, IQ4_XS                  sum of the squares of the block or super-block * (2 / their number)
            other K, IQ1, IQ2, IQ3 types    2 * sum of the squares of the super-block / 256
        Without quant_weights, weight**2. Types that have other importances then (Q2_K, Q4_K, Q5_K, IQ2_S) or none
        (Q4_0, Q4_1, Q5_0, Q5_1, Q3_K) do not call this then.
    """
    for i in range(n):
        value = load(S, x + i)
        weight = value * value
        if quant_weights is not None:
            weight = quant_weights[column + i] * sqrt(variance + weight)
        store(S, weights + i, weight)


@kernel
def f32_bits(x: np.float32) -> np.uint32:
    """The bits of a float32."""
    return np.float32(x).view(np.uint32)


@kernel
def f32_from_bits(bits: np.uint32) -> np.float32:
    """The float32 that has these bits."""
    return np.uint32(bits).view(np.float32)


@kernel
def f16_bits(x: np.float32) -> np.uint16:
    """Round a float32 to IEEE half precision and return the bits.

    Exact: equal to ggml's GGML_FP32_TO_FP16 for every float32 (nearest, ties to even, denormals kept).
    Why: numba has no float16 on the CPU. Adding a power of two that puts the last kept mantissa bit at the float32's
        own last bit lets the float adder do the rounding; no branch, so it vectorizes.
    """
    bits = f32_bits(x)
    shifted = np.uint32(bits << np.uint32(1))  # numba widens integer arithmetic to 64 bits
    magnitude = f32_from_bits(bits & np.uint32(0x7FFFFFFF))
    scaled = (magnitude * np.float32(2.0**112)) * np.float32(2.0**-110)
    exponent = max(shifted & np.uint32(0xFF000000), np.uint32(0x71000000))
    rounded = f32_bits(f32_from_bits((exponent >> np.uint32(1)) + np.uint32(0x07800000)) + scaled)
    half = ((rounded >> np.uint32(13)) & np.uint32(0x7C00)) + (rounded & np.uint32(0x0FFF))
    if shifted > np.uint32(0xFF000000):
        half = np.uint32(0x7E00)
    return np.uint16(((bits >> np.uint32(16)) & np.uint32(0x8000)) | half)


@kernel
def f16_value(bits: np.uint16) -> np.float32:
    """The float32 value of half-precision bits.

    Exact: for every finite half, denormals included, and infinity.
    """
    word = np.uint32(bits)
    sign = (word & np.uint32(0x8000)) << np.uint32(16)
    body = (word & np.uint32(0x7FFF)) << np.uint32(13)
    value = f32_from_bits(body) * np.float32(2.0**112)
    if body >= np.uint32(0x0F800000):
        value = f32_from_bits(body | np.uint32(0x7F800000))
    return f32_from_bits(f32_bits(value) | sign)


@inlined
def write_f16(x: np.float32, y: np.ndarray) -> np.float32:
    """Write a float32 to two bytes as half precision, and return what a reader will find there."""
    half = f16_bits(x)
    y[0] = half & np.uint16(0xFF)
    y[1] = half >> np.uint16(8)
    return f16_value(half)


@kernel
def round_half_even(x: np.float32) -> np.int32:
    """Nearest integer, ties to even, of |x| < 2**22.

    Source: nearest_int in ggml-quants.c, which adds 1.5 * 2**23 so that the integer lands in the low mantissa bits.
    """
    bits = f32_bits(np.float32(x) + np.float32(12582912.0))
    return np.int32(bits & np.uint32(0x007FFFFF)) - np.int32(0x00400000)


@kernel
def round_half_away(x: np.float32) -> np.float32:
    """C's roundf: nearest integer, ties away from zero."""
    whole = np.float32(np.trunc(x))
    if abs(np.float32(x) - whole) >= np.float32(0.5):
        whole += np.float32(np.copysign(np.float32(1.0), x))
    return whole


@kernel
def truncated(x: np.float32) -> np.int32:
    """C's (int8_t)x, as x86 compiles it: towards zero, and 0 for what no int8 holds, NaN and infinity among it.

    Why: a scale that is a tiny denormal has an infinite inverse, and the levels of such blocks must match too.
    """
    return np.int32(x if abs(x) < np.float32(128.0) else np.float32(0.0))


@kernel
def first_peak(x: np.ndarray) -> np.float32:
    """The value of largest magnitude, with its sign; the first one where magnitudes tie.

    Why: a maximum and a minimum without indices are fast; only where they tie does the order matter.
    """
    low = x[0]
    high = x[0]
    for j in range(32):
        low = x[j] if x[j] < low else low
        high = x[j] if x[j] > high else high
    peak = high if high > -low else low
    if high == -low:
        j = 0
        while abs(x[j]) != high:
            j += 1
        peak = x[j] + np.float32(0.0)  # of a block of zeros, the positive zero
    return peak
