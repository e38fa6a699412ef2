"""Checks of the data itself. What is dequantized is a few rows of the two tables; see scan.py for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_reader import GGUFTensor
from gguf3n.formats.rows import RowReader
from gguf3n.gemma3n.lora import B as LORA_B
from gguf3n.inspection.found import Found, named, said
from gguf3n.inspection.subject import Subject
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD

SAMPLED_ROWS = 64
SAME_DIRECTION = 0.99


def bad_values(subject: Subject) -> Iterator[Found]:
    for name, fact in subject.data.items():
        if fact.n_bad:
            what = "scales" if GGML_TYPES[subject.gguf.tensors[name].qtype].weights > 1 else "values"
            yield _within(name, f"{fact.n_bad:,} {what} are NaN or infinite")


def all_zero(subject: Subject) -> Iterator[Found]:
    for name, fact in subject.data.items():
        if not fact.any_set and not subject.is_idle(name) and not name.endswith(LORA_B):  # as its training begins
            yield named(name, "every byte is zero")


def f16_range(subject: Subject) -> Iterator[Found]:
    for name, fact in subject.data.items():
        if fact.n_at_end:
            yield _within(name, f"{fact.n_at_end:,} values are 65504")


def wrong_table(subject: Subject) -> Iterator[Found]:
    """Rows of the two tables point the same way, or all rows of one do. Why: they are embeddings of different kinds."""
    tables = [subject.gguf.tensors.get(name) for name in (TOKEN_EMBD, PER_LAYER_TOKEN_EMBD)]
    if any(table is None or len(table.shape) != 2 or not subject.data[table.name].any_set for table in tables):
        return
    token, per_layer = (sample_rows(subject, table) for table in tables if table is not None)
    for name, rows in ((TOKEN_EMBD, token), (PER_LAYER_TOKEN_EMBD, per_layer)):
        if np.median(_cosine(rows[:-1], rows[1:])) > SAME_DIRECTION:
            yield _within(name, "its rows are all alike")
    width = min(token.shape[1], per_layer.shape[1])
    n = min(len(token), len(per_layer))
    if np.median(_cosine(token[:n, :width], per_layer[:n, :width])) > SAME_DIRECTION:
        yield said(PER_LAYER_TOKEN_EMBD, f"{TOKEN_EMBD} and {PER_LAYER_TOKEN_EMBD} hold the same values")


def _within(name: str, what: str) -> Found:
    return Found(name, what, f"{name}: {what}")


def sample_rows(subject: Subject, tensor: GGUFTensor) -> NDArray[np.float32]:
    """Some rows of a table, the same of any table: of ids that are pieces of text. Shapes: [rows, columns]."""
    stored = subject.gguf.stored(tensor)
    ids = np.unique(np.linspace(0.1, 0.9, SAMPLED_ROWS) * stored.n_rows).astype(int)
    rows = np.empty((len(ids), stored.n_per_row), np.float32)
    with closing(RowReader()) as reader:
        for i, row in enumerate(ids.tolist()):
            reader.fill(stored, row, rows[i : i + 1])
    return rows


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.nan_to_num(np.asarray(cosine, np.float32))
