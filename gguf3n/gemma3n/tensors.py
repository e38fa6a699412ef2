"""The tensors of Gemma 3n: source name -> GGUF name.

`RULES` lists every tensor that is written, `DROPPED` every one that is known and left out, with the reason. A source
name that neither table knows is an error. An output tensor is a concatenation of row ranges: of source tensors, or of
zeros (padding, synthesized weights), so the pipeline needs to know nothing about stacking or padding.

Source: conversion/gemma.py (Gemma3NModel) and src/models/gemma3n.cpp of llama.cpp.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gguf.constants import MODEL_TENSOR, TENSOR_NAMES

from gguf3n.errors import MappingError
from gguf3n.formats.source import FLOAT_DTYPES, SourceTensor
from gguf3n.gemma3n.config import Config


class Storage(enum.Enum):
    """What a recipe may do with a tensor."""

    FLOAT32 = "stays F32: norms, scales and AltUp coefficients are small and sensitive"
    HALF = "stays 16-bit: llama.cpp never quantizes AltUp, LAuReL and per-layer projection matrices"
    QUANTIZABLE = "takes the recipe's type"


class Missing(enum.Enum):
    """What a source without the tensor means."""

    ERROR = "an error"
    ZEROS_IF_KV_SHARED = "zeros in KV-shared layers, where llama.cpp loads but never evaluates it"


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Shapes: of the written tensor, in numpy order, as names of Config fields (see `dimensions`).
    `{bid}` stands for a layer, `{k}` for the matrices of a stack, which become the first dimension.
    """

    source: str
    target: MODEL_TENSOR
    shape: tuple[str, ...]
    storage: Storage
    missing: Missing = Missing.ERROR
    pad_rows: bool = False


T, F, H, Q = MODEL_TENSOR, Storage.FLOAT32, Storage.HALF, Storage.QUANTIZABLE
KV = Missing.ZEROS_IF_KV_SHARED

RULES: tuple[Rule, ...] = (
    Rule("embed_tokens.weight", T.TOKEN_EMBD, ("vocab", "embd"), Q, pad_rows=True),
    Rule("embed_tokens_per_layer.weight", T.PER_LAYER_TOKEN_EMBD, ("vocab", "ple_all"), Q, pad_rows=True),
    Rule("per_layer_model_projection.weight", T.PER_LAYER_MODEL_PROJ, ("ple_all", "embd"), H),
    Rule("per_layer_projection_norm.weight", T.PER_LAYER_PROJ_NORM, ("ple",), F),
    Rule("altup_projections.{k}.weight", T.ALTUP_PROJ, ("altup_extra", "embd", "embd"), H),
    Rule("altup_unembed_projections.{k}.weight", T.ALTUP_UNEMBD_PROJ, ("altup_extra", "embd", "embd"), H),
    Rule("norm.weight", T.OUTPUT_NORM, ("embd",), F),
    Rule("layers.{bid}.input_layernorm.weight", T.ATTN_NORM, ("embd",), F),
    Rule("layers.{bid}.self_attn.q_proj.weight", T.ATTN_Q, ("heads", "embd"), Q),
    Rule("layers.{bid}.self_attn.q_norm.weight", T.ATTN_Q_NORM, ("head",), F),
    Rule("layers.{bid}.self_attn.k_proj.weight", T.ATTN_K, ("kv_heads", "embd"), Q, KV),
    Rule("layers.{bid}.self_attn.k_norm.weight", T.ATTN_K_NORM, ("head",), F, KV),
    Rule("layers.{bid}.self_attn.v_proj.weight", T.ATTN_V, ("kv_heads", "embd"), Q, KV),
    Rule("layers.{bid}.self_attn.o_proj.weight", T.ATTN_OUT, ("embd", "heads"), Q),
    Rule("layers.{bid}.post_attention_layernorm.weight", T.ATTN_POST_NORM, ("embd",), F),
    Rule("layers.{bid}.laurel.linear_left.weight", T.LAUREL_L, ("laurel", "embd"), H),
    Rule("layers.{bid}.laurel.linear_right.weight", T.LAUREL_R, ("embd", "laurel"), H),
    Rule("layers.{bid}.laurel.post_laurel_norm.weight", T.LAUREL_POST_NORM, ("embd",), F),
    Rule("layers.{bid}.pre_feedforward_layernorm.weight", T.FFN_PRE_NORM, ("embd",), F),
    Rule("layers.{bid}.mlp.gate_proj.weight", T.FFN_GATE, ("ffn", "embd"), Q),
    Rule("layers.{bid}.mlp.up_proj.weight", T.FFN_UP, ("ffn", "embd"), Q),
    Rule("layers.{bid}.mlp.down_proj.weight", T.FFN_DOWN, ("embd", "ffn"), Q),
    Rule("layers.{bid}.post_feedforward_layernorm.weight", T.FFN_POST_NORM, ("embd",), F),
    Rule("layers.{bid}.altup.modality_router.weight", T.ALTUP_ROUTER, ("altup", "embd"), H),
    Rule("layers.{bid}.altup.router_norm.weight", T.ALTUP_ROUTER_NORM, ("embd",), F),
    Rule("layers.{bid}.altup.prediction_coefs.weight", T.ALTUP_PREDICT_COEF, ("altup_squared", "altup"), F),
    Rule("layers.{bid}.altup.correction_coefs.weight", T.ALTUP_CORRECT_COEF, ("altup", "altup"), F),
    Rule("layers.{bid}.altup.correct_output_scale", T.ALTUP_CORRECT_SCALE, ("embd",), F),
    Rule("layers.{bid}.per_layer_input_gate.weight", T.PER_LAYER_INP_GATE, ("ple", "embd"), Q),
    Rule("layers.{bid}.per_layer_projection.weight", T.PER_LAYER_PROJ, ("embd", "ple"), Q),
    Rule("layers.{bid}.post_per_layer_input_norm.weight", T.PER_LAYER_POST_NORM, ("embd",), F),
)

DROPPED: tuple[tuple[str, str], ...] = (
    (r"vision_tower\..+", "vision: belongs in a separate mmproj file"),
    (r"audio_tower\..+", "audio: belongs in a separate mmproj file"),
    (r"embed_vision\..+", "vision embedder: belongs in a separate mmproj file"),
    (r"embed_audio\..+", "audio embedder: belongs in a separate mmproj file"),
    (r"lm_head\.weight", "the output matrix is the embedding table"),
    (r"(layers\.\d+\.self_attn\.)?rotary_emb\.(\w+_)?inv_freq", "computed from the rope base"),
)

PREFIX = r"(?:base_model\.model\.)?(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?"
"""Published, early multimodal, text-only, and the same with PEFT's prefix."""

FOREIGN: tuple[tuple[str, str, str], ...] = (
    (r".*\.lora_[AB]\..*", "LoRA matrices, not a merged model", "merge the adapter into its base model and save that"),
    (r".*\.base_layer\.weight", "a PEFT model with its adapters unmerged", "save model.merge_and_unload() instead"),
    (
        r".*\.(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\..*|SCB|weight_format|weight_scale(_inv)?)",
        "a checkpoint that is quantized already",
        "convert the original checkpoint, or dequantize and save this one",
    ),
    (r".*_flat_param.*", "unconsolidated FSDP training shards", "consolidate first: accelerate merge-weights SRC DIR"),
)
"""Names that say what the checkpoint is instead: pattern, what it is, what to do."""


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


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows of an output tensor: all rows of a source tensor, or zeros where that is None."""

    source: SourceTensor | None
    n_rows: int


@dataclass(frozen=True)
class MappedTensor:
    """An output tensor and where its rows come from, in order.

    Shapes: numpy order; rows are those of all leading dimensions together, a vector is one row.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    bid: int | None
    rows: tuple[Rows, ...]
    evaluated: bool = True
    """False for keys and values of KV-shared layers: loaded by llama.cpp, used by nobody."""

    @property
    def missing(self) -> bool:
        """Whether the source has nothing of it."""
        return not self.source_dtypes

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def n_per_row(self) -> int:
        return self.shape[-1]

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def source_dtypes(self) -> set[str]:
        """The dtypes of the source tensors; empty where all rows are zeros."""
        return {rows.source.dtype for rows in self.rows if rows.source is not None}


@dataclass(frozen=True)
class TensorMap:
    """The whole mapping of a checkpoint."""

    tensors: tuple[MappedTensor, ...]
    dropped: tuple[tuple[str, int], ...]
    """Reason and number of source tensors, for each reason."""

    @property
    def synthesized(self) -> list[str]:
        """Names of the tensors that the source lacks and that are written as zeros."""
        return [tensor.name for tensor in self.tensors if tensor.missing]

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)


def map_tensors(config: Config, table: Mapping[str, SourceTensor], origin: str) -> TensorMap:
    """Match every source tensor with exactly one rule and make every output tensor.

    Args:
        table: the checkpoint's tensors by their names.
        origin: the checkpoint, named in errors.

    Raises: MappingError for an unknown or missing tensor, a wrong shape or dtype.
    """
    found, dropped = _sort_names(config, table, origin)
    tensors = [_map_one(rule, bid, config, found, origin) for rule, bid in written_order(config.num_hidden_layers)]
    return TensorMap(tuple(tensors), dropped)


def written_order(n_layers: int) -> Iterator[tuple[Rule, int | None]]:
    """Every output tensor's rule and layer, in the order of the file: the model's own tensors, then layer by layer."""
    for rule in RULES:
        if "{bid}" not in rule.source:
            yield rule, None
    for bid in range(n_layers):
        for rule in RULES:
            if "{bid}" in rule.source:
                yield rule, bid


def target_name(rule: Rule, bid: int | None) -> str:
    """The GGUF name of an output tensor."""
    return f"{TENSOR_NAMES[rule.target].format(bid=bid)}.weight"


def _sort_names(
    config: Config, table: Mapping[str, SourceTensor], origin: str
) -> tuple[dict[str, SourceTensor], tuple[tuple[str, int], ...]]:
    """Source tensors by their name in RULES, and how many were dropped for each reason."""
    wanted = {
        name for rule, bid in written_order(config.num_hidden_layers) for name in _source_names(rule, bid, config)
    }
    strip = re.compile(PREFIX)
    found: dict[str, SourceTensor] = {}
    reasons: dict[str, int] = {}
    unknown: list[str] = []
    for name, tensor in table.items():
        match = strip.match(name)
        bare = name[match.end() :] if match else name
        reason = next((why for pattern, why in DROPPED if re.fullmatch(pattern, bare)), None)
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
        elif bare not in wanted:
            unknown.append(name)
        elif bare in found:
            raise MappingError(
                f"{origin}: tensors {found[bare].name!r} and {name!r} are the same weight",
                expected="one of them",
                fix="remove the files that belong to another save of the model",
            )
        else:
            found[bare] = tensor
    if unknown:
        raise _unknown(unknown, origin)
    return found, tuple(reasons.items())


def _unknown(names: list[str], origin: str) -> MappingError:
    for pattern, what, fix in FOREIGN:
        for name in names:
            if re.fullmatch(pattern, name):
                return MappingError(f"{origin}: {what}", expected="the tensors of a Gemma 3n", found=name, fix=fix)
    shown = "\n".join(f"              {name}" for name in sorted(names)[:20])
    more = f"\n              and {len(names) - 20} more" if len(names) > 20 else ""
    return MappingError(
        f"{origin}: {len(names)} tensor(s) that no rule knows\n{shown}{more}",
        expected="the tensors of a Gemma 3n with as many layers as config.json says",
        fix="check that config.json and the safetensors files belong together",
    )


def _source_names(rule: Rule, bid: int | None, config: Config) -> list[str]:
    """The source tensors of one output tensor: one, or the matrices of a stack."""
    n_stacked = config.altup_num_inputs - 1 if "{k}" in rule.source else 1
    return [rule.source.format(bid=bid, k=k) for k in range(n_stacked)]


def _map_one(
    rule: Rule, bid: int | None, config: Config, found: Mapping[str, SourceTensor], origin: str
) -> MappedTensor:
    sizes = dimensions(config, bid)
    shape = tuple(sizes[word] for word in rule.shape)
    name = target_name(rule, bid)
    n_rows = math.prod(shape[:-1])
    names = _source_names(rule, bid, config)
    missing = [source for source in names if source not in found]
    evaluated = not (rule.missing is Missing.ZEROS_IF_KV_SHARED and bid is not None and config.is_kv_shared(bid))
    if missing:
        if evaluated:
            raise MappingError(
                f"{origin}: tensor {missing[0]!r} is missing",
                expected=f"it, for {name}, in a model of {config.num_hidden_layers} layers",
                fix="check that config.json and the safetensors files belong together",
            )
        return MappedTensor(name, shape, rule.storage, bid, (Rows(None, n_rows),), evaluated)
    rows: list[Rows] = []
    expected = shape[1:] if "{k}" in rule.source else shape
    for source in names:
        tensor = found[source]
        if tensor.dtype not in FLOAT_DTYPES:
            raise MappingError(
                f"{tensor.path}: tensor {tensor.name!r} has a dtype that weights can't have",
                expected=", ".join(FLOAT_DTYPES),
                found=tensor.dtype,
                fix="save the checkpoint in bfloat16",
            )
        padding = _padding(rule, tensor, expected, config)
        if padding is None:
            raise MappingError(
                f"{tensor.path}: tensor {tensor.name!r} has the wrong shape",
                expected=f"{list(expected)} as config.json says",
                found=str(list(tensor.shape)),
                fix="check that config.json and the safetensors files belong together",
            )
        rows.append(Rows(tensor, math.prod(tensor.shape[:-1])))
        if padding:
            rows.append(Rows(None, padding))
    return MappedTensor(name, shape, rule.storage, bid, tuple(rows), evaluated)


def _padding(rule: Rule, tensor: SourceTensor, expected: tuple[int, ...], config: Config) -> int | None:
    """Zero rows to append so that the shape fits; None where it can't.

    Why: the per-layer table has a row for each text token only, and llama.cpp wants as many rows in it as tokens.
    """
    if tensor.shape == expected:
        return 0
    if rule.pad_rows and len(tensor.shape) == 2 and tensor.shape[1] == expected[1]:
        n_rows = tensor.shape[0]
        if config.vocab_size_per_layer_input <= n_rows < expected[0]:
            return expected[0] - n_rows
    return None
