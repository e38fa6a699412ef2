"""The GGUF format as tables: what the reader and the writer share.

    header    magic "GGUF", version uint32, tensor count uint64, key count uint64
    key       name, value type uint32, value
    tensor    name, dimension count uint32, dimensions uint64 (ggml order), type uint32, offset uint64
    padding   to the alignment
    data      each tensor at its offset from here, padded to the alignment
    string    length uint64, UTF-8 bytes
    array     element type uint32, count uint64, elements

Source: docs/gguf.md of the ggml repository. Enums come from the gguf package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUFValueType
from gguf.constants import GGMLQuantizationType as QType

__all__ = [
    "ALIGNMENT",
    "MAGIC",
    "SCALAR_CODES",
    "VERSION",
    "GGUFValueType",
    "KeyValue",
    "QType",
    "Scalar",
    "Value",
    "aligned",
    "row_bytes",
    "tensor_bytes",
]

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT: int = GGUF_DEFAULT_ALIGNMENT

SCALAR_CODES: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
"""`struct` and numpy code of each value type of a fixed size."""

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | Sequence[Scalar]


@dataclass(frozen=True)
class KeyValue:
    """One metadata key. `element_type` is set for arrays only."""

    name: str
    type: GGUFValueType
    value: Value
    element_type: GGUFValueType | None = None


def aligned(offset: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of the alignment, in bytes."""
    return -(-offset // alignment) * alignment


def row_bytes(qtype: QType, n_per_row: int) -> int:
    """Bytes of one row of weights.

    Raises: ValueError if the row length is no multiple of the type's block size.
    """
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    if n_per_row % block_size:
        raise ValueError(f"{qtype.name} stores blocks of {block_size} weights; a row of {n_per_row} does not divide")
    return int(n_per_row // block_size * block_bytes)


def tensor_bytes(qtype: QType, shape: tuple[int, ...]) -> int:
    """Bytes of a whole tensor. Shapes: numpy order, the row length last."""
    return math.prod(shape[:-1]) * row_bytes(qtype, shape[-1])
