"""A checkpoint of three layers and 0.4 M weights, made in milliseconds: for tests that need no llama.cpp."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gguf3n.gemma3n.source import Source
from workshop import checkpoints

DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8"}
"""safetensors' name of a numpy dtype; uint16 holds the bits of BF16."""


def config(**text: Any) -> dict[str, Any]:
    """A config.json in the published layout: three layers, the last with shared keys and values."""
    raw = checkpoints.tiny_config()
    raw["text_config"] |= {
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "hidden_size": 64,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": [128] * 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0],
        **text,
    }
    return raw


def e4b_config(**text: Any) -> dict[str, Any]:
    """The same with the 35 layers of E4B, so that it has the slices of E4B."""
    sliding = ["sliding_attention"] * 4 + ["full_attention"]
    shaped: dict[str, Any] = {
        "num_hidden_layers": 35,
        "num_kv_shared_layers": 15,
        "intermediate_size": [64] * 35,
        "layer_types": sliding * 7,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    }
    return config(**shaped | text)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Float32 cut to BF16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def tensors(raw: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Every text tensor of such a model, normal random BF16."""
    rng = np.random.default_rng(seed)
    return {
        name: bf16_bits(rng.standard_normal(shape, np.float32))
        for name, shape in checkpoints.tiny_shapes(dict(raw)).items()
        if name.startswith(checkpoints.PUBLISHED)
    }


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: object = None) -> None:
    """One safetensors file, tensors in the order given."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, array in arrays.items():
        entry = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    encoded = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def make(
    directory: Path,
    *,
    raw: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    readme: str | None = None,
) -> Path:
    """The whole checkpoint, with another config, other tensors or a model card where given."""
    raw = config() if raw is None else raw
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(checkpoints.TOKENIZER, directory, dirs_exist_ok=True)
    write_json(directory / "config.json", raw)
    write_safetensors(directory / "model.safetensors", tensors(raw) if arrays is None else arrays)
    if readme is not None:
        (directory / "README.md").write_text(readme, "utf-8")
    return directory


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


def changed(one: Source, other: Source) -> set[str]:
    """Tensors that have other rows in the second."""
    return {name for name, tensor in one.tensors.items() if other.tensors[name] != tensor}
