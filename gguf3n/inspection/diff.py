"""How two GGUF files differ: keys, vocabulary, tensors, and the values where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import Keys

from gguf3n.formats.gguf_layout import GGUFValueType
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, GGUFKey, GGUFTensor, open_gguf
from gguf3n.formats.rows import RowReader, Stored, chunks
from gguf3n.progress import Meter, OnProgress

CHUNK_BYTES = 1 << 22
VOCABULARY = (Keys.Tokenizer.LIST, Keys.Tokenizer.SCORES, Keys.Tokenizer.TOKEN_TYPE)
MAX_TOKENS_SHOWN = 20


@dataclass(frozen=True)
class KeyChange:
    """A key that differs: its types and values, None in a file without it. Of an array, `n_items` differ."""

    name: str
    types: tuple[str | None, str | None]
    values: tuple[Any, Any]
    n_items: int | None = None


@dataclass(frozen=True)
class TokenChange:
    """A token that is not the same: text, score, type in each file."""

    id: int
    before: tuple[Any, ...]
    after: tuple[Any, ...]


@dataclass(frozen=True)
class TensorChange:
    """A tensor that is not the same: type and shape, None where a file lacks it.

    `error` is the root of the squared differences over that of the squares of the first file's values; None where the
    values were not compared or can't be. 0 means equal values in other bytes.
    """

    name: str
    types: tuple[str | None, str | None]
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    error: float | None = None


@dataclass(frozen=True)
class Difference:
    """Everything in which two files differ, of `n_tensors` that one or both have.

    `layout` names what differs although the content is the same.
    """

    names: tuple[str, str]
    keys: tuple[KeyChange, ...]
    tokens: tuple[TokenChange, ...]
    tensors: tuple[TensorChange, ...]
    layout: tuple[str, ...]
    with_data: bool
    n_tensors: int

    @property
    def same_content(self) -> bool:
        return not (self.keys or self.tokens or self.tensors)

    @property
    def equal(self) -> bool:
        return self.same_content and not self.layout


def diff(
    a: str | Path | GGUFFile,
    b: str | Path | GGUFFile,
    *,
    with_data: bool = False,
    progress: OnProgress | None = None,
) -> Difference:
    """Compare two files.

    Args:
        a, b: as for `open_gguf`, or what it returned.
        with_data: compare the tensors' bytes, and the values where they differ.
        progress: called after each tensor, in bytes.

    Raises: GGUFError; HubError.
    """
    a, b = (each if isinstance(each, GGUFFile) else open_gguf(each) for each in (a, b))
    with closing(RowReader()) as reader:
        tensors = tuple(_tensors(a, b, with_data, reader, progress))
    return Difference(
        (a.name, b.name),
        tuple(_keys(a, b)),
        tuple(_tokens(a, b)),
        tensors,
        tuple(_layout(a, b)),
        with_data,
        len(a.tensors.keys() | b.tensors.keys()),
    )


def _keys(a: GGUFFile, b: GGUFFile) -> Iterator[KeyChange]:
    for name in dict.fromkeys((*a.keys, *b.keys)):
        if name == Keys.General.ALIGNMENT:
            continue
        x, y = a.keys.get(name), b.keys.get(name)
        types = (x.type_name if x else None, y.type_name if y else None)
        values = (_head(x), _head(y))
        if x is None or y is None:
            yield KeyChange(name, types, values)
        elif isinstance(x.value, GGUFArray) and isinstance(y.value, GGUFArray):
            n = _n_different(x.value, y.value)
            if types[0] != types[1] or n:
                yield KeyChange(name, types, values, n)
        elif types[0] != types[1] or not _same(x.value, y.value):
            yield KeyChange(name, types, values)


def _head(key: GGUFKey | None) -> Any:
    if key is None or not isinstance(key.value, GGUFArray):
        return None if key is None else key.value
    return key.value.head(8)


def _same(x: Any, y: Any) -> bool:
    return bool(x == y) or (x != x and y != y)


def _n_different(x: GGUFArray, y: GGUFArray) -> int:
    more = abs(len(x) - len(y))
    if x.element_type is not y.element_type or x.element_type is GGUFValueType.STRING:
        return more + sum(not _same(i, j) for i, j in zip(x, y, strict=False))
    for i, j in zip(x.pieces(), y.pieces(), strict=False):
        n = min(len(i), len(j))
        i, j = i[:n], j[:n]
        more += n - int(((i == j) | ((i != i) & (j != j))).sum())
    return more


def _tokens(a: GGUFFile, b: GGUFFile) -> Iterator[TokenChange]:
    """The first tokens that differ. Why: keys say how many; a list of all would be as long as the vocabulary."""
    shown = 0
    for i, (x, y) in enumerate(zip_longest(_rows(a), _rows(b), fillvalue=())):
        if x != y:
            yield TokenChange(i, x, y)
            shown += 1
            if shown == MAX_TOKENS_SHOWN:
                return


def _rows(gguf: GGUFFile) -> Iterator[tuple[Any, ...]]:
    arrays = [gguf.keys[name].value for name in VOCABULARY if name in gguf.keys]
    return zip(*(array for array in arrays if isinstance(array, GGUFArray)), strict=False)


def _tensors(
    a: GGUFFile, b: GGUFFile, with_data: bool, reader: RowReader, progress: OnProgress | None
) -> Iterator[TensorChange]:
    changes: list[TensorChange] = []
    meter = Meter("comparing", "bytes", sum(tensor.n_bytes for tensor in a.tensors.values()), progress)
    for name in dict.fromkeys((*a.tensors, *b.tensors)):
        x, y = a.tensors.get(name), b.tensors.get(name)
        types = (x.qtype.name if x else None, y.qtype.name if y else None)
        shapes = (x.shape if x else None, y.shape if y else None)
        same = types[0] == types[1] and shapes[0] == shapes[1]
        error = None
        if with_data and x is not None and y is not None and x.shape == y.shape:
            if same and a.byte_order == b.byte_order:
                same = _same_bytes(a, x, b, y)
            if not same and a.byte_order == b.byte_order == "little":
                error = relative_error(a.stored(x), b.stored(y), reader)
        if not same:
            changes.append(TensorChange(name, types, shapes, error))
        if x is not None:
            meter.advance(x.n_bytes)
    yield from (
        sorted(changes, key=lambda change: -np.inf if change.error is None else -change.error) if with_data else changes
    )


def _same_bytes(a: GGUFFile, x: GGUFTensor, b: GGUFFile, y: GGUFTensor) -> bool:
    return all(
        a.read(x, start, CHUNK_BYTES) == b.read(y, start, CHUNK_BYTES) for start in range(0, x.n_bytes, CHUNK_BYTES)
    )


def relative_error(x: Stored, y: Stored, reader: RowReader) -> float | None:
    """Of two tensors of one shape, a few rows at a time; None where a type can't be dequantized.

    Shapes: x and y have the same.
    """
    squares = differences = 0.0
    try:
        for chunk in chunks(x):
            first, second = (np.empty((chunk.n_rows, x.n_per_row), np.float32) for _ in range(2))
            reader.fill(x, chunk.first, first)
            reader.fill(y, chunk.first, second)
            exact = first.astype(np.float64)
            differences += float(np.square(exact - second).sum())
            squares += float(np.square(exact).sum())
    except NotImplementedError:
        return None
    if differences == 0:
        return 0.0
    return float(np.sqrt(differences / squares)) if squares else float("inf")


def _layout(a: GGUFFile, b: GGUFFile) -> Iterator[str]:
    """What differs although the content need not."""
    for what, x, y in (
        ("version", a.version, b.version),
        ("byte order", a.byte_order, b.byte_order),
        ("alignment", a.alignment, b.alignment),
        ("parts", len(a.parts), len(b.parts)),
        ("trailing bytes", a.trailing_bytes, b.trailing_bytes),
    ):
        if x != y:
            yield f"{what}: {x} and {y}"
    keys = [[name for name in gguf.keys if name != Keys.General.ALIGNMENT] for gguf in (a, b)]
    for what, names in (("keys", keys), ("tensors", [list(gguf.tensors) for gguf in (a, b)])):
        if sorted(names[0]) == sorted(names[1]) and names[0] != names[1]:
            yield f"the order of the {what}"
