"""GGUF files with LoRA adapters, made without our writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np


def write_lora(
    path: Path, tensors: Mapping[str, np.ndarray], *, alpha: float | None = 4.0, arch: str = "gemma3n"
) -> Path:
    """As llama.cpp's converter writes them. Shapes: lora_a [rank, inputs], lora_b [outputs, rank]."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(name: str, n_outputs: int, n_inputs: int, rank: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Random matrices for a tensor, by the names that llama.cpp gives them."""
    rng = np.random.default_rng(seed)
    return {
        f"{name}.lora_a": rng.standard_normal((rank, n_inputs), np.float32),
        f"{name}.lora_b": rng.standard_normal((n_outputs, rank), np.float32),
    }
