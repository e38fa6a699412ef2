"""Vectors inside kernels: `WIDTH` float32 lanes as one value, so that a kernel reads like the scalar algorithm.

One lane is one block. Where ggml has a float, a kernel has a vector: `+ - * /`, comparisons (which give a mask),
`mask & mask`, `mask | mask`, `abs`, and the functions below. A branch on data becomes `where(mask, yes, no)`. Scalars
mix in where they are float32; a float64 does not compile, so nothing is promoted by accident.

Each function below is its own definition in NumPy (a vector is then a float32 array of WIDTH elements, a mask a bool
array); the lowerings at the end of the file tell numba which LLVM instructions mean the same. Scratch memory is a
float32 array S[row, lane], one vector a row.

Why: numba leaves it to LLVM to vectorize a loop over lanes, which depends on unrolling, on alias analysis and on how
    selects happen to be merged.
    # measured: the search of Q6_K, one core of a Xeon with AVX-512: 30 to 130 million weights/s as loops over
    # S[row, lane], 405 as vectors (compile time 0.9 s and 0.3 s). 16, 32 and 64 lanes were equally fast.
Source: numba's documentation, "Extending Numba": low-level API (type_callable, lower_builtin).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import lower_builtin, models, register_model, type_callable

WIDTH = 16

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


class VectorType(types.Type):
    """A numba type that LLVM sees as <WIDTH x element>."""

    def __init__(self, name: str, element: ir.Type) -> None:
        super().__init__(name=f"{name}x{WIDTH}")
        self.element = element


VECTOR = VectorType("float32", ir.FloatType())
MASK = VectorType("mask", ir.IntType(1))

LLVM_INT = ir.IntType(32)
LLVM_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
LLVM_INTS = ir.VectorType(LLVM_INT, WIDTH)
LLVM_BYTES = ir.VectorType(ir.IntType(8), WIDTH)


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is one LLVM value."""

    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(fe_type.element, WIDTH))


def repeated(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A scalar in every lane; a vector as it is."""
    if isinstance(value.type, ir.VectorType):
        return value
    undefined = ir.Constant(ir.VectorType(value.type, WIDTH), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(LLVM_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(LLVM_INTS, [0] * WIDTH))


def constants(value: int) -> ir.Constant:
    return ir.Constant(LLVM_INTS, [value] * WIDTH)


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic whose result and arguments have one type."""
    function_type = ir.FunctionType(args[0].type, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def is_scalar(found: types.Type) -> bool:
    return found == types.float32


def data_pointer(
    context: Any, builder: ir.IRBuilder, array_type: types.Type, array: ir.Value, index: ir.Value
) -> ir.Value:
    """Address of element WIDTH * index of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [builder.mul(index, ir.Constant(index.type, WIDTH))])


def define_operator(symbol: Callable[..., Any], result: VectorType, emit: Callable[..., ir.Value]) -> None:
    """Binary operator on two vectors, or on a vector and a float32."""

    @type_callable(symbol)
    def typing(context: Any) -> Callable[..., Any]:
        def resolve(a: types.Type, b: types.Type) -> types.Type | None:
            return result if VECTOR in (a, b) and all(x == VECTOR or is_scalar(x) for x in (a, b)) else None

        return resolve

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, repeated(builder, args[0]), repeated(builder, args[1]))

    for a, b in ((VECTOR, VECTOR), (VECTOR, types.float32), (types.float32, VECTOR)):
        lower_builtin(symbol, a, b)(lower)


def define_mask_operator(symbol: Callable[..., Any], emit: Callable[..., ir.Value]) -> None:
    """Binary operator on two masks."""

    @type_callable(symbol)
    def typing(context: Any) -> Callable[..., Any]:
        def resolve(a: types.Type, b: types.Type) -> types.Type | None:
            return MASK if a == MASK and b == MASK else None

        return resolve

    @lower_builtin(symbol, MASK, MASK)
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, *args)


def define_unary(function: Callable[..., Any], emit: Callable[..., ir.Value]) -> None:
    """Function of one vector."""

    @type_callable(function)
    def typing(context: Any) -> Callable[..., Any]:
        def resolve(x: types.Type) -> types.Type | None:
            return VECTOR if x == VECTOR else None

        return resolve

    @lower_builtin(function, VECTOR)
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, args[0])


def llvm_intrinsic(name: str) -> Callable[..., ir.Value]:
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
define_mask_operator(operator.and_, ir.IRBuilder.and_)
define_mask_operator(operator.or_, ir.IRBuilder.or_)
define_unary(operator.neg, ir.IRBuilder.fneg)
define_unary(abs, llvm_intrinsic("fabs"))
define_unary(sqrt, llvm_intrinsic("sqrt"))
define_unary(floor, llvm_intrinsic("floor"))


def emit_nearest(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    rounding = ir.Constant(LLVM_VECTOR, [ROUNDING] * WIDTH)
    return builder.fsub(builder.fadd(x, rounding), rounding)


define_unary(nearest, emit_nearest)


@type_callable(splat)
def type_splat(context: Any) -> Callable[..., Any]:
    def resolve(x: types.Type) -> types.Type | None:
        return VECTOR if is_scalar(x) else None

    return resolve


@lower_builtin(splat, types.float32)
def lower_splat(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return repeated(builder, args[0])


@type_callable(where)
def type_where(context: Any) -> Callable[..., Any]:
    def resolve(mask: types.Type, yes: types.Type, no: types.Type) -> types.Type | None:
        return VECTOR if mask == MASK and all(x == VECTOR or is_scalar(x) for x in (yes, no)) else None

    return resolve


def lower_where(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return builder.select(args[0], repeated(builder, args[1]), repeated(builder, args[2]))


for yes in (VECTOR, types.float32):
    for no in (VECTOR, types.float32):
        lower_builtin(where, MASK, yes, no)(lower_where)


@type_callable(any_lane)
def type_any_lane(context: Any) -> Callable[..., Any]:
    def resolve(mask: types.Type) -> types.Type | None:
        return types.boolean if mask == MASK else None

    return resolve


@lower_builtin(any_lane, MASK)
def lower_any_lane(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    integer = ir.IntType(WIDTH)
    return builder.icmp_unsigned("!=", builder.bitcast(args[0], integer), ir.Constant(integer, 0))


@type_callable(level)
def type_level(context: Any) -> Callable[..., Any]:
    def resolve(x: types.Type, low: types.Type, high: types.Type) -> types.Type | None:
        return VECTOR if x == VECTOR and isinstance(low, types.Integer) and isinstance(high, types.Integer) else None

    return resolve


@lower_builtin(level, VECTOR, types.Integer, types.Integer)
def lower_level(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    # The clamp is done on the bits of 1.5 * 2**23 + level, which are ordered like the levels, so that no integer is
    # converted: one subtraction gives the float.
    # Why integers: LLVM merges a pair of float selects into compares and blends, which take twice as long.
    x, *limits = args
    rounding = ir.Constant(LLVM_VECTOR, [ROUNDING] * WIDTH)
    low, high = (
        builder.add(repeated(builder, context.cast(builder, limit, found, types.int32)), constants(ROUNDING_BITS))
        for limit, found in zip(limits, sig.args[1:], strict=True)
    )
    bits = builder.bitcast(builder.fadd(x, rounding), LLVM_INTS)
    bits = builder.or_(builder.and_(bits, constants(0x007FFFFF)), constants(0x4B000000))
    bits = call(builder, f"llvm.smax.v{WIDTH}i32", bits, low)
    bits = call(builder, f"llvm.smin.v{WIDTH}i32", bits, high)
    return builder.fsub(builder.bitcast(bits, LLVM_VECTOR), rounding)


@type_callable(load)
def type_load(context: Any) -> Callable[..., Any]:
    def resolve(source: types.Type, index: types.Type) -> types.Type | None:
        fits = isinstance(source, types.Array) and source.layout == "C" and source.dtype == types.float32
        return VECTOR if fits and isinstance(index, types.Integer) else None

    return resolve


@lower_builtin(load, types.Array, types.Integer)
def lower_load(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    index = context.cast(builder, args[1], sig.args[1], types.intp)
    pointer = data_pointer(context, builder, sig.args[0], args[0], index)
    return builder.load(builder.bitcast(pointer, LLVM_VECTOR.as_pointer()), align=4)


@type_callable(store)
def type_store(context: Any) -> Callable[..., Any]:
    def resolve(target: types.Type, index: types.Type, value: types.Type) -> types.Type | None:
        fits = isinstance(target, types.Array) and target.layout == "C" and target.dtype in (types.float32, types.uint8)
        return types.none if fits and isinstance(index, types.Integer) and value == VECTOR else None

    return resolve


@lower_builtin(store, types.Array, types.Integer, VECTOR)
def lower_store(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    index = context.cast(builder, args[1], sig.args[1], types.intp)
    pointer = data_pointer(context, builder, sig.args[0], args[0], index)
    value, align = args[2], 4
    if sig.args[0].dtype == types.uint8:
        value, align = builder.trunc(builder.fptosi(value, LLVM_INTS), LLVM_BYTES), 1
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)
    return context.get_dummy_value()


@type_callable(transpose)
def type_transpose(context: Any) -> Callable[..., Any]:
    def resolve(scratch: types.Type, row: types.Type) -> types.Type | None:
        fits = isinstance(scratch, types.Array) and scratch.layout == "C" and scratch.dtype == types.float32
        return types.none if fits and isinstance(row, types.Integer) else None

    return resolve


@lower_builtin(transpose, types.Array, types.Integer)
def lower_transpose(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    # Swap the two off-diagonal quarters of the square, then those of each quarter, and so on down to single lanes.
    row = context.cast(builder, args[1], sig.args[1], types.intp)
    first = builder.bitcast(data_pointer(context, builder, sig.args[0], args[0], row), LLVM_VECTOR.as_pointer())
    pointers = [builder.gep(first, [ir.Constant(LLVM_INT, i)]) for i in range(WIDTH)]
    vectors = [builder.load(pointer, align=4) for pointer in pointers]
    size = WIDTH // 2
    while size:
        from_above = ir.Constant(LLVM_INTS, [p if not p & size else WIDTH + p - size for p in range(WIDTH)])
        from_below = ir.Constant(LLVM_INTS, [p + size if not p & size else WIDTH + p for p in range(WIDTH)])
        for i in range(WIDTH):
            if not i & size:
                above, below = vectors[i], vectors[i + size]
                vectors[i] = builder.shuffle_vector(above, below, from_above)
                vectors[i + size] = builder.shuffle_vector(above, below, from_below)
        size //= 2
    for pointer, vector in zip(pointers, vectors, strict=True):
        builder.store(vector, pointer, align=4)
    return context.get_dummy_value()
