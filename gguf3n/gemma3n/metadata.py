"""GGUF keys of a Gemma 3n: what is written, with which value type, from where.

`KEYS` is the table of the model's own keys. The general.* keys come from the gguf package's reading of the model card,
generation_config.json and the name, so they are those of llama.cpp's converter.

Source: set_gguf_parameters of Gemma3NModel and its bases in llama.cpp's conversion/.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH, MODEL_ARCH_NAMES, Keys, LlamaFileType

from gguf3n.errors import ConfigError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, Value
from gguf3n.formats.gguf_writer import pack_value
from gguf3n.gemma3n.config import SLIDING, Config, read_json
from gguf3n.gemma3n.gguf_package import silenced
from gguf3n.gemma3n.tokenizer import Vocabulary

ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA3N]

U32, F32, BOOL, STRING, ARRAY, I32 = (
    GGUFValueType.UINT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.STRING,
    GGUFValueType.ARRAY,
    GGUFValueType.INT32,
)


@dataclass(frozen=True)
class Key:
    """One row of the table: key, value type (of the elements, for an array), where the value comes from."""

    name: str
    type: GGUFValueType
    value: Callable[[Config], Value]
    is_array: bool = False


def sparsity_scales(config: Config) -> list[float]:
    """How many standard deviations above the mean an FFN activation must be to survive, for each layer.

    Source: the inverse normal distribution of the share that is zeroed; -inf where none is.
    """
    normal = NormalDist()
    return [normal.inv_cdf(share) if share else float("-inf") for share in config.activation_sparsity_pattern]


KEYS: tuple[Key, ...] = (
    Key(Keys.LLM.BLOCK_COUNT, U32, lambda c: c.num_hidden_layers),
    Key(Keys.LLM.CONTEXT_LENGTH, U32, lambda c: c.max_position_embeddings),
    Key(Keys.LLM.EMBEDDING_LENGTH, U32, lambda c: c.hidden_size),
    Key(Keys.LLM.FEED_FORWARD_LENGTH, I32, lambda c: c.intermediate_size, is_array=True),
    Key(Keys.Attention.HEAD_COUNT, U32, lambda c: c.num_attention_heads),
    Key(Keys.Attention.HEAD_COUNT_KV, U32, lambda c: c.num_key_value_heads),
    Key(Keys.Rope.FREQ_BASE, F32, lambda c: c.rope_theta),
    Key(Keys.Rope.FREQ_BASE_SWA, F32, lambda c: c.rope_local_base_freq),
    Key(Keys.Attention.LAYERNORM_RMS_EPS, F32, lambda c: c.rms_norm_eps),
    Key(Keys.Attention.KEY_LENGTH, U32, lambda c: c.head_dim),
    Key(Keys.Attention.VALUE_LENGTH, U32, lambda c: c.head_dim),
    Key(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, F32, lambda c: c.final_logit_softcapping),
    Key(Keys.Attention.SLIDING_WINDOW, U32, lambda c: c.sliding_window),
    Key(Keys.LLM.ALTUP_ACTIVE_IDX, U32, lambda c: c.altup_active_idx),
    Key(Keys.LLM.ALTUP_NUM_INPUTS, U32, lambda c: c.altup_num_inputs),
    Key(Keys.LLM.EMBD_LENGTH_PER_LAYER_INP, U32, lambda c: c.hidden_size_per_layer_input),
    Key(Keys.Attention.SHARED_KV_LAYERS, U32, lambda c: c.num_kv_shared_layers),
    Key(Keys.LLM.ACTIVATION_SPARSITY_SCALE, F32, sparsity_scales, is_array=True),
    Key(
        Keys.Attention.SLIDING_WINDOW_PATTERN,
        BOOL,
        lambda c: [kind == SLIDING for kind in c.layer_types],
        is_array=True,
    ),
)

NAME_FIELDS = ("name", "organization", "basename", "finetune", "version", "size_label")
"""What the gguf package guesses from a directory's name; a Hub id says it better."""


def general_keys(directory: Path, repo_id: str | None, n_weights: int) -> list[KeyValue]:
    """The general.* keys, from the model card, generation_config.json, config.json and the name.

    Args:
        repo_id: the Hub id the directory was fetched from; its directory's name is a commit hash.
        n_weights: of all tensors written, for the size label.

    Raises: ConfigError if the model card's front matter or generation_config.json can't be read.
    """
    import gguf

    directory = Path(os.path.abspath(directory))  # its name is the model's, and "." has none
    generation = directory / "generation_config.json"
    if generation.is_file():
        read_json(generation)
    try:
        with silenced():
            metadata = gguf.Metadata.load(None, directory, None, n_weights)
        if repo_id is not None:
            named = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), {}, {}, Path(repo_id), n_weights)
            for field in NAME_FIELDS:
                setattr(metadata, field, getattr(named, field))
        metadata.name = metadata.name or directory.name
        metadata.size_label = metadata.size_label or gguf.size_label(n_weights, 0, 0, 0)
        writer = gguf.GGUFWriter(None, ARCH)
        writer.add_type(gguf.GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)
    except Exception as error:
        raise ConfigError(
            f"{directory / 'README.md'}: the model card can't be read",
            found=f"{type(error).__name__}: {error}".partition("\n")[0],
            fix="correct the front matter, or remove the file",
        ) from error
    return [_general_key(name, value.type, value.value, generation) for name, value in writer.kv_data[0].items()]


def _general_key(name: str, kind: GGUFValueType, value: Any, generation: Path) -> KeyValue:
    """A key of the gguf package, whose values are of whatever type YAML and JSON made them."""
    if kind is STRING:
        return KeyValue(name, kind, str(value))
    if kind is ARRAY:  # tags and languages; YAML reads Norwegian as False
        items = [item for item in value if item is not None]
        return KeyValue(name, kind, ["no" if item is False else str(item) for item in items], STRING)
    key = KeyValue(name, kind, value)
    try:
        pack_value(key)
    except (struct.error, OverflowError) as error:
        raise ConfigError(
            f"{generation}: {name.rpartition('.')[2]} is impossible",
            expected=kind.name.lower(),
            found=repr(value)[:80],
        ) from error
    return key


def model_keys(config: Config) -> list[KeyValue]:
    """The gemma3n.* keys."""
    keys = []
    for key in KEYS:
        name = key.name.format(arch=ARCH)
        if key.is_array:
            keys.append(KeyValue(name, ARRAY, key.value(config), key.type))
        else:
            keys.append(KeyValue(name, key.type, key.value(config)))
    return keys


def file_keys(ftype: LlamaFileType) -> list[KeyValue]:
    """The keys that say how the file is quantized."""
    return [
        KeyValue(Keys.General.QUANTIZATION_VERSION, U32, GGML_QUANT_VERSION),
        KeyValue(Keys.General.FILE_TYPE, U32, int(ftype)),
    ]


def tokenizer_keys(vocabulary: Vocabulary) -> list[KeyValue]:
    """The tokenizer.* keys."""
    names = Keys.Tokenizer
    keys = [
        KeyValue(names.MODEL, STRING, "llama"),
        KeyValue(names.PRE, STRING, "default"),
        KeyValue(names.LIST, ARRAY, vocabulary.tokens, STRING),
        KeyValue(names.SCORES, ARRAY, vocabulary.scores, F32),
        KeyValue(names.TOKEN_TYPE, ARRAY, [int(kind) for kind in vocabulary.types], I32),
    ]
    for role, name in SPECIAL_ID_KEYS.items():
        if role in vocabulary.special_ids:
            keys.append(KeyValue(name, U32, vocabulary.special_ids[role]))
    for role, name in ADD_TOKEN_KEYS.items():
        if role in vocabulary.add_tokens:
            keys.append(KeyValue(name, BOOL, vocabulary.add_tokens[role]))
    extra = sorted(name for name in vocabulary.chat_templates if name != "default")
    if extra:
        keys.append(KeyValue(names.CHAT_TEMPLATES, ARRAY, extra, STRING))
        keys += [KeyValue(names.CHAT_TEMPLATE_N.format(name=n), STRING, vocabulary.chat_templates[n]) for n in extra]
    if "default" in vocabulary.chat_templates:
        keys.append(KeyValue(names.CHAT_TEMPLATE, STRING, vocabulary.chat_templates["default"]))
    keys.append(KeyValue(names.ADD_PREFIX, BOOL, False))
    return keys


SPECIAL_ID_KEYS: Mapping[str, str] = {
    "bos": Keys.Tokenizer.BOS_ID,
    "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID,
    "sep": Keys.Tokenizer.SEP_ID,
    "pad": Keys.Tokenizer.PAD_ID,
    "mask": Keys.Tokenizer.MASK_ID,
    "eot": Keys.Tokenizer.EOT_ID,
    "eom": Keys.Tokenizer.EOM_ID,
}

ADD_TOKEN_KEYS: Mapping[str, str] = {
    "bos": Keys.Tokenizer.ADD_BOS,
    "eos": Keys.Tokenizer.ADD_EOS,
    "sep": Keys.Tokenizer.ADD_SEP,
}
