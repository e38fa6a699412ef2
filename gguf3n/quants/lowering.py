"""How numba learns a function on vectors: `define` names its arguments and its result, and what LLVM is to do.

    @define(load, VECTOR, Elements(types.float32), INTEGER)
    def emit_load(builder, source, index): ...

A Python function is compiled by numba where its bytecode can be. The functions of `vectors`, `codes` and `lookups` are
instead lowered: numba asks for the type of the result (`type_callable`) and then for LLVM instructions
(`lower_builtin`). Everything that is the same for all of them happens here, so that an `emit` function sees nothing but
LLVM values:

    kind of argument      what numba finds                                 what `emit` is given
    VECTOR, MASK          such a value                                     that value
    types.float32         a float32                                        a vector of equal lanes
    LANES                 either a vector or a float32                     a vector
    INTEGER               an integer of any width                          an int64
    Elements(dtype, ...)  a C-contiguous array of one of these types       the address of its first element

It returns the LLVM value of the result, several for a tuple, or None.

Source: numba's documentation, "Extending Numba": low-level API (type_callable, lower_builtin); LLVM's language
    reference.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import lower_builtin, models, register_model, type_callable

WIDTH = 16
"""Lanes of a vector. # measured: 16, 32 and 64 were equally fast on a Xeon with AVX-512."""

LLVM_INT = ir.IntType(32)
LLVM_LONG = ir.IntType(64)
LLVM_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
LLVM_MASK = ir.VectorType(ir.IntType(1), WIDTH)
LLVM_INTS = ir.VectorType(LLVM_INT, WIDTH)


class VectorType(types.Type):
    """A numba type that LLVM sees as one vector."""

    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        super().__init__(name=f"{name}x{WIDTH}")
        self.llvm = llvm


@register_model(VectorType)
class VectorModel(models.PrimitiveModel):
    """A vector is one LLVM value."""

    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


class Elements:
    """The kind of a C-contiguous array."""

    def __init__(self, *dtypes: types.Type) -> None:
        self.dtypes = dtypes


VECTOR = VectorType("float32", LLVM_VECTOR)
MASK = VectorType("mask", LLVM_MASK)
LANES = (VECTOR, types.float32)
INTEGER = types.Integer


def define(function: Callable[..., Any], result: types.Type, *kinds: Any) -> Callable[..., Any]:
    """Decorates emit(builder, *values): the meaning of a function for arguments of these kinds.

    A function may have several meanings, for different kinds.
    """

    @type_callable(function)
    def typing(context: Any) -> Callable[..., Any]:
        def resolve(*found: types.Type) -> types.Type | None:
            return result if all(map(fits, found, kinds)) else None

        resolve.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # how numba counts arguments
        return resolve

    def decorate(emit: Callable[..., Any]) -> Callable[..., Any]:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            made = emit(builder, *(converted(context, builder, *pair) for pair in zip(sig.args, args, strict=True)))
            if made is None:
                return context.get_dummy_value()
            return context.make_tuple(builder, sig.return_type, made) if isinstance(made, tuple) else made

        for found in itertools.product(*map(lowered_types, kinds)):
            lower_builtin(function, *found)(lower)
        return emit

    return decorate


def fits(found: types.Type, kind: Any) -> bool:
    """Whether a type is of a kind."""
    if isinstance(kind, Elements):
        return isinstance(found, types.Array) and found.layout == "C" and found.dtype in kind.dtypes
    if kind is INTEGER:
        return isinstance(found, types.Integer)
    return found in lowered_types(kind)


def lowered_types(kind: Any) -> tuple[Any, ...]:
    """What lower_builtin is told about a kind: a class stands for all its types."""
    if isinstance(kind, Elements):
        return (types.Array,)
    return kind if isinstance(kind, tuple) else (kind,)


def converted(context: Any, builder: ir.IRBuilder, found: types.Type, value: ir.Value) -> ir.Value:
    """An argument as `emit` is given it."""
    if isinstance(found, types.Array):
        return context.make_array(found)(context, builder, value).data
    if isinstance(found, types.Integer):
        return context.cast(builder, value, found, types.int64)
    return repeated(builder, value) if found == types.float32 else value


# What `emit` functions are made of ------------------------------------------------------------------------------------


def repeated(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A scalar in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, WIDTH), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(LLVM_INT, 0))
    return builder.shuffle_vector(first, undefined, constants(0))


def repeated_int(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The low 32 bits of an int64 in every lane."""
    return repeated(builder, builder.trunc(value, LLVM_INT))


def constants(*values: int) -> ir.Constant:
    """A vector of integers: one a lane, or one for all lanes."""
    return ir.Constant(LLVM_INTS, list(values) if len(values) == WIDTH else list(values) * WIDTH)


def call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic whose result has the type of its first argument."""
    function_type = ir.FunctionType(args[0].type, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def vector_at(builder: ir.IRBuilder, elements: ir.Value, index: ir.Value) -> ir.Value:
    """Address of the vector that begins at element WIDTH * index."""
    pointer = builder.gep(elements, [builder.mul(index, ir.Constant(LLVM_LONG, WIDTH))])
    return builder.bitcast(pointer, ir.VectorType(elements.type.pointee, WIDTH).as_pointer())


def cpu_features() -> list[str]:
    """The features of the processor that numba compiles for, such as "+avx2"."""
    return list(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
