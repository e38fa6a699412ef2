"""The text file of Gemma 3n: which tensors it has, from which they are made, and its own keys.

`RULES` lists every tensor that is written, `DROPPED` every one that is known and left out, with the reason; a source
name that neither table knows is an error. `KEYS` is the table of the gemma3n.* keys.

Source: conversion/gemma.py (Gemma3NModel and its bases) and src/models/gemma3n.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, TENSOR_NAMES, Keys

from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, Value
from gguf3n.gemma3n.config import SLIDING, Config
from gguf3n.gemma3n.mapping import Missing, Rule, Storage, Table

ARCH = MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA3N]

U32, F32, BOOL, ARRAY, I32 = (
    GGUFValueType.UINT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.BOOL,
    GGUFValueType.ARRAY,
    GGUFValueType.INT32,
)


def _name(target: MODEL_TENSOR) -> str:
    """The GGUF name of a tensor, with {bid} for its layer."""
    return f"{TENSOR_NAMES[target]}.weight"


T, F, H, Q = MODEL_TENSOR, Storage.FLOAT32, Storage.HALF, Storage.QUANTIZABLE
KV = Missing.ZEROS_IF_KV_SHARED

EMBED_TOKENS = "embed_tokens.weight"
EMBED_TOKENS_PER_LAYER = "embed_tokens_per_layer.weight"
PER_LAYER_MODEL_PROJECTION = "per_layer_model_projection.weight"
"""Names in a checkpoint: the two tables, of which the second has something for each layer, as the matrix has."""
TOKEN_EMBD, PER_LAYER_TOKEN_EMBD = _name(T.TOKEN_EMBD), _name(T.PER_LAYER_TOKEN_EMBD)

RULES: tuple[Rule, ...] = (
    Rule(EMBED_TOKENS, TOKEN_EMBD, ("vocab", "embd"), Q, pad_rows=True),
    Rule(EMBED_TOKENS_PER_LAYER, PER_LAYER_TOKEN_EMBD, ("vocab", "ple_all"), Q, pad_rows=True),
    Rule(PER_LAYER_MODEL_PROJECTION, _name(T.PER_LAYER_MODEL_PROJ), ("ple_all", "embd"), H),
    Rule("per_layer_projection_norm.weight", _name(T.PER_LAYER_PROJ_NORM), ("ple",), F),
    Rule("altup_projections.{k}.weight", _name(T.ALTUP_PROJ), ("altup_extra", "embd", "embd"), H),
    Rule("altup_unembed_projections.{k}.weight", _name(T.ALTUP_UNEMBD_PROJ), ("altup_extra", "embd", "embd"), H),
    Rule("norm.weight", _name(T.OUTPUT_NORM), ("embd",), F),
    Rule("layers.{bid}.input_layernorm.weight", _name(T.ATTN_NORM), ("embd",), F),
    Rule("layers.{bid}.self_attn.q_proj.weight", _name(T.ATTN_Q), ("heads", "embd"), Q),
    Rule("layers.{bid}.self_attn.q_norm.weight", _name(T.ATTN_Q_NORM), ("head",), F),
    Rule("layers.{bid}.self_attn.k_proj.weight", _name(T.ATTN_K), ("kv_heads", "embd"), Q, KV),
    Rule("layers.{bid}.self_attn.k_norm.weight", _name(T.ATTN_K_NORM), ("head",), F, KV),
    Rule("layers.{bid}.self_attn.v_proj.weight", _name(T.ATTN_V), ("kv_heads", "embd"), Q, KV),
    Rule("layers.{bid}.self_attn.o_proj.weight", _name(T.ATTN_OUT), ("embd", "heads"), Q),
    Rule("layers.{bid}.post_attention_layernorm.weight", _name(T.ATTN_POST_NORM), ("embd",), F),
    Rule("layers.{bid}.laurel.linear_left.weight", _name(T.LAUREL_L), ("laurel", "embd"), H),
    Rule("layers.{bid}.laurel.linear_right.weight", _name(T.LAUREL_R), ("embd", "laurel"), H),
    Rule("layers.{bid}.laurel.post_laurel_norm.weight", _name(T.LAUREL_POST_NORM), ("embd",), F),
    Rule("layers.{bid}.pre_feedforward_layernorm.weight", _name(T.FFN_PRE_NORM), ("embd",), F),
    Rule("layers.{bid}.mlp.gate_proj.weight", _name(T.FFN_GATE), ("ffn", "embd"), Q),
    Rule("layers.{bid}.mlp.up_proj.weight", _name(T.FFN_UP), ("ffn", "embd"), Q),
    Rule("layers.{bid}.mlp.down_proj.weight", _name(T.FFN_DOWN), ("embd", "ffn"), Q),
    Rule("layers.{bid}.post_feedforward_layernorm.weight", _name(T.FFN_POST_NORM), ("embd",), F),
    Rule("layers.{bid}.altup.modality_router.weight", _name(T.ALTUP_ROUTER), ("altup", "embd"), H),
    Rule("layers.{bid}.altup.router_norm.weight", _name(T.ALTUP_ROUTER_NORM), ("embd",), F),
    Rule("layers.{bid}.altup.prediction_coefs.weight", _name(T.ALTUP_PREDICT_COEF), ("altup_squared", "altup"), F),
    Rule("layers.{bid}.altup.correction_coefs.weight", _name(T.ALTUP_CORRECT_COEF), ("altup", "altup"), F),
    Rule("layers.{bid}.altup.correct_output_scale", _name(T.ALTUP_CORRECT_SCALE), ("embd",), F),
    Rule("layers.{bid}.per_layer_input_gate.weight", _name(T.PER_LAYER_INP_GATE), ("ple", "embd"), Q),
    Rule("layers.{bid}.per_layer_projection.weight", _name(T.PER_LAYER_PROJ), ("embd", "ple"), Q),
    Rule("layers.{bid}.post_per_layer_input_norm.weight", _name(T.PER_LAYER_POST_NORM), ("embd",), F),
)

PER_LAYER_INP_GATE = _name(T.PER_LAYER_INP_GATE)

DROPPED: tuple[tuple[str, str], ...] = (
    (r"vision_tower\..+", "vision: belongs in the mmproj file (--mmproj)"),
    (r"audio_tower\..+", "audio: belongs in the mmproj file (--mmproj)"),
    (r"embed_vision\..+", "vision embedder: belongs in the mmproj file (--mmproj)"),
    (r"embed_audio\..+", "audio embedder: belongs in the mmproj file (--mmproj)"),
    (r"lm_head\.weight", "the output matrix is the embedding table"),
    (r"(layers\.\d+\.self_attn\.)?rotary_emb\.(\w+_)?inv_freq", "computed from the rope base"),
)


def dimensions(config: Config, bid: int | None) -> dict[str, int]:
    """The words that shapes in RULES are made of."""
    ple = config.hidden_size_per_layer_input
    altup = config.altup_num_inputs
    return {
        "vocab": config.vocab_size,
        "embd": config.hidden_size,
        "ple": ple,
        "ple_all": ple * config.num_hidden_layers,
        "heads": config.num_attention_heads * config.head_dim,
        "kv_heads": config.num_key_value_heads * config.head_dim,
        "head": config.head_dim,
        "laurel": config.laurel_rank,
        "altup": altup,
        "altup_extra": altup - 1,
        "altup_squared": altup * altup,
        "ffn": 0 if bid is None else config.intermediate_size[bid],
    }


def is_evaluated(rule: Rule, bid: int | None, n_kv_layers: int) -> bool:
    """False for keys and values of layers from n_kv_layers on: loaded by llama.cpp, used by nobody."""
    return rule.missing is Missing.ERROR or bid is None or bid < n_kv_layers


def written_order(n_layers: int) -> Iterator[tuple[Rule, int | None]]:
    """Every tensor's rule and layer, in the order of the file: the model's own tensors, then layer by layer."""
    for rule in RULES:
        if not rule.is_repeated:
            yield rule, None
    for bid in range(n_layers):
        for rule in RULES:
            if rule.is_repeated:
                yield rule, bid


def table(config: Config) -> Table:
    """What the mapping needs to know of a text model of some size."""
    return Table(
        model=f"a model of {config.num_hidden_layers} layers",
        order=tuple(written_order(config.num_hidden_layers)),
        dropped=DROPPED,
        n_stacked=config.altup_num_inputs - 1,
        sizes=lambda bid: dimensions(config, bid),
        evaluated=lambda rule, bid: is_evaluated(rule, bid, config.n_kv_layers),
        least_rows=config.vocab_size_per_layer_input,
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
