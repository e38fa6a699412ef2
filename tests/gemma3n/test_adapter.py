"""What is said of an adapter, and which are refused: adapters made by hand, without PEFT."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n.errors import CheckpointError, ConfigError, Gguf3nError, MappingError, SourceError, UsageError
from gguf3n.formats.rows import LowRank, Stored
from gguf3n.gemma3n.adapter import REFUSED as NO_SUMS
from gguf3n.gemma3n.adapter import ROOT, read_adapter
from gguf3n.gemma3n.merging import merge
from gguf3n.gemma3n.source import Checkpoint, open_checkpoint
from tests import micro
from tests.command_line import Run

TEXT = "base_model.model.model.language_model."
UP = TEXT + "layers.0.mlp.up_proj"
TABLE = TEXT + "embed_tokens"
AUDIO = "base_model.model.model.audio_tower.conformer.0.attention.attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 4, "alpha_pattern": {}}
Arrays = dict[str, np.ndarray]


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def lora(module: str = UP, n_outputs: int = 128, n_inputs: int = 64, rank: int = 2) -> Arrays:
    return {f"{module}.lora_A.weight": zeros(rank, n_inputs), f"{module}.lora_B.weight": zeros(n_outputs, rank)}


def make(directory: Path, arrays: Mapping[str, np.ndarray], **settings: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    micro.write_json(directory / "adapter_config.json", CONFIG | settings)
    micro.write_safetensors(directory / "adapter_model.safetensors", arrays)
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.make(tmp_path_factory.mktemp("adapter") / "micro")


def merged(base: Path, *adapters: Path, scale: float = 1.0) -> Checkpoint:
    source = merge(open_checkpoint(base), [read_adapter(adapter) for adapter in adapters], scale)
    assert isinstance(source, Checkpoint)
    return source


def scale_of(base: Path, adapter: Path, module: str = UP) -> float:
    name = module.removeprefix("base_model.model.") + ".weight"
    (rows,) = merged(base, adapter).tensors[name].rows
    assert isinstance(rows, LowRank)
    return rows.scale


# what counts


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2.0),
        ({"lora_alpha": None}, 4.0),  # LoraConfig's own
        ({"use_rslora": True}, 4 / np.sqrt(2)),
        ({"r": 1, "rank_pattern": {"up_proj": 64}}, 2.0),  # the tensors say what the rank is
        ({"alpha_pattern": {"down_proj": 1, "up_proj": 6, "mlp.up_proj": 8}}, 3.0),
        ({"alpha_pattern": {"p_proj": 6}}, 2.0),
        ({"alpha_pattern": {"up_pro": 6}}, 2.0),
        ({"alpha_pattern": {r".*\.0\.mlp\..*": 6}}, 3.0),
        ({"alpha_pattern": {"^model.language_model.layers.0.mlp.up_proj": 6}}, 3.0),
    ],
    ids=str,
)
def test_the_scale(settings: dict[str, Any], expected: float, base: Path, tmp_path: Path) -> None:
    assert scale_of(base, make(tmp_path / "x", lora(), **settings)) == expected


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.model.language_model.", "base_model.model.language_model.model.", "base_model.model.model.",
        "model.language_model.",
    ],
)  # fmt: skip
def test_every_layout_of_names(prefix: str, base: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "x", lora(prefix + "layers.0.mlp.up_proj"))
    assert micro.changed(open_checkpoint(base), merged(base, adapter)) == {
        "model.language_model.layers.0.mlp.up_proj.weight"
    }


# what is left out, with a notice


def test_keys_and_values_that_nothing_reads(base: Path, tmp_path: Path) -> None:
    """In the base or not, as transformers 4 and 5 have it."""
    arrays = lora() | lora(TEXT + "layers.2.self_attn.k_proj", 32) | lora(TEXT + "layers.2.self_attn.v_proj", 32)
    adapter = make(tmp_path / "x", arrays)
    raw = micro.config()
    left = {name: each for name, each in micro.tensors(raw).items() if ".layers.2.self_attn.k" not in name}
    for source in (base, micro.make(tmp_path / "without", raw=raw, arrays=left)):
        found = merged(source, adapter)
        assert len(micro.changed(open_checkpoint(source), found)) == 1
        assert any("left out 2: keys and values of KV-shared layers" in said for said in found.notices)


def test_an_encoder_that_is_not_there(base: Path, tmp_path: Path) -> None:
    found = merged(base, make(tmp_path / "x", lora() | lora(AUDIO, 64)))
    assert any(f"left out 1: audio, which {base} does not have" in said for said in found.notices)


def test_the_copy_of_the_base(base: Path, tmp_path: Path) -> None:
    """PEFT stores the table that a product is added to."""
    table = {f"{TABLE}.lora_embedding_A": zeros(2, 1088), f"{TABLE}.lora_embedding_B": zeros(64, 2)}
    found = merged(base, make(tmp_path / "x", table | {f"{TABLE}.base_layer.weight": zeros(1088, 64)}))
    assert found.notices[0].endswith(": 1 LoRA of an embedding")
    assert "is the output matrix too" in found.notices[1]
    alone = merged(base, make(tmp_path / "y", {f"{TABLE}.base_layer.weight": zeros(1088, 64)}))
    assert not micro.changed(open_checkpoint(base), alone)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_model_name_or_path": "unsloth/gemma-3n-E4B-it-unsloth-bnb-4bit"}, "unsloth/gemma-3n-E4B-it in 16 bits"),
        ({"base_model_name_or_path": "someone/x-bnb-4bit"}, "here is someone/x in 16 bits"),
        ({"init_lora_weights": "loftq"}, "a little off"),
    ],
)
def test_notices(settings: dict[str, Any], said: str, base: Path, tmp_path: Path) -> None:
    assert any(said in notice for notice in merged(base, make(tmp_path / "x", lora(), **settings)).notices)
    assert len(merged(base, make(tmp_path / "y", lora(), base_model_name_or_path="a/b")).notices) == 1


def test_nothing_is_read(base: Path, tmp_path: Path) -> None:
    """But the headers: a merged checkpoint's rows are forms, and files that are gone are missed when they are read."""
    adapter = make(tmp_path / "x", lora())
    source = merged(base, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        gguf3n.convert(source, "F32", tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_what_is_said_of_the_model(tmp_path: Path) -> None:
    card = "---\nlicense: gemma\nbase_model: google/gemma-3n-E2B\nauthor: someone\n---\n"
    base = micro.make(tmp_path / "google" / "gemma-3n-E2B-it", readme=card)
    source = merged(base, make(tmp_path / "polite", lora()))
    keys = {key.name: key.value for key in gguf3n.text_part(source).keys}
    before = {key.name: key.value for key in gguf3n.text_part(open_checkpoint(base)).keys}
    assert source.name == "gemma-3n-E2B-it-polite"
    assert source.origin == f"{base} with {tmp_path / 'polite'}"
    assert source.read_from == f"{base} with polite"
    assert keys["general.name"] == before["general.name"] + " polite"
    assert keys["general.finetune"] == before["general.finetune"] + "-polite"
    assert keys["general.base_model.count"] == 1
    assert keys["general.base_model.0.name"] == before["general.name"]
    assert keys["general.license"] == "gemma"
    assert keys["general.base_model.0.author"] == "someone"
    assert "general.author" in before and "general.author" not in keys


# what is refused: one error each


def settings(**changes: Any) -> Callable[[Path], Path]:
    return lambda directory: make(directory / "x", lora(), **changes)


def tensors(*arrays: Arrays, **changes: Any) -> Callable[[Path], Path]:
    return lambda directory: make(directory / "x", {name: a for each in arrays for name, a in each.items()}, **changes)


def pickle(directory: Path) -> Path:
    adapter = make(directory / "x", lora())
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    return adapter


def inside(directory: Path) -> Path:
    make(directory / "x" / "mine", lora())
    return directory / "x"


def empty(directory: Path) -> Path:
    (directory / "x").mkdir()
    return directory / "x"


def broken(directory: Path) -> Path:
    adapter = make(directory / "x", lora())
    os.truncate(adapter / "adapter_model.safetensors", 300)
    return adapter


def not_json(directory: Path) -> Path:
    adapter = make(directory / "x", lora())
    (adapter / "adapter_config.json").write_text("{")
    return adapter


REFUSED: Mapping[str, tuple[Callable[[Path], Path], type[Gguf3nError], str]] = {
    "no directory": (lambda directory: directory / "x", SourceError, "no such directory"),
    "an empty one": (empty, SourceError, "no adapter here"),
    "adapters inside": (inside, SourceError, r"adapters in mine\n.*/x/mine"),
    "a pickle": (pickle, SourceError, "can run any program"),
    "broken": (broken, CheckpointError, "truncated"),
    "no JSON": (not_json, ConfigError, "not JSON"),
    "no tensors": (tensors(), CheckpointError, "no tensors"),
    "LoHa": (settings(peft_type="LOHA"), ConfigError, r'peft_type "LOHA"[\s\S]*merge_and_unload'),
    "no kind": (settings(peft_type=None), ConfigError, "peft_type null"),
    "PiSSA": (settings(init_lora_weights="pissa_niter_16"), ConfigError, r"PiSSA changed[\s\S]*path_initial_model"),
    "OLoRA": (settings(init_lora_weights="OLoRA"), ConfigError, "OLoRA changed"),
    "CorDA": (settings(init_lora_weights="corda"), ConfigError, "CorDA changed"),
    "LoRA-GA": (settings(init_lora_weights="lora_ga"), ConfigError, "LoRA-GA changed"),
    "QA-LoRA": (settings(use_qalora=True), ConfigError, "quantized in groups"),
    "biases": (settings(lora_bias=True), ConfigError, "adds biases"),
    "more layers": (settings(layer_replication=[[0, 2], [1, 3]]), ConfigError, "layers that the base does not have"),
    "parameters": (settings(target_parameters=["x"]), ConfigError, "not the weight of a layer"),
    "aLoRA": (settings(alora_invocation_tokens=[1]), ConfigError, "certain words"),
    "alpha": (settings(lora_alpha="much"), ConfigError, 'lora_alpha is impossible[\\s\\S]*"much"'),
    "no alpha": (settings(lora_alpha=float("inf")), ConfigError, "lora_alpha is impossible"),
    "patterns": (settings(alpha_pattern=[1]), ConfigError, "alpha_pattern is impossible"),
    "an endless pattern": (settings(alpha_pattern={"(a+)+b": 1}), ConfigError, "nested repeats"),
    "no pattern": (settings(alpha_pattern={"(": 1}), ConfigError, "can't be used"),
    "a pattern's alpha": (settings(alpha_pattern={"a": True}), ConfigError, "alpha_pattern is impossible"),
    "another model": (tensors(lora(TEXT + "layers.9.mlp.up_proj")), MappingError, "no module of"),
    "another size": (
        tensors(lora(n_inputs=128), base_model_name_or_path="google/gemma-3n-E4B"),
        MappingError,
        r"wrong shape[\s\S]*\[2, 128\]; trained on google/gemma-3n-E4B[\s\S]*the base that it was trained on",
    ),
    "another rank": (
        tensors(lora(), {f"{UP}.lora_B.weight": zeros(128, 3)}), MappingError, r"wrong shape[\s\S]*\[128, 2\]",
    ),
    "one half": (tensors({f"{UP}.lora_A.weight": zeros(2, 64)}), MappingError, "found:    lora_A"),
    "a product and a weight": (tensors(lora(), {f"{UP}.weight": zeros(128, 64)}), MappingError, "can't be merged"),
    "DoRA of a table": (
        tensors({f"{TABLE}.{end}": zeros(2, 2) for end in ("lora_embedding_A", "lora_embedding_B")},
                {f"{TABLE}.lora_magnitude_vector": zeros(64)}),
        MappingError,
        "lora_magnitude_vector",
    ),
    "lengths": (tensors(lora(), {f"{UP}.lora_magnitude_vector": zeros(64)}), MappingError, r"\[128\]"),
    "a bias": (tensors(lora(), {f"{UP}.lora_B.bias": zeros(128)}), MappingError, "lora_B.bias is no module"),
    "a shard": (tensors({f"{UP}.lora_A.weight": zeros(99)}), CheckpointError, r"a shard, or empty[\s\S]*ZeRO-3"),
    "an empty shard": (tensors({f"{UP}.lora_B.weight": zeros(0, 2)}), CheckpointError, "a shard, or empty"),
    "a scalar": (tensors({f"{TABLE}.lora_embedding_A": zeros()}), CheckpointError, "a shard, or empty"),
    "integers": (tensors({f"{UP}.lora_A.weight": np.zeros((2, 64), np.int8)}), MappingError, "dtype"),
    "a long name": (tensors(lora(TEXT + "x" * 200)), MappingError, "no tensor of a Gemma 3n"),
    "twice": (tensors(lora(), lora("base_model.model.model.layers.0.mlp.up_proj")), MappingError, "the same piece"),
    "the output matrix": (tensors(lora("base_model.model.lm_head", 1088)), MappingError, "apart from the embedding"),
    "a vector": (tensors(lora(TEXT + "norm", 64)), MappingError, "is no matrix"),
    "new tokens": (tensors({f"{TABLE}.weight": zeros(1090, 64)}), MappingError, "the vocabulary was changed"),
    "new tokens beside": (
        tensors(lora(), {f"{TABLE}.base_layer.weight": zeros(1090, 64)}), MappingError, "the vocabulary was changed",
    ),
    "tokens that nobody names": (
        tensors({f"{TABLE}.token_adapter.trainable_tokens_delta": zeros(2, 64)}, trainable_token_indices={"x": [1, 2]}),
        MappingError,
        "which rows",
    ),
    "tokens that are not there": (
        tensors({f"{TABLE}.token_adapter.trainable_tokens_delta": zeros(1, 64)}, trainable_token_indices=[1088]),
        MappingError,
        "below 1,088",
    ),
    "another number of tokens": (
        tensors({f"{TABLE}.token_adapter.trainable_tokens_delta": zeros(2, 64)}, trainable_token_indices=[1, 2, 3]),
        MappingError,
        r"\[3, 64\]",
    ),
    "a token twice": (settings(trainable_token_indices=[1, 1]), ConfigError, "each once"),
    "a token's name": (settings(trainable_token_indices={"embed_tokens": ["a"]}), ConfigError, "numbers of tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, base: Path, tmp_path: Path) -> None:
    prepare, error, said = REFUSED[name]
    adapter = prepare(tmp_path)
    with pytest.raises(error, match=said) as caught:
        gguf3n.convert(base, "F32", tmp_path / "out", adapters=[adapter])
    assert type(caught.value) is error
    assert str(adapter) in caught.value.what or (name == "adapters inside" and "x" in caught.value.what)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", NO_SUMS)
def test_every_setting_that_is_more_than_a_sum(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(NO_SUMS[key])) as caught:
        read_adapter(make(tmp_path / "x", lora(), **{key: {"a": 1}}))
    assert key in (caught.value.found or "") and "merge_and_unload" in (caught.value.fix or "")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "lora_ga"])
def test_every_beginning_that_changed_the_base(start: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="changed the base before the training"):
        read_adapter(make(tmp_path / "x", lora(), init_lora_weights=start))


def test_a_convolution(base: Path, tmp_path: Path) -> None:
    """As of a vision tower: a product of convolutions is none of matrices."""
    name = "model.vision_tower.timm_model.conv_stem.conv"
    raw = micro.config()
    arrays = micro.tensors(raw) | {f"{name}.weight": np.zeros((8, 3, 3, 3), np.uint16)}
    source = micro.make(tmp_path / "seeing", raw=raw, arrays=arrays)
    factors = {f"{ROOT}{name}.lora_A.weight": zeros(2, 3, 3, 3), f"{ROOT}{name}.lora_B.weight": zeros(8, 2, 1, 1)}
    with pytest.raises(MappingError, match=r"conv_stem\.conv is no matrix"):
        merged(source, make(tmp_path / "x", factors))


def test_the_same_adapter_twice(base: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "x", lora())
    (tmp_path / "link").symlink_to(adapter)
    for again in (adapter, tmp_path / "link", f"{tmp_path}/./x/"):
        with pytest.raises(UsageError, match="the same adapter twice"):
            gguf3n.read_source(base, adapters=[adapter, make(tmp_path / "y", lora()), again])


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_scales_that_are_none(scale: float, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--adapter-scale"):
        gguf3n.read_source(base, adapters=[make(tmp_path / "x", lora())], adapter_scale=scale)


def test_what_has_no_scale(base: Path, tmp_path: Path) -> None:
    whole = make(tmp_path / "x", {f"{TABLE}.weight": zeros(1088, 64)})
    lengths = make(tmp_path / "y", lora() | {f"{UP}.lora_magnitude_vector": zeros(128)})
    for adapter in (whole, lengths):
        with pytest.raises(UsageError, match="weights that are replaced"):
            gguf3n.read_source(base, adapters=[adapter], adapter_scale=0.5)
    with pytest.raises(UsageError, match="without --adapter"):
        gguf3n.read_source(base, adapter_scale=0.5)


def test_what_adapters_are_merged_into(base: Path, tmp_path: Path) -> None:
    adapter = make(tmp_path / "x", lora())
    (written,) = gguf3n.convert(base, "F32", tmp_path)
    with pytest.raises(UsageError, match="into a checkpoint, not into a GGUF file"):
        gguf3n.read_source(written.path, adapters=[adapter])
    with pytest.raises(UsageError, match="open already"):
        gguf3n.convert(open_checkpoint(base), "F32", tmp_path / "out", adapters=[adapter])
    with pytest.raises(SourceError, match="convert BASE --adapter"):
        gguf3n.read_source(adapter)


# the commands


def test_the_commands(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    arrays = {name: np.ones_like(each) for name, each in lora().items()}
    adapters = [make(tmp_path / name, arrays) for name in ("one", "two")]
    options = [word for adapter in adapters for word in ("--adapter", str(adapter))] + ["--adapter-scale", "0.25"]

    monkeypatch.chdir(tmp_path)
    result = json.loads(run("convert", base, *options, "-q", "F32", "--dry-run", "--json").out)
    assert result["outputs"][0]["path"] == "micro-one-two-F32.gguf"
    assert f"merged {adapters[1]}: 1 LoRA" in result["notices"]
    assert run("convert", base, *options, "-q", "F32").code == 0
    written = gguf3n.open_gguf("micro-one-two-F32.gguf").tensors["blk.0.ffn_up.weight"]
    raw = Path("micro-one-two-F32.gguf").read_bytes()[written.offset : written.offset + written.n_bytes]
    before = open_checkpoint(base).tensors["model.language_model.layers.0.mlp.up_proj.weight"].rows[0]
    assert isinstance(before, Stored)
    plain = np.fromfile(base / "model.safetensors", np.uint16, 128 * 64, offset=before.offset).astype(np.uint32) << 16
    # twice alpha / rank * a quarter * a rank of two
    assert np.array_equal(np.frombuffer(raw, np.float32), plain.view(np.float32) + 2)
    against = ["--stages", "tensors", "--reference", base]
    assert run("validate", "micro-one-two-F32.gguf", *against, *options).code == 0
    assert run("validate", "micro-one-two-F32.gguf", *against).code == 12
    assert run("convert", base, "-q", "F32", "--adapter-scale", "2", "--force").code == 2
