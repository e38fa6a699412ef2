"""Holds our files against llama.cpp's: facts of a file, their differences, and which of them are meant."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import gguf3n
from gguf3n.formats.imatrix import Entry, ImportanceMatrix
from gguf3n.gemma3n.mapping import Storage
from workshop.places import FIXTURES

GOLDEN = FIXTURES / "llama_cpp" / "tiny.json"
TYPES = ("F32", "F16", "BF16", "Q8_0")
"""What convert_hf_to_gguf.py writes."""

OURS = {"Q8_0": "Q8_0@llama.cpp"}
"""Our name where the plain one means something else."""

NEEDY = ("IQ3_XXS", "IQ3_XS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S")
"""What llama-quantize refuses without an entry for every matrix."""

MEANT: tuple[tuple[str, str, str], ...] = (
    (
        "Q8_0",
        "tensor */type",
        "convert_hf_to_gguf.py quantizes AltUp, LAuReL and per-layer projection matrices to Q8_0; "
        "llama-quantize, the published files and we keep them 16-bit",
    ),
)
"""Differences we want: type written, pattern of the difference, reason."""


def describe(path: Path) -> dict[str, Any]:
    """A file as comparable facts: keys with type and value, tensors with shape, type and digest of their bytes."""
    gguf = gguf3n.open_gguf(path)
    facts: dict[str, Any] = {}
    for key in gguf.keys.values():
        value = gguf.value(key.name)
        text = json.dumps(value)
        facts[f"key {key.name}/type"] = key.type_name
        facts[f"key {key.name}/value"] = text if len(text) < 400 else hashlib.sha256(text.encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        for tensor in gguf.tensors.values():
            digest = hashlib.sha256()
            file.seek(tensor.offset)
            left = tensor.n_bytes
            while left:
                data = file.read(min(left, 1 << 24))
                digest.update(data)
                left -= len(data)
            facts[f"tensor {tensor.name}/shape"] = list(tensor.shape)
            facts[f"tensor {tensor.name}/type"] = tensor.qtype.name
            facts[f"tensor {tensor.name}/bytes"] = digest.hexdigest()[:16]
    return facts


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(fact, ours, theirs) of all that differs. Bytes of tensors whose types differ are not compared."""
    found = []
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        if ours.get(name) == theirs.get(name):
            continue
        subject, _, fact = name.rpartition("/")
        if fact == "bytes" and ours.get(f"{subject}/type") != theirs.get(f"{subject}/type"):
            continue
        found.append((name, ours.get(name), theirs.get(name)))
    return found


def meant(quant: str, name: str) -> str | None:
    """The reason of a difference we want."""
    return next((why for when, pattern, why in MEANT if when == quant and fnmatch.fnmatchcase(name, pattern)), None)


def random_importances(source: Path, *, complete: bool) -> ImportanceMatrix:
    """An entry for each matrix of a layer, where wanted also for those that are never evaluated."""
    rng = np.random.default_rng(0)
    entries = {
        tensor.name: Entry(rng.chisquare(2, (1, tensor.n_per_row)).astype(np.float32), np.ones(1, np.float32))
        for tensor in gguf3n.text_part(gguf3n.read_source(source)).tensors
        if tensor.storage is Storage.QUANTIZABLE and tensor.bid is not None and (tensor.evaluated or complete)
    }
    return ImportanceMatrix(Path("random"), entries)
