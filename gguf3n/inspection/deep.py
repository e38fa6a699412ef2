"""Checks of the data itself: every byte is read once, nothing is dequantized but a few rows of the two tables.

A broken block shows in its scales (see ggml_types): one that is not finite makes its whole block not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType, row_bytes
from gguf3n.formats.gguf_reader import GGUFTensor
from gguf3n.inspection.subject import Subject
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD

CHUNK_BYTES = 1 << 23
F16_MAX = 0x7BFF
"""65504, the largest float16."""
SAMPLED_ROWS = 64
SAME_DIRECTION = 0.99


@dataclass
class TensorFacts:
    """What reading a tensor's bytes says: not finite values (or scales), float16 values at the end, any byte set."""

    n_bad: int = 0
    n_at_end: int = 0
    any_set: bool = False


def scan(subject: Subject, progress: Callable[[int, int], None] | None = None) -> dict[str, TensorFacts]:
    """Read every tensor once. Big-endian files are left out: their words would have to be turned.

    Raises: GGUFError where the file ends early.
    """
    if subject.gguf.byte_order != "little":
        return {}
    total = sum(tensor.n_bytes for tensor in subject.gguf.tensors.values())
    done = 0
    facts: dict[str, TensorFacts] = {}
    for tensor in subject.gguf.tensors.values():
        fact = facts[tensor.name] = TensorFacts()
        block_bytes = GGML_QUANT_SIZES[tensor.qtype][1]
        step = max(CHUNK_BYTES // block_bytes, 1) * block_bytes
        for start in range(0, tensor.n_bytes, step):
            _look(tensor.qtype, np.frombuffer(subject.gguf.read(tensor, start, step), np.uint8), fact)
            done += min(step, tensor.n_bytes - start)
            if progress is not None:
                progress(done, total)
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
        blocks = data.view(GGML_TYPES[qtype].block)
        for name in GGML_TYPES[qtype].scales:
            fact.n_bad += int(((blocks[name].view("<u2") & 0x7C00) == 0x7C00).sum())


def bad_values(facts: Mapping[str, TensorFacts], subject: Subject) -> Iterator[str]:
    for name, fact in facts.items():
        if fact.n_bad:
            what = "scales" if GGML_TYPES[subject.gguf.tensors[name].qtype].scales else "values"
            yield f"{name}: {fact.n_bad:,} {what} are NaN or infinite"


def all_zero(facts: Mapping[str, TensorFacts], subject: Subject) -> Iterator[str]:
    for name, fact in facts.items():
        if not fact.any_set and not subject.is_idle(name):
            yield name


def f16_range(facts: Mapping[str, TensorFacts], subject: Subject) -> Iterator[str]:
    for name, fact in facts.items():
        if fact.n_at_end:
            yield f"{name}: {fact.n_at_end:,} values are 65504"


def wrong_table(facts: Mapping[str, TensorFacts], subject: Subject) -> Iterator[str]:
    """Rows of the two tables point the same way, or all rows of one do. Why: they are embeddings of different kinds."""
    tables = [subject.gguf.tensors.get(name) for name in (TOKEN_EMBD, PER_LAYER_TOKEN_EMBD)]
    if any(table is None or len(table.shape) != 2 or not facts[table.name].any_set for table in tables):
        return
    token, per_layer = (sample_rows(subject, table) for table in tables if table is not None)
    for name, rows in ((TOKEN_EMBD, token), (PER_LAYER_TOKEN_EMBD, per_layer)):
        if np.median(_cosine(rows[:-1], rows[1:])) > SAME_DIRECTION:
            yield f"{name}: its rows are all alike"
    width = min(token.shape[1], per_layer.shape[1])
    n = min(len(token), len(per_layer))
    if np.median(_cosine(token[:n, :width], per_layer[:n, :width])) > SAME_DIRECTION:
        yield f"{TOKEN_EMBD} and {PER_LAYER_TOKEN_EMBD} hold the same values"


def sample_rows(subject: Subject, tensor: GGUFTensor) -> NDArray[np.float32]:
    """Some rows of a table, the same of any table: of ids that are pieces of text. Shapes: [rows, columns]."""
    from gguf.quants import dequantize

    n_bytes = row_bytes(tensor.qtype, tensor.shape[1])
    ids = np.unique(np.linspace(0.1, 0.9, SAMPLED_ROWS) * tensor.shape[0]).astype(int)
    raw = b"".join(subject.gguf.read(tensor, int(i) * n_bytes, n_bytes) for i in ids)
    rows: NDArray[np.float32] = dequantize(np.frombuffer(raw, np.uint8).reshape(len(ids), -1), tensor.qtype)
    return rows


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.nan_to_num(np.asarray(cosine, np.float32))
