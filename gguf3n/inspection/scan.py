"""What the bytes of tensors say of themselves: each is read once, nothing is dequantized.

A broken block shows in its scales (see ggml_types): one that is not finite makes its whole block not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import GGUFFile
from gguf3n.progress import Meter, OnProgress

CHUNK_BYTES = 1 << 23
F16_MAX = 0x7BFF
"""65504, the largest float16."""


@dataclass
class TensorFacts:
    """What a tensor's bytes say: how many values or scales are not finite, how many float16 values are at the end of
    the range, whether any byte is set."""

    n_bad: int = 0
    n_at_end: int = 0
    any_set: bool = False


def scan(gguf: GGUFFile, progress: OnProgress | None = None) -> dict[str, TensorFacts]:
    """Read every tensor of a little-endian file once.

    Raises: GGUFError where the file ends early.
    """
    meter = Meter("reading tensors", "bytes", sum(tensor.n_bytes for tensor in gguf.tensors.values()), progress)
    facts: dict[str, TensorFacts] = {}
    for tensor in gguf.tensors.values():
        fact = facts[tensor.name] = TensorFacts()
        block_bytes = GGML_QUANT_SIZES[tensor.qtype][1]
        step = max(CHUNK_BYTES // block_bytes, 1) * block_bytes
        for start in range(0, tensor.n_bytes, step):
            data = np.frombuffer(gguf.read(tensor, start, step), np.uint8)
            _look(tensor.qtype, data, fact)
            meter.advance(len(data))
    return facts


def _look(qtype: QType, data: NDArray[np.uint8], fact: TensorFacts) -> None:
    fact.any_set = fact.any_set or bool(data.any())
    if qtype is QType.F16:
        magnitudes = data.view("<u2") & 0x7FFF
        fact.n_bad += int((magnitudes > F16_MAX).sum())
        fact.n_at_end += int((magnitudes == F16_MAX).sum())
    elif qtype is QType.BF16:
        fact.n_bad += int(((data.view("<u2") & 0x7F80) == 0x7F80).sum())
    elif qtype is QType.F32:
        fact.n_bad += int(((data.view("<u4") & 0x7F800000) == 0x7F800000).sum())
    elif qtype in GGML_TYPES:
        for scales in _scales(qtype, data.view(GGML_TYPES[qtype].block)):
            fact.n_bad += int(((scales & 0x7C00) == 0x7C00).sum())


def _scales(qtype: QType, blocks: NDArray[np.void]) -> Iterator[NDArray[np.uint16]]:
    """The bits of the float16 scales of blocks."""
    if qtype is QType.IQ1_M:  # ggml quirk: its scale is spread over the upper four bits of its four words
        a, b, c, d = blocks["scales"].T
        yield a >> 12 | b >> 8 & 0x00F0 | c >> 4 & 0x0F00 | d & 0xF000
    for name in GGML_TYPES[qtype].scales:
        yield blocks[name].view("<u2")
