"""Tables inside kernels: what `vectors` lacks for types whose weights are found in a grid.

A vector that serves as an index, or as packed half bytes, holds whole numbers from 0 to 2**24, which a float32 has
exactly. As in `vectors`, each function is its own definition in NumPy, and lowered to LLVM below.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from gguf3n.quants.lowering import (
    INTEGER,
    LLVM_INT,
    LLVM_INTS,
    LLVM_LONG,
    LLVM_MASK,
    LLVM_VECTOR,
    VECTOR,
    WIDTH,
    Elements,
    constants,
    define,
    repeated,
    repeated_int,
)
from gguf3n.quants.vectors import Vector


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


# The lowerings ---------------------------------------------------------------------------------------------------


def fetch(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """Integers of 32 bits from the memory at `table`, at the indices of a vector."""
    base = repeated(builder, builder.bitcast(table, LLVM_INT.as_pointer()))
    pointers = builder.gep(base, [builder.fptosi(index, LLVM_INTS)], inbounds=True, source_etype=LLVM_INT)
    function_type = ir.FunctionType(LLVM_INTS, [base.type, LLVM_INT, LLVM_MASK, LLVM_INTS])
    gather = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.masked.gather.v{WIDTH}i32.v{WIDTH}p0")
    every, undefined = ir.Constant(LLVM_MASK, [1] * WIDTH), ir.Constant(LLVM_INTS, ir.Undefined)
    return builder.call(gather, [pointers, ir.Constant(LLVM_INT, 4), every, undefined])


@define(look_up, VECTOR, Elements(types.float32), VECTOR)
def emit_look_up(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    return builder.bitcast(fetch(builder, table, index), LLVM_VECTOR)


@define(
    look_up_pair,
    types.Tuple((VECTOR, VECTOR)),  # type: ignore[attr-defined]
    Elements(types.uint16),
    VECTOR,
)
def emit_look_up_pair(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> tuple[ir.Value, ir.Value]:
    both = fetch(builder, table, index)
    low, high = builder.and_(both, constants(0xFFFF)), builder.lshr(both, constants(16))
    return builder.uitofp(low, LLVM_VECTOR), builder.uitofp(high, LLVM_VECTOR)


def place(builder: ir.IRBuilder, i: ir.Value) -> ir.Value:
    """Where four bits begin."""
    return repeated_int(builder, builder.shl(i, ir.Constant(LLVM_LONG, 2)))


@define(half_byte, VECTOR, VECTOR, INTEGER)
def emit_half_byte(builder: ir.IRBuilder, x: ir.Value, i: ir.Value) -> ir.Value:
    bits = builder.lshr(builder.fptosi(x, LLVM_INTS), place(builder, i))
    return builder.sitofp(builder.and_(bits, constants(15)), LLVM_VECTOR)


@define(place_value, VECTOR, VECTOR, INTEGER)
def emit_place_value(builder: ir.IRBuilder, x: ir.Value, i: ir.Value) -> ir.Value:
    mask = builder.shl(constants(15), place(builder, i))
    return builder.sitofp(builder.and_(builder.fptosi(x, LLVM_INTS), mask), LLVM_VECTOR)
