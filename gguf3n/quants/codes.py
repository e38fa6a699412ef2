"""Codes inside kernels: eight levels 0, 1 or 2 as one number, two bits a level, the first level lowest.

A vector of codes holds numbers as the bits of its float32 lanes: `load`, `store` and `where` move them unchanged. As in
`vectors`, each function is its own definition in NumPy, and lowered to LLVM below.

Source: for `pick_term` Intel's intrinsics guide, _mm256_permutevar_ps and _mm512_permutevar_ps.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types

from gguf3n.quants.lowering import (
    INTEGER,
    LLVM_INT,
    LLVM_INTS,
    LLVM_LONG,
    LLVM_VECTOR,
    MASK,
    VECTOR,
    Elements,
    call,
    constants,
    cpu_features,
    define,
    repeated,
    repeated_int,
    vector_at,
)
from gguf3n.quants.vectors import WIDTH, Mask, Vector


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


def as_bits(builder: ir.IRBuilder, code: ir.Value) -> ir.Value:
    return builder.bitcast(code, LLVM_INTS)


def shifted(builder: ir.IRBuilder, code: ir.Value, i: ir.Value) -> ir.Value:
    """Level i in the low two bits."""
    return builder.lshr(as_bits(builder, code), repeated_int(builder, builder.shl(i, ir.Constant(LLVM_LONG, 1))))


@define(as_code, VECTOR, VECTOR)
def emit_as_code(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return builder.bitcast(builder.fptosi(x, LLVM_INTS), LLVM_VECTOR)


@define(load_codes, VECTOR, Elements(types.uint16), INTEGER)
def emit_load_codes(builder: ir.IRBuilder, source: ir.Value, index: ir.Value) -> ir.Value:
    codes = builder.load(vector_at(builder, source, index), align=2)
    return builder.bitcast(builder.zext(codes, LLVM_INTS), LLVM_VECTOR)


@define(digit, VECTOR, VECTOR, INTEGER)
def emit_digit(builder: ir.IRBuilder, code: ir.Value, i: ir.Value) -> ir.Value:
    return builder.sitofp(builder.and_(shifted(builder, code, i), constants(3)), LLVM_VECTOR)


@define(has_bit, MASK, VECTOR, INTEGER)
def emit_has_bit(builder: ir.IRBuilder, code: ir.Value, i: ir.Value) -> ir.Value:
    bit = repeated_int(builder, builder.shl(ir.Constant(LLVM_LONG, 1), i))
    return builder.icmp_unsigned("!=", builder.and_(as_bits(builder, code), bit), constants(0))


@define(first_smallest, types.uint64, VECTOR)
def emit_first_smallest(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    # Floats that are not negative are ordered like their bits. After each step a lane has the least of twice as many.
    bits = least = as_bits(builder, x)
    step = WIDTH // 2
    while step:
        partners = constants(*[lane ^ step for lane in range(WIDTH)])
        least = call(builder, f"llvm.umin.v{WIDTH}i32", least, builder.shuffle_vector(least, least, partners))
        step //= 2
    found = builder.bitcast(builder.icmp_unsigned("==", bits, least), ir.IntType(WIDTH))
    lane = builder.cttz(builder.zext(found, LLVM_LONG), ir.Constant(ir.IntType(1), 1))
    value = builder.zext(builder.extract_element(least, ir.Constant(LLVM_INT, 0)), LLVM_LONG)
    return builder.or_(builder.shl(value, ir.Constant(LLVM_LONG, 32)), lane)


@define(store_terms, types.none, Elements(types.float32), INTEGER, VECTOR, VECTOR, VECTOR)
def emit_store_terms(
    builder: ir.IRBuilder, S: ir.Value, row: ir.Value, term_0: ir.Value, term_1: ir.Value, term_2: ir.Value
) -> None:
    # Every shuffle stays within a quarter, which x86 does in one instruction.
    quarters = range(0, WIDTH, 4)
    for pair in (0, 2):
        two_lanes = [lane + term for q in quarters for lane in (q + pair, q + pair + 1) for term in (0, WIDTH)]
        both = builder.shuffle_vector(term_0, term_1, constants(*two_lanes))
        for i in (0, 1):
            three_terms = [n for q in quarters for n in (q + 2 * i, q + 2 * i + 1, *[WIDTH + q + pair + i] * 2)]
            pointer = vector_at(builder, S, builder.add(row, ir.Constant(LLVM_LONG, pair + i)))
            builder.store(builder.shuffle_vector(both, term_2, constants(*three_terms)), pointer, align=4)


PERMUTATIONS = {"+avx512f": ("llvm.x86.avx512.vpermilvar.ps.512", 16), "+avx": ("llvm.x86.avx.vpermilvar.ps.256", 8)}
"""CPU feature: its instruction that permutes each four lanes, and its width."""


@define(pick_term, VECTOR, Elements(types.float32), INTEGER, INTEGER, VECTOR, INTEGER)
def emit_pick_term(
    builder: ir.IRBuilder, S: ir.Value, row: ir.Value, lane: ir.Value, code: ir.Value, i: ir.Value
) -> ir.Value:
    levels = shifted(builder, code, i)
    row = builder.add(row, builder.and_(lane, ir.Constant(LLVM_LONG, 3)))
    quarter = builder.lshr(lane, ir.Constant(LLVM_LONG, 2))
    four = ir.VectorType(ir.FloatType(), 4).as_pointer()
    pointer = builder.gep(builder.bitcast(vector_at(builder, S, row), four), [quarter])
    terms = builder.load(pointer, align=4)

    # measured: a search among 16 neighbours takes 8 ns with these instructions and 11 ns with selects (AVX-512), or
    # 10 ns and 20 ns (AVX2).
    features = cpu_features()
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
    table = builder.shuffle_vector(terms, terms, ir.Constant(ints, [i % 4 for i in range(width)]))
    parts = []
    for start in range(0, WIDTH, width):
        part = builder.shuffle_vector(levels, levels, ir.Constant(ints, list(range(start, start + width))))
        parts.append(call(builder, name, table, part))
    while len(parts) > 1:
        width *= 2
        whole = ir.Constant(ir.VectorType(LLVM_INT, width), list(range(width)))
        parts = [builder.shuffle_vector(a, b, whole) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
