"""Sensitivities that nobody measured, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.sensitivity import Sensitivity, Sums, TensorSums, Text
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import Part
from gguf3n.recipes.model import TABLES
from gguf3n.validation.fingerprint import model_fingerprint

TYPES = (QType.Q8_0, QType.Q6_K, QType.Q5_K, QType.Q5_1, QType.Q4_K, QType.Q4_0, QType.IQ4_XS, QType.Q3_K, QType.Q2_K)


def made_up(part: Part, types: tuple[QType, ...] = TYPES, *, n_chunks: int = 8) -> Sensitivity:
    """Costs that fall by four with every bit, of each tensor another, the same for the same part."""
    rng = np.random.default_rng(0)
    tensors = {}
    for tensor in part.tensors:
        if tensor.storage is not Storage.QUANTIZABLE or not tensor.evaluated:
            continue
        scale = float(n_chunks * rng.lognormal(0, 2))
        costs = {
            qtype: scale * 4.0 ** -_bits(qtype) for qtype in types if tensor.n_per_row % GGML_TYPES[qtype].weights == 0
        }
        tensors[tensor.name] = TensorSums(
            tensor.shape,
            {
                qtype: Sums(cost, cost**2, cost, cost if tensor.name in TABLES else None)
                for qtype, cost in costs.items()
            },
        )
    return Sensitivity(
        path=Path("made-up.json"),
        model=part.source.name,
        fingerprint=model_fingerprint(part),
        imatrix=None,
        ctx=64,
        seed=0,
        texts=(Text("text.txt", "0" * 64),),
        spans=((0, n_chunks),),
        engines=("made up",),
        tensors=tensors,
    )


def _bits(qtype: QType) -> float:
    row = GGML_TYPES[qtype]
    return 8 * row.block_bytes / row.weights
