"""Vectors inside kernels: `WIDTH` float32 lanes as one value, so that a kernel reads like the scalar algorithm.

One lane is one block. Where ggml has a float, a kernel has a vector: `+ - * /`, comparisons (which give a mask),
`mask & mask`, `mask | mask`, `abs`, and the functions below. A branch on data becomes `where(mask, yes, no)`. Scalars
mix in where they are float32; a float64 does not compile, so nothing is promoted by accident.

Each function below is its own definition in NumPy (a vector is then a float32 array of WIDTH elements, a mask a bool
array); the lowerings at the end of the file tell numba which LLVM instructions mean the same (see lowering.py). Scratch
memory is a float32 array S[row, lane], one vector a row.

Why: numba leaves it to LLVM to vectorize a loop over lanes, which depends on unrolling, on alias analysis and on how
    selects happen to be merged.
    # measured: the search of Q6_K, one core of a Xeon with AVX-512: 30 to 130 million weights/s as loops over
    # S[row, lane], 405 as vectors (compile time 0.9 s and 0.3 s).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from llvmlite import ir
from numba.core import types

from gguf3n.quants.lowering import (
    INTEGER,
    LANES,
    LLVM_INT,
    LLVM_INTS,
    LLVM_VECTOR,
    MASK,
    VECTOR,
    Elements,
    call,
    constants,
    define,
    repeated_int,
    vector_at,
)
from gguf3n.quants.lowering import WIDTH as WIDTH

Vector: TypeAlias = np.ndarray
Mask: TypeAlias = np.ndarray

ROUNDING = 12582912.0
"""1.5 * 2**23: added to a small float, it leaves the nearest integer in the low mantissa bits."""
ROUNDING_BITS = 0x4B400000


def load(source: np.ndarray, index: int) -> Vector:
    """The WIDTH float32 from element WIDTH * index of a C-contiguous array: row `index` of a scratch array."""
    return source.reshape(-1)[index * WIDTH : (index + 1) * WIDTH].copy()


def store(target: np.ndarray, index: int, value: Vector) -> None:
    """The reverse of `load`; into a uint8 array it stores levels, which must be whole numbers from 0 to 255."""
    target.reshape(-1)[index * WIDTH : (index + 1) * WIDTH] = value


def transpose(scratch: np.ndarray, row: int) -> None:
    """Swap rows and lanes of the WIDTH rows that begin at `row`.

    # measured: 0.13 ns a weight; 0.31 as scalar loads and stores, as long as a tenth of the search of Q6_K.
    """
    scratch[row : row + WIDTH] = scratch[row : row + WIDTH].T.copy()


def splat(x: np.float32) -> Vector:
    """A vector of equal lanes."""
    return np.full(WIDTH, x, dtype=np.float32)


def where(mask: Mask, yes: Vector | np.float32, no: Vector | np.float32) -> Vector:
    """`yes` in the lanes where the mask is set, else `no`."""
    return np.where(mask, yes, no).astype(np.float32)


def sqrt(x: Vector) -> Vector:
    """Square root, correctly rounded."""
    return np.sqrt(x)


def any_lane(mask: Mask) -> bool:
    """Whether the mask is set in any lane."""
    return bool(mask.any())


def floor(x: Vector) -> Vector:
    """The next integer below."""
    return np.floor(x)


def nearest(x: Vector) -> Vector:
    """Nearest integer, ties to even, of |x| < 2**22."""
    return (x + np.float32(ROUNDING)) - np.float32(ROUNDING)


def level(x: Vector, low: int, high: int) -> Vector:
    """Nearest integer, ties to even, clamped to low..high; a whole number in a float32.

    Exact: equal to clamping ggml's nearest_int for every float32. Where |x| >= 2**22 that is not the nearest integer
        but what the mantissa happens to hold (NaN gives 0, infinity -2**22).
    """
    bits = (x + np.float32(ROUNDING)).view(np.int32)
    return np.clip((bits & 0x007FFFFF) - 0x00400000, low, high).astype(np.float32)


# The lowerings ---------------------------------------------------------------------------------------------------

LLVM_BYTE = ir.IntType(8)
FLOATS = Elements(types.float32)
FLOATS_OR_BYTES = Elements(types.float32, types.uint8)


def define_operator(symbol: Callable[..., object], result: types.Type, emit: Callable[..., ir.Value]) -> None:
    """Binary operator on two vectors, or on a vector and a float32."""
    define(symbol, result, VECTOR, LANES)(emit)
    define(symbol, result, types.float32, VECTOR)(emit)


def intrinsic(name: str) -> Callable[..., ir.Value]:
    return lambda builder, x: call(builder, f"llvm.{name}.v{WIDTH}f32", x)


def comparison(symbol: str) -> Callable[..., ir.Value]:
    """As in C: false where a NaN is compared, but != is true then."""
    if symbol == "!=":
        return lambda builder, a, b: builder.fcmp_unordered(symbol, a, b)
    return lambda builder, a, b: builder.fcmp_ordered(symbol, a, b)


define_operator(operator.add, VECTOR, ir.IRBuilder.fadd)
define_operator(operator.sub, VECTOR, ir.IRBuilder.fsub)
define_operator(operator.mul, VECTOR, ir.IRBuilder.fmul)
define_operator(operator.truediv, VECTOR, ir.IRBuilder.fdiv)
define_operator(operator.lt, MASK, comparison("<"))
define_operator(operator.le, MASK, comparison("<="))
define_operator(operator.gt, MASK, comparison(">"))
define_operator(operator.ge, MASK, comparison(">="))
define_operator(operator.eq, MASK, comparison("=="))
define_operator(operator.ne, MASK, comparison("!="))
define(operator.and_, MASK, MASK, MASK)(ir.IRBuilder.and_)
define(operator.or_, MASK, MASK, MASK)(ir.IRBuilder.or_)
define(operator.neg, VECTOR, VECTOR)(ir.IRBuilder.fneg)
define(abs, VECTOR, VECTOR)(intrinsic("fabs"))
define(sqrt, VECTOR, VECTOR)(intrinsic("sqrt"))
define(floor, VECTOR, VECTOR)(intrinsic("floor"))
define(where, VECTOR, MASK, LANES, LANES)(ir.IRBuilder.select)
define(splat, VECTOR, types.float32)(lambda builder, x: x)


@define(nearest, VECTOR, VECTOR)
def emit_nearest(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    rounding = ir.Constant(LLVM_VECTOR, [ROUNDING] * WIDTH)
    return builder.fsub(builder.fadd(x, rounding), rounding)


@define(any_lane, types.boolean, MASK)
def emit_any_lane(builder: ir.IRBuilder, mask: ir.Value) -> ir.Value:
    integer = ir.IntType(WIDTH)
    return builder.icmp_unsigned("!=", builder.bitcast(mask, integer), ir.Constant(integer, 0))


@define(level, VECTOR, VECTOR, INTEGER, INTEGER)
def emit_level(builder: ir.IRBuilder, x: ir.Value, *limits: ir.Value) -> ir.Value:
    # The clamp is done on the bits of 1.5 * 2**23 + level, which are ordered like the levels, so that no integer is
    # converted: one subtraction gives the float.
    # Why integers: LLVM merges a pair of float selects into compares and blends, which take twice as long.
    rounding = ir.Constant(LLVM_VECTOR, [ROUNDING] * WIDTH)
    low, high = (builder.add(repeated_int(builder, limit), constants(ROUNDING_BITS)) for limit in limits)
    bits = builder.bitcast(builder.fadd(x, rounding), LLVM_INTS)
    bits = builder.or_(builder.and_(bits, constants(0x007FFFFF)), constants(0x4B000000))
    bits = call(builder, f"llvm.smax.v{WIDTH}i32", bits, low)
    bits = call(builder, f"llvm.smin.v{WIDTH}i32", bits, high)
    return builder.fsub(builder.bitcast(bits, LLVM_VECTOR), rounding)


@define(load, VECTOR, FLOATS, INTEGER)
def emit_load(builder: ir.IRBuilder, source: ir.Value, index: ir.Value) -> ir.Value:
    return builder.load(vector_at(builder, source, index), align=4)


@define(store, types.none, FLOATS_OR_BYTES, INTEGER, VECTOR)
def emit_store(builder: ir.IRBuilder, target: ir.Value, index: ir.Value, value: ir.Value) -> None:
    pointer, align = vector_at(builder, target, index), 4
    if target.type.pointee == LLVM_BYTE:
        value, align = builder.trunc(builder.fptosi(value, LLVM_INTS), pointer.type.pointee), 1
    builder.store(value, pointer, align=align)


@define(transpose, types.none, FLOATS, INTEGER)
def emit_transpose(builder: ir.IRBuilder, scratch: ir.Value, row: ir.Value) -> None:
    # Swap the two off-diagonal quarters of the square, then those of each quarter, and so on down to single lanes.
    first = vector_at(builder, scratch, row)
    pointers = [builder.gep(first, [ir.Constant(LLVM_INT, i)]) for i in range(WIDTH)]
    vectors = [builder.load(pointer, align=4) for pointer in pointers]
    size = WIDTH // 2
    while size:
        from_above = constants(*[p if not p & size else WIDTH + p - size for p in range(WIDTH)])
        from_below = constants(*[p + size if not p & size else WIDTH + p for p in range(WIDTH)])
        for i in range(WIDTH):
            if not i & size:
                above, below = vectors[i], vectors[i + size]
                vectors[i] = builder.shuffle_vector(above, below, from_above)
                vectors[i + size] = builder.shuffle_vector(above, below, from_below)
        size //= 2
    for pointer, vector in zip(pointers, vectors, strict=True):
        builder.store(vector, pointer, align=4)
