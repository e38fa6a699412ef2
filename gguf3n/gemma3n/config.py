"""config.json -> one frozen, validated Config.

`FIELDS` is the whole truth about what is read: the key, what values it may have. A missing key is an error, never a
guess, except where the table names what transformers itself takes then.

Source: Gemma3nTextConfig in transformers (models/gemma3n/configuration_gemma3n.py), versions 4.53 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf3n.errors import ConfigError, SourceError, shown
from gguf3n.formats.small_file import is_there, read_checkpoint_json

MODEL_TYPES = ("gemma3n", "gemma3n_text")

SLIDING = "sliding_attention"
FULL = "full_attention"

N_KV_LAYERS = 20
"""Layers with keys and values of their own, as llama.cpp has it built in."""

LLAMA_CPP_FIXED: tuple[tuple[str, int], ...] = (
    ("n_kv_layers", N_KV_LAYERS),
    ("n_sparse_layers", 10),
    ("altup_num_inputs", 4),
    ("altup_active_idx", 0),
    ("laurel_rank", 64),
    ("hidden_size_per_layer_input", 256),
)
"""Sizes that llama.cpp's gemma3n has built in, whatever the metadata say. Source: src/models/gemma3n.cpp."""

MAX_INT = 2**31 - 1
MAX_FLOAT = 3.4e38
"""What the int32 and float32 of GGUF keys hold. Sizes are held against the tensors (see mapping.py)."""
MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS of llama.cpp."""
MAX_ALTUP_INPUTS = 64
"""Every published size has 4, which llama.cpp has built in; each is a matrix of its own."""


@dataclass(frozen=True)
class Config:
    """The text model of a Gemma 3n, as its config.json describes it; names as there, per-layer values as tuples."""

    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: tuple[int, ...]
    laurel_rank: int
    altup_num_inputs: int
    altup_active_idx: int
    num_kv_shared_layers: int
    sliding_window: int
    max_position_embeddings: int
    rms_norm_eps: float
    final_logit_softcapping: float
    rope_theta: float
    rope_local_base_freq: float
    layer_types: tuple[str, ...]
    activation_sparsity_pattern: tuple[float, ...]

    @property
    def n_kv_layers(self) -> int:
        """Layers with keys and values of their own; the rest reuse those of earlier layers."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    @property
    def n_sparse_layers(self) -> int:
        return sum(share > 0 for share in self.activation_sparsity_pattern)

    def is_kv_shared(self, bid: int) -> bool:
        return bid >= self.n_kv_layers


@dataclass(frozen=True)
class Field:
    """How a key of config.json becomes a field of Config."""

    name: str
    parse: Callable[[Any, dict[str, Any]], Any]
    expected: str


def _positive_int(value: Any, _: dict[str, Any]) -> int:
    if type(value) is not int or not 1 <= value <= MAX_INT:
        raise ValueError
    return value


def _count(value: Any, _: dict[str, Any]) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INT:
        raise ValueError
    return value


def _n_layers(value: Any, config: dict[str, Any]) -> int:
    if _positive_int(value, config) > MAX_LAYERS:
        raise ValueError
    return int(value)


def _n_altup_inputs(value: Any, config: dict[str, Any]) -> int:
    if _positive_int(value, config) > MAX_ALTUP_INPUTS:
        raise ValueError
    return int(value)


def _positive_float(value: Any, _: dict[str, Any]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_FLOAT:
        raise ValueError
    return float(value)


def _ffn_widths(value: Any, config: dict[str, Any]) -> tuple[int, ...]:
    widths = value if isinstance(value, list) else [value] * config["num_hidden_layers"]
    if len(widths) != config["num_hidden_layers"]:
        raise ValueError
    return tuple(_positive_int(width, config) for width in widths)


def _layer_types(value: Any, config: dict[str, Any]) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) != config["num_hidden_layers"]:
        raise ValueError
    if any(kind not in (SLIDING, FULL) for kind in value):
        raise ValueError
    return tuple(value)


def _sparsity(value: Any, config: dict[str, Any]) -> tuple[float, ...]:
    n_layers = config["num_hidden_layers"]
    if value is None:  # Gemma3nTextConfig: ten sparse layers, none in a model of ten layers or fewer
        n_sparse = 10 if n_layers > 10 else 0
        value = [0.95] * n_sparse + [0.0] * (n_layers - n_sparse)
    shares = value if isinstance(value, list) else [value] * n_layers
    if len(shares) != n_layers:
        raise ValueError
    if any(isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1 for share in shares):
        raise ValueError
    return tuple(float(share) for share in shares)


FIELDS: tuple[Field, ...] = (
    Field("num_hidden_layers", _n_layers, f"a number of layers, at most {MAX_LAYERS}"),
    Field("vocab_size", _positive_int, "a number of tokens"),
    Field("vocab_size_per_layer_input", _positive_int, "a number of tokens"),
    Field("hidden_size", _positive_int, "a width"),
    Field("hidden_size_per_layer_input", _positive_int, "a width"),
    Field("num_attention_heads", _positive_int, "a number of heads"),
    Field("num_key_value_heads", _positive_int, "a number of heads"),
    Field("head_dim", _positive_int, "a width"),
    Field("intermediate_size", _ffn_widths, "a width, or a list with one for each layer"),
    Field("laurel_rank", _positive_int, "a rank"),
    Field("altup_num_inputs", _n_altup_inputs, f"a number of inputs, at most {MAX_ALTUP_INPUTS}"),
    Field("altup_active_idx", _count, "the index of an AltUp input"),
    Field("num_kv_shared_layers", _count, "a number of layers"),
    Field("sliding_window", _positive_int, "a number of tokens"),
    Field("max_position_embeddings", _positive_int, "a number of tokens"),
    Field("rms_norm_eps", _positive_float, "a positive number"),
    Field("final_logit_softcapping", _positive_float, "a positive number"),
    Field("rope_theta", _positive_float, "a positive number"),
    Field("rope_local_base_freq", _positive_float, "a positive number"),
    Field("layer_types", _layer_types, f"a list with {SLIDING!r} or {FULL!r} for each layer"),
    Field("activation_sparsity_pattern", _sparsity, "null, a share, or a list with one from 0 to 1 for each layer"),
)


def load_config(directory: Path) -> dict[str, Any]:
    """The content of `config.json`. Raises: SourceError where there is none; ConfigError."""
    path = directory / "config.json"
    if not is_there(path, ConfigError):
        raise SourceError(f"{path}: missing", expected="the directory of a Hugging Face checkpoint of Gemma 3n")
    return read_checkpoint_json(path)


def parse_config(raw: dict[str, Any], path: Path) -> Config:
    """Check the content of a config.json, in any of the published layouts.

    Args:
        path: named in errors.

    Raises: ConfigError for another model or a value that can't be.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{path}: not a Gemma 3n",
            expected=f"model_type {' or '.join(MODEL_TYPES)}",
            found=f"model_type {shown(model_type)}",
        )
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ConfigError(
            f"{path}: the checkpoint is quantized already ({method})",
            expected="weights in BF16, F16 or F32",
            found="quantization_config",
            fix="convert the original checkpoint, or dequantize and save this one",
        )
    text = raw.get("text_config", raw)
    if not isinstance(text, dict):
        raise ConfigError(f"{path}: text_config is not an object", found=type(text).__name__)
    if any(part.get("tie_word_embeddings") is False for part in (text, raw)):
        raise ConfigError(
            f"{path}: tie_word_embeddings is false",
            expected="the embedding table as output matrix, as in every Gemma 3n",
            fix="llama.cpp has no separate output matrix for this model; tie the embeddings and save again",
        )
    values = {**text, **_rope_bases(text, path)}
    parsed: dict[str, Any] = {}
    for field in FIELDS:
        if field.name not in values:
            raise ConfigError(f"{path}: {field.name} is missing", expected=field.expected)
        try:
            parsed[field.name] = field.parse(values[field.name], parsed)
        except ValueError:
            raise ConfigError(
                f"{path}: {field.name} is impossible",
                expected=field.expected,
                found=shown(values[field.name]),
            ) from None
    config = Config(**parsed)
    _check_together(config, path)
    return config


def _rope_bases(text: dict[str, Any], path: Path) -> dict[str, Any]:
    """The two rope bases, from `rope_parameters` (transformers 5) or the keys of their own (4.53)."""
    scaling: Any = text.get("rope_scaling")
    bases: dict[str, Any] = {}
    parameters = text.get("rope_parameters")
    if isinstance(parameters, dict):
        for key, kind in (("rope_theta", FULL), ("rope_local_base_freq", SLIDING)):
            entry = parameters.get(kind)
            if isinstance(entry, dict) and "rope_theta" in entry:
                bases[key] = entry["rope_theta"]
                if entry.get("rope_type", "default") != "default":
                    scaling = entry
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) not in (None, "default"):
        raise ConfigError(
            f"{path}: rope scaling is not supported for Gemma 3n",
            expected="none, as in every published Gemma 3n",
            found=shown(scaling),
        )
    return bases


def _check_together(config: Config, path: Path) -> None:
    for sane, what in (
        (config.num_kv_shared_layers < config.num_hidden_layers, "num_kv_shared_layers < num_hidden_layers"),
        (config.altup_active_idx < config.altup_num_inputs, "altup_active_idx < altup_num_inputs"),
        (config.num_attention_heads % config.num_key_value_heads == 0, "heads a multiple of key-value heads"),
        (config.vocab_size_per_layer_input <= config.vocab_size, "vocab_size_per_layer_input <= vocab_size"),
    ):
        if not sane:
            raise ConfigError(f"{path}: values that contradict each other", expected=what)
