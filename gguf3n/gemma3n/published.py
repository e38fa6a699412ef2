"""The published sizes of Gemma 3n, so that files can be planned without a checkpoint at hand.

The vision and audio encoders are the same for both sizes of the text model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf3n.formats.rows import Zeros
from gguf3n.gemma3n import mmproj, tower
from gguf3n.gemma3n.config import FULL, SLIDING, Config
from gguf3n.gemma3n.encoders import read_encoders
from gguf3n.gemma3n.mapping import MappedTensor, Table
from gguf3n.gemma3n.text import table


def _published(n_layers: int, n_kv_shared: int, ffn: int) -> Config:
    return Config(
        vocab_size=262_400,
        vocab_size_per_layer_input=262_144,
        hidden_size=2048,
        hidden_size_per_layer_input=256,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        intermediate_size=(ffn,) * n_layers,
        laurel_rank=64,
        altup_num_inputs=4,
        altup_active_idx=0,
        num_kv_shared_layers=n_kv_shared,
        sliding_window=512,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        final_logit_softcapping=30.0,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        layer_types=((SLIDING,) * 4 + (FULL,)) * (n_layers // 5),
        activation_sparsity_pattern=(0.95,) * 10 + (0.0,) * (n_layers - 10),
    )


HEADER_BYTES = 6_565_408
"""The header of the published E4B files, nearly all of it vocabulary."""

PUBLISHED: Mapping[str, Config] = {"E2B": _published(30, 10, 8192), "E4B": _published(35, 15, 16_384)}


ENCODER_HEADER_BYTES = 60_768
"""Of an mmproj file with vision and audio, nearly all of it names of tensors."""


def outline(config: Config) -> tuple[MappedTensor, ...]:
    """The tensors that a checkpoint of this config becomes, without the checkpoint: every row a zero."""
    return _outlined(table(config))


def encoder_outline(*, vision: bool = True, audio: bool = True) -> tuple[MappedTensor, ...]:
    """The same of the encoders' file."""
    sections: dict[str, dict[str, Any]] = {"vision_config": {}, "audio_config": {}}
    encoders = read_encoders(sections, Path(), PUBLISHED["E2B"].hidden_size, vision=vision, audio=audio, files=())
    return _outlined(mmproj.table_of(encoders, tower.PUBLISHED))


def _outlined(known: Table) -> tuple[MappedTensor, ...]:
    tensors = []
    for rule, bid in known.order:
        shape = known.shape(rule.written or rule.shape, bid)
        rows = (Zeros(math.prod(shape[:-1]), shape[-1]),)
        tensors.append(MappedTensor(rule.name(bid), shape, rule.storage, bid, rows, known.evaluated(rule, bid)))
    return tuple(tensors)
