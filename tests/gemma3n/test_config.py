"""config.json: every layout that is published, every value that can't be."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from gguf3n.errors import ConfigError, SourceError
from gguf3n.gemma3n.config import FIELDS, MAX_LAYERS, Config, load_config, parse_config
from gguf3n.gemma3n.published import PUBLISHED
from tests import micro
from workshop import checkpoints

PATH = Path("some/config.json")
Raw = dict[str, Any]


def published(size: str) -> Raw:
    return micro.read_json(checkpoints.CONFIGS / f"gemma-3n-{size}.json")


def parse(raw: Raw) -> Config:
    return parse_config(raw, PATH)


@pytest.mark.parametrize(
    ("size", "n_layers", "n_shared", "ffn"), [("e2b", 30, 10, 8192), ("e4b", 35, 15, 16384)], ids=["E2B", "E4B"]
)
def test_the_published_sizes(size: str, n_layers: int, n_shared: int, ffn: int) -> None:
    config = parse(published(size))
    assert config == Config(
        vocab_size=262400,
        vocab_size_per_layer_input=262144,
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
        num_kv_shared_layers=n_shared,
        sliding_window=512,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        final_logit_softcapping=30.0,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        layer_types=tuple("full_attention" if i % 5 == 4 else "sliding_attention" for i in range(n_layers)),
        activation_sparsity_pattern=tuple(0.95 if i < 10 else 0.0 for i in range(n_layers)),
    )
    assert (config.n_kv_layers, config.n_sparse_layers) == (20, 10)
    assert [config.is_kv_shared(bid) for bid in (0, 19, 20, n_layers - 1)] == [False, False, True, True]


@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_the_sizes_built_in_are_those_of_the_files(size: str) -> None:
    assert parse(published(size)) == PUBLISHED[size.upper()]


def test_every_field_of_config_is_in_the_table() -> None:
    assert sorted(field.name for field in FIELDS) == sorted(field.name for field in fields(Config))


def transformers_5(raw: Raw) -> Raw:
    text = raw["text_config"]
    text["rope_parameters"] = {
        "full_attention": {"rope_theta": text.pop("rope_theta"), "rope_type": "default"},
        "sliding_attention": {"rope_theta": text.pop("rope_local_base_freq"), "rope_type": "default"},
    }
    del text["rope_scaling"]
    return raw


def text(change: Raw) -> Callable[[Raw], Raw]:
    """The text config with other values."""

    def apply(raw: Raw) -> Raw:
        raw["text_config"] |= change
        return raw

    return apply


def text_only(raw: Raw) -> Raw:
    return {**raw["text_config"], "architectures": ["Gemma3nForCausalLM"]}


SAME: dict[str, Callable[[Raw], Raw]] = {
    "as published": lambda raw: raw,
    "text-only": text_only,
    "transformers 5": transformers_5,
    "transformers 5, text-only": lambda raw: text_only(transformers_5(raw)),
    "one FFN width": text({"intermediate_size": 8192}),
    "sparsity by default": text({"activation_sparsity_pattern": None}),
    "tied, said so": text({"tie_word_embeddings": True}),
    "no rope scaling": text({"rope_scaling": {"rope_type": "default"}}),
    "whole numbers for fractions": text({"rope_theta": 1000000, "final_logit_softcapping": 30}),
    "empty quantization_config": lambda raw: raw | {"quantization_config": {}},
    "unknown keys": lambda raw: text({"something_new": [1]})(raw) | {"else": None},
    "without the other modalities": lambda raw: {k: v for k, v in raw.items() if k in ("model_type", "text_config")},
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_every_spelling_gives_the_same_config(change: Callable[[Raw], Raw]) -> None:
    assert parse(change(published("e2b"))) == parse(published("e2b"))


def test_what_is_read_for_every_layer() -> None:
    widths = [8192, 16384] * 15
    config = parse(text({"intermediate_size": widths, "activation_sparsity_pattern": 0.5})(published("e2b")))
    assert config.intermediate_size == tuple(widths)
    assert config.activation_sparsity_pattern == (0.5,) * 30
    assert config.n_sparse_layers == 30


@pytest.mark.parametrize(("n_layers", "n_sparse"), [(11, 10), (10, 0), (3, 0)])
def test_sparsity_by_default_as_in_transformers(n_layers: int, n_sparse: int) -> None:
    raw = micro.config(
        num_hidden_layers=n_layers,
        intermediate_size=64,
        layer_types=["full_attention"] * n_layers,
        activation_sparsity_pattern=None,
    )
    config = parse(raw)
    assert config.activation_sparsity_pattern == (0.95,) * n_sparse + (0.0,) * (n_layers - n_sparse)


@pytest.mark.parametrize("name", [field.name for field in FIELDS])
@pytest.mark.parametrize("layout", [lambda raw: raw, text_only], ids=["published", "text-only"])
def test_a_missing_key(name: str, layout: Callable[[Raw], Raw]) -> None:
    raw = published("e2b")
    del raw["text_config"][name]
    with pytest.raises(ConfigError) as caught:
        parse(layout(raw))
    assert caught.value.exit_code == 4
    assert caught.value.what == f"{PATH}: {name} is missing"
    assert caught.value.expected


INTEGERS = [
    "num_hidden_layers", "vocab_size", "vocab_size_per_layer_input", "hidden_size", "hidden_size_per_layer_input",
    "num_attention_heads", "num_key_value_heads", "head_dim", "laurel_rank", "altup_num_inputs", "sliding_window",
    "max_position_embeddings",
]  # fmt: skip
COUNTS = ["altup_active_idx", "num_kv_shared_layers"]
FRACTIONS = ["rms_norm_eps", "final_logit_softcapping", "rope_theta", "rope_local_base_freq"]
NO_NUMBERS: list[Any] = ["8", True, None, [8], {}, float("nan")]

IMPOSSIBLE: list[tuple[str, Any]] = [
    *((name, value) for name in INTEGERS for value in (*NO_NUMBERS, 0, -1, 8.0, 2**31, 10**30)),
    *((name, value) for name in COUNTS for value in (*NO_NUMBERS, -1, 1.5, 2**31)),
    *((name, value) for name in FRACTIONS for value in (*NO_NUMBERS, 0, -1.0, float("inf"), 1e39, 10**400)),
    ("num_hidden_layers", MAX_LAYERS + 1),
    ("num_hidden_layers", 10**9),
    *(("intermediate_size", value) for value in ("8192", None, 0, 1.5, [], [8192] * 29, [8192] * 29 + [0], [[1]] * 30)),
    *(("layer_types", value) for value in (None, 5, "full_attention", [], ["full_attention"] * 29)),
    *(("layer_types", ["full_attention"] * 29 + [value]) for value in ("chunked_attention", None, [], {})),
    *(("activation_sparsity_pattern", value) for value in ("0.95", 1, 1.5, -0.1, True, [], [0.95] * 29, {})),
    *(("activation_sparsity_pattern", [0.95] * 29 + [value]) for value in (1.0, -1, None, "0", float("nan"))),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE, ids=lambda value: str(value)[:24])
def test_an_impossible_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text({name: value})(published("e2b")))
    assert caught.value.what == f"{PATH}: {name} is impossible"
    assert caught.value.expected
    assert caught.value.found == json.dumps(value)[:80]


UNUSABLE: dict[str, tuple[Callable[[Raw], Raw], tuple[str, ...]]] = {
    # change, what the message must say
    "Gemma 3": (lambda raw: raw | {"model_type": "gemma3"}, ("not a Gemma 3n", "gemma3n or gemma3n_text", "gemma3")),
    "Gemma 3 text": (lambda raw: raw | {"model_type": "gemma3_text"}, ("not a Gemma 3n", "gemma3_text")),
    "Llama": (lambda _: {"model_type": "llama", "hidden_size": 4096}, ("not a Gemma 3n", "llama")),
    "vision tower alone": (lambda raw: raw["vision_config"], ("not a Gemma 3n", "gemma3n_vision")),
    "no model type": (lambda _: {}, ("not a Gemma 3n", "null")),
    "a model type of another type": (lambda raw: raw | {"model_type": ["gemma3n"]}, ("not a Gemma 3n",)),
    "GPTQ": (
        lambda raw: raw | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ("quantized already (gptq)", "original checkpoint"),
    ),
    "bitsandbytes": (
        lambda raw: raw | {"quantization_config": {"quant_method": "bitsandbytes"}},
        ("quantized already (bitsandbytes)",),
    ),
    "quantized somehow": (lambda raw: raw | {"quantization_config": "int4"}, ("quantized already (unknown)",)),
    "untied": (text({"tie_word_embeddings": False}), ("tie_word_embeddings is false",)),
    "untied at the top": (lambda raw: raw | {"tie_word_embeddings": False}, ("tie_word_embeddings is false",)),
    "linear rope scaling": (text({"rope_scaling": {"rope_type": "linear", "factor": 8}}), ("rope scaling", "linear")),
    "old spelling of rope scaling": (text({"rope_scaling": {"type": "yarn", "factor": 4.0}}), ("rope scaling", "yarn")),
    "rope scaling of transformers 5": (
        lambda raw: text(
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}}}
        )(raw),
        ("rope scaling", "linear"),
    ),
    "text_config a list": (lambda raw: raw | {"text_config": []}, ("text_config is not an object", "list")),
    "text_config null": (lambda raw: raw | {"text_config": None}, ("text_config is not an object", "NoneType")),
    "all layers shared": (
        text({"num_kv_shared_layers": 30}),
        ("contradict", "num_kv_shared_layers < num_hidden_layers"),
    ),
    "active index beyond the inputs": (text({"altup_active_idx": 4}), ("contradict", "altup_active_idx")),
    "heads no multiple": (text({"num_key_value_heads": 3}), ("contradict", "heads a multiple of key-value heads")),
    "more text tokens than tokens": (text({"vocab_size_per_layer_input": 262401}), ("contradict", "vocab_size")),
}


@pytest.mark.parametrize(("change", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_config(change: Callable[[Raw], Raw], said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(change(published("e2b")))
    assert caught.value.what.startswith(f"{PATH}: ")
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [None, {}, [], "x", {"full_attention": 5}, {"full_attention": {"rope_theta": None}}])
def test_odd_rope_parameters_beside_the_old_keys(value: Any) -> None:
    """The keys of their own decide, unless a base of transformers 5 is there and impossible."""
    raw = text({"rope_parameters": value})(published("e2b"))
    if isinstance(value, dict) and isinstance(value.get("full_attention"), dict):
        with pytest.raises(ConfigError, match="rope_theta is impossible"):
            parse(raw)
    else:
        assert parse(raw).rope_theta == 1e6


# the file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"<html>", "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"1" * 5000, "not JSON"),
    ],
    ids=["empty", "cut-off", "html", "not-utf8", "deep", "list", "null", "long-number"],
)
def test_a_broken_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parse_config(load_config(tmp_path), tmp_path / "config.json")
    assert caught.value.what == f"{tmp_path / 'config.json'}: {said}"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        parse_config(load_config(tmp_path), tmp_path / "config.json")
    assert type(caught.value) is SourceError
    assert caught.value.what == f"{tmp_path / 'config.json'}: missing"


def test_parsing_changes_nothing() -> None:
    raw = transformers_5(published("e2b"))
    before = copy.deepcopy(raw)
    parse(raw)
    assert raw == before
