"""Codes inside kernels: eight levels 0, 1 or 2 as one number, two bits a level, the first level lowest.

A vector of codes holds numbers as the bits of its float32 lanes: `load`, `store` and `where` move them unchanged. As in
`vectors`, each function is its own definition in NumPy, and lowered to LLVM below.

Source: numba's documentation, "Extending Numba": low-level API; LLVM's language reference; for `pick_term` Intel's
    intrinsics guide, _mm256_permutevar_ps and _mm512_permutevar_ps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import lower_builtin, type_callable

from gguf3n.quants.vectors import (
    LLVM_INT,
    LLVM_INTS,
    LLVM_VECTOR,
    MASK,
    VECTOR,
    WIDTH,
    Mask,
    Vector,
    call,
    constants,
    data_pointer,
    repeated,
)


def as_code(x: Vector) -> Vector:
    """Whole numbers as codes."""
    return x.astype(np.uint32).view(np.float32)


def load_codes(source: np.ndarray, index: int) -> Vector:
    """The WIDTH codes from element WIDTH * index of a C-contiguous uint16 array."""
    return source.reshape(-1)[index * WIDTH : (index + 1) * WIDTH].astype(np.uint32).view(np.float32)


def digit(code: Vector, i: int) -> Vector:
    """Level i of each code, as a whole number."""
    return (code.view(np.uint32) >> np.uint32(2 * i) & np.uint32(3)).astype(np.float32)


def has_bit(code: Vector, i: int) -> Mask:
    """Whether bit i of each code is set."""
    return (code.view(np.uint32) >> np.uint32(i) & np.uint32(1)) != 0


def store_terms(S: np.ndarray, row: int, term_0: Vector, term_1: Vector, term_2: Vector) -> None:
    """Store three numbers a lane so that a lane's are neighbours: four rows, a quarter of the lanes in each."""
    for lane in range(WIDTH):
        S[row + lane % 4, lane // 4 * 4 : lane // 4 * 4 + 3] = term_0[lane], term_1[lane], term_2[lane]


def pick_term(S: np.ndarray, row: int, lane: int, code: Vector, i: int) -> Vector:
    """Of the three numbers that store_terms stored for a lane, the one that level i of each code selects."""
    levels = code.view(np.uint32) >> np.uint32(2 * i) & np.uint32(3)
    return S[row + lane % 4, lane // 4 * 4 + levels]


def first_smallest(x: Vector) -> np.uint64:
    """The bits of the smallest lane, times 2**32, plus the number of the first such lane; no lane is negative."""
    return np.uint64(x.min().view(np.uint32)) << np.uint64(32) | np.uint64(x.argmin())


# The lowerings ---------------------------------------------------------------------------------------------------

LLVM_CODES = ir.VectorType(ir.IntType(16), WIDTH)
LLVM_LONG = ir.IntType(64)


def as_bits(builder: ir.IRBuilder, code: ir.Value) -> ir.Value:
    return builder.bitcast(code, LLVM_INTS)


def define(function: Callable[..., Any], result: types.Type, emit: Callable[..., ir.Value], index: bool) -> None:
    """A function of one vector, perhaps with an index."""

    @type_callable(function)
    def typing(context: Any) -> Callable[..., Any]:
        def resolve_alone(code: types.Type) -> types.Type | None:
            return result if code == VECTOR else None

        def resolve_indexed(code: types.Type, i: types.Type) -> types.Type | None:
            return result if code == VECTOR and isinstance(i, types.Integer) else None

        return resolve_indexed if index else resolve_alone

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return emit(builder, args[0], *(context.cast(builder, i, sig.args[1], types.uint32) for i in args[1:]))

    lower_builtin(function, VECTOR, *[types.Integer] * index)(lower)


def emit_as_code(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return builder.bitcast(builder.fptosi(x, LLVM_INTS), LLVM_VECTOR)


def emit_digit(builder: ir.IRBuilder, code: ir.Value, i: ir.Value) -> ir.Value:
    return builder.sitofp(builder.and_(shifted(builder, code, i), constants(3)), LLVM_VECTOR)


def emit_has_bit(builder: ir.IRBuilder, code: ir.Value, i: ir.Value) -> ir.Value:
    bit = builder.shl(ir.Constant(LLVM_INT, 1), i)
    return builder.icmp_unsigned("!=", builder.and_(as_bits(builder, code), repeated(builder, bit)), constants(0))


def emit_first_smallest(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    # Floats that are not negative are ordered like their bits. After each step a lane has the least of twice as many.
    bits = least = as_bits(builder, x)
    step = WIDTH // 2
    while step:
        partners = ir.Constant(LLVM_INTS, [lane ^ step for lane in range(WIDTH)])
        least = call(builder, f"llvm.umin.v{WIDTH}i32", least, builder.shuffle_vector(least, least, partners))
        step //= 2
    found = builder.bitcast(builder.icmp_unsigned("==", bits, least), ir.IntType(WIDTH))
    lane = builder.cttz(builder.zext(found, LLVM_LONG), ir.Constant(ir.IntType(1), 1))
    value = builder.zext(builder.extract_element(least, ir.Constant(LLVM_INT, 0)), LLVM_LONG)
    return builder.or_(builder.shl(value, ir.Constant(LLVM_LONG, 32)), lane)


def shifted(builder: ir.IRBuilder, code: ir.Value, i: ir.Value) -> ir.Value:
    """Level i in the low two bits."""
    return builder.lshr(as_bits(builder, code), repeated(builder, builder.shl(i, ir.Constant(LLVM_INT, 1))))


define(as_code, VECTOR, emit_as_code, index=False)
define(digit, VECTOR, emit_digit, index=True)
define(has_bit, MASK, emit_has_bit, index=True)
define(first_smallest, types.uint64, emit_first_smallest, index=False)


@type_callable(load_codes)
def type_load_codes(context: Any) -> Callable[..., Any]:
    def resolve(source: types.Type, index: types.Type) -> types.Type | None:
        fits = isinstance(source, types.Array) and source.layout == "C" and source.dtype == types.uint16
        return VECTOR if fits and isinstance(index, types.Integer) else None

    return resolve


@lower_builtin(load_codes, types.Array, types.Integer)
def lower_load_codes(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    index = context.cast(builder, args[1], sig.args[1], types.intp)
    pointer = data_pointer(context, builder, sig.args[0], args[0], index)
    codes = builder.load(builder.bitcast(pointer, LLVM_CODES.as_pointer()), align=2)
    return builder.bitcast(builder.zext(codes, LLVM_INTS), LLVM_VECTOR)


def is_scratch(array: types.Type) -> bool:
    return isinstance(array, types.Array) and array.layout == "C" and array.dtype == types.float32


@type_callable(store_terms)
def type_store_terms(context: Any) -> Callable[..., Any]:
    def resolve(S: Any, row: Any, term_0: Any, term_1: Any, term_2: Any) -> types.Type | None:
        fits = isinstance(row, types.Integer) and term_0 == term_1 == term_2 == VECTOR
        return types.none if is_scratch(S) and fits else None

    return resolve


@lower_builtin(store_terms, types.Array, types.Integer, VECTOR, VECTOR, VECTOR)
def lower_store_terms(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    # Every shuffle stays within a quarter, which x86 does in one instruction.
    first_row = context.cast(builder, args[1], sig.args[1], types.intp)
    term_0, term_1, term_2 = args[2:]
    quarters = range(0, WIDTH, 4)
    for pair in (0, 2):
        two_lanes = [lane + term for q in quarters for lane in (q + pair, q + pair + 1) for term in (0, WIDTH)]
        both = builder.shuffle_vector(term_0, term_1, ir.Constant(LLVM_INTS, two_lanes))
        for i in (0, 1):
            three_terms = [n for q in quarters for n in (q + 2 * i, q + 2 * i + 1, *[WIDTH + q + pair + i] * 2)]
            row = builder.add(first_row, ir.Constant(first_row.type, pair + i))
            pointer = data_pointer(context, builder, sig.args[0], args[0], row)
            value = builder.shuffle_vector(both, term_2, ir.Constant(LLVM_INTS, three_terms))
            builder.store(value, builder.bitcast(pointer, LLVM_VECTOR.as_pointer()), align=4)
    return context.get_dummy_value()


@type_callable(pick_term)
def type_pick_term(context: Any) -> Callable[..., Any]:
    def resolve(S: Any, row: Any, lane: Any, code: Any, i: Any) -> types.Type | None:
        fits = all(isinstance(x, types.Integer) for x in (row, lane, i)) and code == VECTOR
        return VECTOR if is_scratch(S) and fits else None

    return resolve


PERMUTATIONS = {"+avx512f": ("llvm.x86.avx512.vpermilvar.ps.512", 16), "+avx": ("llvm.x86.avx.vpermilvar.ps.256", 8)}
"""CPU feature: its instruction that permutes each four lanes, and its width."""


@lower_builtin(pick_term, types.Array, types.Integer, types.Integer, VECTOR, types.Integer)
def lower_pick_term(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    row, lane = (context.cast(builder, x, found, types.intp) for x, found in zip(args[1:3], sig.args[1:3], strict=True))
    levels = shifted(builder, args[3], context.cast(builder, args[4], sig.args[4], types.uint32))
    three, two = ir.Constant(lane.type, 3), ir.Constant(lane.type, 2)
    row = builder.add(row, builder.and_(lane, three))
    pointer = data_pointer(context, builder, sig.args[0], args[0], row)
    pointer = builder.gep(pointer, [builder.shl(builder.lshr(lane, two), two)])
    quarter = ir.VectorType(ir.FloatType(), 4)
    terms = builder.load(builder.bitcast(pointer, quarter.as_pointer()), align=4)

    # measured: a search among 16 neighbours takes 8 ns with these instructions and 11 ns with selects (AVX-512), or
    # 10 ns and 20 ns (AVX2).
    features = context.codegen().magic_tuple()[2].split(",")
    for feature, (name, width) in PERMUTATIONS.items():
        if feature in features and WIDTH % width == 0:
            return permuted(builder, terms, levels, name, width)
    term_0, term_1, term_2 = (
        repeated(builder, builder.extract_element(terms, ir.Constant(LLVM_INT, level))) for level in range(3)
    )
    is_1, is_2 = (builder.icmp_unsigned("!=", builder.and_(levels, constants(level)), constants(0)) for level in (1, 2))
    return builder.select(is_2, term_2, builder.select(is_1, term_1, term_0))


def permuted(builder: ir.IRBuilder, terms: ir.Value, levels: ir.Value, name: str, width: int) -> ir.Value:
    """terms[levels & 3], with an instruction for `width` lanes."""
    ints = ir.VectorType(LLVM_INT, width)
    floats = ir.VectorType(ir.FloatType(), width)
    permute = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats, ints]), name)
    table = builder.shuffle_vector(terms, terms, ir.Constant(ints, [i % 4 for i in range(width)]))
    parts = []
    for start in range(0, WIDTH, width):
        part = builder.shuffle_vector(levels, levels, ir.Constant(ints, list(range(start, start + width))))
        parts.append(builder.call(permute, [table, part]))
    while len(parts) > 1:
        width *= 2
        whole = ir.Constant(ir.VectorType(LLVM_INT, width), list(range(width)))
        parts = [builder.shuffle_vector(a, b, whole) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
