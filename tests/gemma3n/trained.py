"""Adapters that the real PEFT package has made and merged, on a model of three layers with its audio encoder.

The model has the paths of Gemma3nForConditionalGeneration, but no vision tower, which wants another package.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.rows import RowReader, SourceTensor
from gguf3n.gemma3n.source import Checkpoint, open_checkpoint
from tests import micro
from workshop import checkpoints, towers

Arrays = dict[str, NDArray[Any]]


def make_base(directory: Path) -> Path:
    """The whole checkpoint, with both encoders."""
    raw = micro.config()
    rng = np.random.default_rng(1)
    shapes = checkpoints.tiny_shapes(raw)
    width = raw["text_config"]["hidden_size"]
    for encoder in ("audio", "vision"):
        name = f"model.embed_{encoder}.embedding_projection.weight"
        shapes[name] = (width, shapes[name][1])
    arrays = {name: micro.bf16_bits(0.1 * rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
    base = micro.make(directory, raw=raw, arrays=arrays)
    for name, text in towers.processor_files(towers.IMAGE_SIZE).items():
        (base / name).write_text(text, "utf-8")
    return base


def values(tensor: SourceTensor) -> NDArray[np.float32]:
    """All of a tensor."""
    with closing(RowReader()) as reader:
        parts = [np.empty((rows.n_rows, rows.n_per_row), np.float32) for rows in tensor.rows]
        for rows, part in zip(tensor.rows, parts, strict=True):
            reader.fill(rows, 0, part)
    return np.concatenate(parts).reshape(tensor.shape)


def write_merged(source: Checkpoint, directory: Path, others: Mapping[str, NDArray[Any]] | None = None) -> Path:
    """A checkpoint with the same values in float32, but for `others`, in a file of its own."""
    shutil.copytree(source.path, directory, ignore=lambda *_: ["model.safetensors"])
    changed = {name: np.asarray(array, np.float32) for name, array in (others or {}).items() if name in source.tensors}
    arrays = {name: changed[name] if name in changed else values(tensor) for name, tensor in source.tensors.items()}
    micro.write_safetensors(directory / "model.safetensors", arrays)
    return directory


def gemma(source: Checkpoint, dtype: str) -> Any:
    """The model in torch."""
    import torch
    from transformers import Gemma3nAudioConfig, Gemma3nTextConfig
    from transformers.models.gemma3n import modeling_gemma3n as code

    raw = source.raw_config
    model, whole = torch.nn.Module(), torch.nn.Module()
    model.language_model = code.Gemma3nTextModel(Gemma3nTextConfig(**raw["text_config"]))
    model.audio_tower = code.Gemma3nAudioEncoder(Gemma3nAudioConfig(**raw["audio_config"]))
    whole.model = model
    whole.to(getattr(torch, dtype))
    for name, weight in whole.state_dict().items():
        if name in source.tensors:  # the others are computed
            weight.copy_(torch.from_numpy(values(source.tensors[name])))
    return whole


@dataclass(frozen=True)
class Trained:
    """An adapter's directory, and what PEFT makes of the base: by name, in float64 and in float32."""

    directory: Path
    exact: Mapping[str, NDArray[np.float64]]
    single: Mapping[str, NDArray[np.float32]]


def train(base: Path, directory: Path, seed: int = 0, **settings: Any) -> Trained:
    """An adapter with random weights, saved by PEFT; merged by PEFT in float32 as it is, and in float64 as loaded."""
    import peft
    import torch

    source = open_checkpoint(base)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = peft.TrainableTokensConfig if "token_indices" in settings else peft.LoraConfig
        model = peft.get_peft_model(gemma(source, "float32"), kind(**settings))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    weight += (0.02 if "magnitude" in name else 0.2) * torch.randn_like(weight)
        model.save_pretrained(directory, safe_serialization=True)
        single = arrays(model.merge_and_unload())
        loaded = peft.PeftModel.from_pretrained(gemma(source, "float64"), directory)
        exact = arrays(loaded.merge_and_unload())
    return Trained(directory, exact, single)


def arrays(model: Any) -> Arrays:
    return {name: weight.numpy() for name, weight in model.state_dict().items()}
