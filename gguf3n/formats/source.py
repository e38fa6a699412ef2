"""A tensor that can be read: what safetensors and GGUF sources have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gguf3n.formats.gguf_layout import QType, row_bytes

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip
"""Bytes of one element of each safetensors dtype; types of less than a byte are never in a checkpoint we convert."""

FLOAT_DTYPES = ("BF16", "F16", "F32")
"""The dtypes that weights may have in a checkpoint; GGUF calls them the same."""


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a file, not yet read.

    Shapes: `shape` in numpy order. Units: `offset` in bytes from the start of the file.
    `dtype` is that of safetensors, or the name of a ggml type.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of the whole tensor where it is a scalar."""
        n_per_row = self.shape[-1] if self.shape else 1
        if self.dtype in DTYPE_BYTES:
            return n_per_row * DTYPE_BYTES[self.dtype]
        return row_bytes(QType[self.dtype], n_per_row)

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes
