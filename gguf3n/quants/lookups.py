"""Tables inside kernels: what `vectors` lacks for types whose weights are found in a grid.

A vector that serves as an index, or as packed half bytes, holds whole numbers from 0 to 2**24, which a float32 has
exactly. As in `vectors`, each function is its own definition in NumPy, and lowered to LLVM below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import lower_builtin, type_callable

from gguf3n.quants.vectors import LLVM_INT, LLVM_INTS, LLVM_VECTOR, VECTOR, WIDTH, Vector, constants, repeated


def look_up(table: np.ndarray, index: Vector) -> Vector:
    """table[index], lane by lane; the table is a C-contiguous float32[n], and every index is in it."""
    return table[index.astype(np.int32)]


def look_up_pair(table: np.ndarray, index: Vector) -> tuple[Vector, Vector]:
    """Entries 2 * index and 2 * index + 1 of a C-contiguous uint16[2 * n], which cost one look-up."""
    low = 2 * index.astype(np.int32)
    return table[low].astype(np.float32), table[low + 1].astype(np.float32)


def half_byte(x: Vector, i: int) -> Vector:
    """Four bits of a whole number: bits 4 * i and up."""
    return ((x.astype(np.int32) >> (4 * i)) & 15).astype(np.float32)


def place_value(x: Vector, i: int) -> Vector:
    """Four bits of a whole number where they stand: half_byte(x, i) * 16 ** i."""
    return (x.astype(np.int32) & (15 << (4 * i))).astype(np.float32)


def fetch(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    """Integers of 32 bits from an array, at the indices of a vector."""
    data = context.make_array(sig.args[0])(context, builder, args[0]).data
    base = repeated(builder, builder.bitcast(data, LLVM_INT.as_pointer()))
    index = builder.fptosi(args[1], LLVM_INTS)
    pointers = builder.gep(base, [index], inbounds=True, source_etype=LLVM_INT)
    masks = ir.VectorType(ir.IntType(1), WIDTH)
    function_type = ir.FunctionType(LLVM_INTS, [base.type, LLVM_INT, masks, LLVM_INTS])
    gather = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.masked.gather.v{WIDTH}i32.v{WIDTH}p0")
    every, undefined = ir.Constant(masks, [1] * WIDTH), ir.Constant(LLVM_INTS, ir.Undefined)
    return builder.call(gather, [pointers, ir.Constant(LLVM_INT, 4), every, undefined])


def fits(table: types.Type, dtype: types.Type) -> bool:
    return isinstance(table, types.Array) and table.layout == "C" and table.dtype == dtype


@type_callable(look_up)
def type_look_up(context: Any) -> Callable[..., Any]:
    def resolve(table: types.Type, index: types.Type) -> types.Type | None:
        return VECTOR if fits(table, types.float32) and index == VECTOR else None

    return resolve


@lower_builtin(look_up, types.Array, VECTOR)
def lower_look_up(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return builder.bitcast(fetch(context, builder, sig, args), LLVM_VECTOR)


@type_callable(look_up_pair)
def type_look_up_pair(context: Any) -> Callable[..., Any]:
    def resolve(table: types.Type, index: types.Type) -> types.Type | None:
        pair = types.Tuple((VECTOR, VECTOR))  # type: ignore[attr-defined]
        return pair if fits(table, types.uint16) and index == VECTOR else None

    return resolve


@lower_builtin(look_up_pair, types.Array, VECTOR)
def lower_look_up_pair(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    both = fetch(context, builder, sig, args)
    halves = builder.and_(both, constants(0xFFFF)), builder.lshr(both, constants(16))
    return context.make_tuple(builder, sig.return_type, [builder.uitofp(half, LLVM_VECTOR) for half in halves])


def define_digit(function: Callable[..., Any], emit: Callable[..., ir.Value]) -> None:
    """Function of a vector and a place, on integers: emit(builder, bits, place) gives integers."""

    @type_callable(function)
    def typing(context: Any) -> Callable[..., Any]:
        def resolve(x: types.Type, i: types.Type) -> types.Type | None:
            return VECTOR if x == VECTOR and isinstance(i, types.Integer) else None

        return resolve

    @lower_builtin(function, VECTOR, types.Integer)
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        place = context.cast(builder, args[1], sig.args[1], types.int32)
        shift = repeated(builder, builder.shl(place, ir.Constant(LLVM_INT, 2)))
        return builder.sitofp(emit(builder, builder.fptosi(args[0], LLVM_INTS), shift), LLVM_VECTOR)


define_digit(half_byte, lambda builder, bits, shift: builder.and_(builder.lshr(bits, shift), constants(15)))
define_digit(place_value, lambda builder, bits, shift: builder.and_(bits, builder.shl(constants(15), shift)))
