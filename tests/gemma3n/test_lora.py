"""What is written of an adapter, what is left out, what is refused: adapters made by hand, without PEFT."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n.errors import CheckpointError, ConfigError, GGUFError, MappingError, OutputError, SourceError, UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.gemma3n.adapter import read_adapter
from tests import micro
from tests.command_line import Run
from tests.gemma3n.test_adapter import AUDIO, TABLE, TEXT, UP, make
from tests.lora_files import write_lora

Arrays = dict[str, np.ndarray]
DOWN, Q, ROUTER = TEXT + "layers.1.mlp.down_proj", TEXT + "layers.0.self_attn.q_proj", "altup.modality_router"
SIZES = {UP: (128, 64), DOWN: (64, 128), Q: (64, 64)}


def random(module: str, n_outputs: int, n_inputs: int, rank: int = 2) -> Arrays:
    rng = np.random.default_rng(len(module) + rank)
    return {
        f"{module}.lora_A.weight": rng.standard_normal((rank, n_inputs), np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((n_outputs, rank), np.float32),
    }


def three(rank: int = 2) -> Arrays:
    return {name: array for module, size in SIZES.items() for name, array in random(module, *size, rank).items()}


def values(path: Path) -> Arrays:
    gguf = open_gguf(path)
    return {name: np.frombuffer(gguf.read(each), np.float32).reshape(each.shape) for name, each in gguf.tensors.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.make(tmp_path_factory.mktemp("lora") / "micro")


# what is written

NAMES = {UP: "blk.0.ffn_up.weight", DOWN: "blk.1.ffn_down.weight", Q: "blk.0.attn_q.weight"}


def test_a_plain_adapter_has_peft_s_own_values(tmp_path: Path) -> None:
    arrays = three()
    adapter = make(tmp_path / "mine", arrays, base_model_name_or_path="google/gemma-3n-E2B-it")
    written = gguf3n.convert_adapter(adapter, output=tmp_path)
    assert written.path == tmp_path / "mine-F32-LoRA.gguf"
    gguf = open_gguf(written.path)
    assert {name: key.value for name, key in gguf.keys.items()} == {
        "general.architecture": "gemma3n",
        "general.type": "adapter",
        "general.name": "mine",
        "general.base_model.count": 1,
        "general.base_model.0.name": "gemma-3n-E2B-it",
        "general.base_model.0.repo_url": "https://huggingface.co/google/gemma-3n-E2B-it",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
        "general.quantization_version": 2,
    }
    found = values(written.path)
    assert list(found) == [NAMES[module] + end for module in (Q, UP, DOWN) for end in (".lora_a", ".lora_b")]
    for module, name in NAMES.items():
        assert (found[f"{name}.lora_a"] == arrays[f"{module}.lora_A.weight"]).all()
        assert (found[f"{name}.lora_b"] == arrays[f"{module}.lora_B.weight"]).all()
    assert gguf3n.lint(written.path, with_data=True).findings == ()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"down_proj": 7, "q_proj": 0.5}},
        {"alpha_pattern": {"down_proj": 7}, "use_rslora": True},
        {"lora_alpha": 0, "alpha_pattern": {"up_proj": 3}},
        {"lora_alpha": 1e-46},
        {"lora_alpha": -3},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
def test_the_scale_is_peft_s(settings: dict[str, Any], scale: float, tmp_path: Path) -> None:
    """What llama.cpp makes of the file, its converter of the adapter, and PEFT."""
    arrays = three() | random(Q, *SIZES[Q], rank=3)
    directory = make(tmp_path / "x", arrays, **settings)
    path = gguf3n.convert_adapter(directory, output=tmp_path / "x.gguf", scale=scale).path
    alpha = open_gguf(path).value("adapter.lora.alpha")
    assert isinstance(alpha, float) and alpha != 0
    adapter, found = read_adapter(directory), values(path)
    theirs = []
    for module, name in NAMES.items():
        b, weight = found[f"{name}.lora_b"], module.removeprefix(TEXT) + ".weight"
        rank = b.shape[1]
        expected = adapter.scale(weight, rank) * scale * np.float64(arrays[f"{module}.lora_B.weight"])
        np.testing.assert_allclose(alpha / rank * np.float64(b), expected, rtol=2.0**-23, atol=1e-40)
        theirs.append((adapter.alpha or rank) / rank == adapter.scale(weight, rank))
    is_plain = not settings.get("use_rslora") and not settings.get("alpha_pattern")
    assert all(theirs) is is_plain  # llama.cpp's converter knows neither


@pytest.mark.parametrize(
    ("qtype", "rank", "types"),
    [("F16", 2, {"F16"}), ("bf16", 2, {"BF16"}), ("Q8_0", 2, {"F16", "Q8_0"}), ("Q8_0", 32, {"Q8_0"})],
)
def test_types(qtype: str, rank: int, types: set[str], tmp_path: Path) -> None:
    directory = make(tmp_path / "x", three(rank))
    path = gguf3n.convert_adapter(directory, qtype, tmp_path).path
    gguf = open_gguf(path)
    assert {each.qtype.name for each in gguf.tensors.values()} == types
    assert path.name == f"x-{qtype.upper()}-LoRA.gguf"
    for name, tensor in gguf.tensors.items():
        assert (tensor.qtype.name == "F16") is (qtype == "F16" or (len(types) == 2 and name.endswith("b")))


def test_threads_change_nothing(tmp_path: Path) -> None:
    directory = make(tmp_path / "x", three(), use_rslora=True)
    paths = [gguf3n.convert_adapter(directory, output=tmp_path / f"{n}.gguf", threads=n).path for n in (1, 5)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


# what is left out, with a notice


def test_what_has_no_effect_is_left_out(tmp_path: Path, base: Path) -> None:
    idle = random(TEXT + "layers.2.self_attn.k_proj", 32, 64)
    directory = make(tmp_path / "x", three() | idle | random(AUDIO, 8, 8))
    said = gguf3n.plan_adapter(directory, base=base).notices
    assert said == (
        f"{directory}: left out 1: keys and values of KV-shared layers, which nothing reads",
        f"{directory}: left out 1: audio, which llama.cpp loads no adapters for; "
        f"gguf3n convert {base} --adapter {directory} --mmproj F16 merges them",
    )
    plan = gguf3n.plan_adapter(directory)  # without a base, of the published sizes
    assert "blk.2.attn_k.weight.lora_a" in [tensor.slot.name for tensor in plan.tensors]
    published = make(tmp_path / "y", three() | random(TEXT + "layers.20.self_attn.v_proj", 32, 64))
    assert len(gguf3n.plan_adapter(published).tensors) == 6


# what llama.cpp does not apply

UNSUPPORTED: Mapping[str, tuple[Arrays, dict[str, Any], str]] = {
    "ignored": (
        random(f"{TEXT}layers.0.{ROUTER}", 4, 64) | random(f"{TEXT}layers.2.{ROUTER}", 4, 64),
        {},
        "layers.*.altup.modality_router (0, 2): llama.cpp loads an adapter for it and never applies it",
    ),
    "a stack": (
        {name: each for k in range(3) for name, each in random(f"{TEXT}altup_projections.{k}", 64, 64).items()},
        {},
        "altup_projections.* (0-2): llama.cpp loads an adapter for it and never applies it",
    ),
    "the embedding": (
        {f"{TABLE}.lora_embedding_A": np.ones((2, 1088)), f"{TABLE}.lora_embedding_B": np.ones((64, 2))},
        {},
        "embed_tokens: llama.cpp aborts with an adapter for it",
    ),
    "DoRA": (
        random(f"{TEXT}layers.1.mlp.up_proj", 128, 64)
        | {f"{TEXT}layers.1.mlp.up_proj.lora_magnitude_vector": np.ones(128)},
        {},
        "layers.*.mlp.up_proj (1): DoRA, which a GGUF adapter can't hold",
    ),
    "modules to save": (
        {f"{TEXT}layers.0.input_layernorm.weight": np.ones(64)},
        {},
        "layers.*.input_layernorm.weight (0): replaced, which a GGUF adapter can't hold",
    ),
    "trained tokens": (
        {f"{TABLE}.token_adapter.trainable_tokens_delta": np.ones((1, 64))},
        {"trainable_token_indices": [3]},
        "embed_tokens: trained tokens, which a GGUF adapter can't hold",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_llama_cpp_can_t_apply(case: str, tmp_path: Path, base: Path) -> None:
    arrays, settings, words = UNSUPPORTED[case]
    arrays = {name: np.float32(array) for name, array in arrays.items()}
    directory = make(tmp_path / "x", three() | arrays, **settings)
    with pytest.raises(MappingError, match="can't apply") as caught:
        gguf3n.convert_adapter(directory, output=tmp_path / "x.gguf")
    assert f"  model.language_model.{words}" in caught.value.what
    assert caught.value.fix == (
        f"gguf3n convert BASE --adapter {directory} merges all of them; --drop-unsupported writes the others"
    )
    plan = gguf3n.plan_adapter(directory, base=base, drop_unsupported=True)
    assert len(plan.tensors) == 6
    assert words in plan.notices[0] and "left out" in plan.notices[0]
    assert plan.findings == ()
    alone = make(tmp_path / "alone", arrays, **settings)
    with pytest.raises(MappingError, match="nothing in it that llama"):
        gguf3n.plan_adapter(alone, drop_unsupported=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lora_bias": True}, "biases"), ({"init_lora_weights": "pissa"}, "PiSSA"), ({"peft_type": "LOHA"}, "a kind")],
)
def test_what_merging_refuses_too(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        gguf3n.plan_adapter(make(tmp_path / "x", three(), **settings), drop_unsupported=True)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (random(TEXT + "lm_head", 1088, 64), "one table for both"),
        (random(TEXT + "layers.0.mlp.other", 64, 64), "no module of any Gemma 3n"),
        (random(TEXT + "layers.0.input_layernorm", 64, 64), "is no matrix"),
        ({f"{UP}.lora_A.weight": np.ones((2, 64), np.float32)}, "can't be merged"),
        (random(UP, 128, 64) | {f"{UP}.lora_B.weight": np.ones((128, 3), np.float32)}, "do not fit each other"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_is_no_adapter_of_a_gemma_3n(arrays: Arrays, words: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError) as caught:
        gguf3n.plan_adapter(make(tmp_path / "x", arrays), drop_unsupported=True)
    assert words in str(caught.value)


def test_a_base_that_does_not_fit(tmp_path: Path, base: Path) -> None:
    for arrays, words in (
        (random(UP, 96, 64), rf"do not fit .*{base.name}"),
        (random(TEXT + "layers.7.mlp.up_proj", 128, 64), rf"no module of .*{base.name}"),
    ):
        with pytest.raises(MappingError, match=words) as caught:
            gguf3n.plan_adapter(make(tmp_path / "x", arrays), base=base)
        assert caught.value.fix == "give the base that it was trained on"


def test_every_form_of_a_base(tmp_path: Path, base: Path) -> None:
    (gguf,) = gguf3n.convert(base, "Q8_0", tmp_path)
    directory = make(tmp_path / "x", three())
    for each in (base, gguf.path, gguf3n.read_source(base)):
        assert len(gguf3n.plan_adapter(directory, base=each).tensors) == 6
    lora = gguf3n.convert_adapter(directory, output=tmp_path).path
    for wrong, error in ((lora, SourceError), (tmp_path / "none.gguf", GGUFError), (tmp_path / "none", SourceError)):
        with pytest.raises(error):
            gguf3n.plan_adapter(directory, base=wrong)


# other ends


def test_options_that_can_t_be_used(tmp_path: Path) -> None:
    directory = make(tmp_path / "x", three())
    for options, words in (
        ({"qtype": "Q4_K_M"}, "--type Q4_K_M"),
        ({"scale": 0.0}, "--scale 0"),
        ({"scale": math.nan}, "--scale nan"),
        ({"scale": 1e300}, "--scale 1e"),
    ):
        with pytest.raises(UsageError, match=words):
            gguf3n.plan_adapter(directory, **options)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="no such directory"):
        gguf3n.plan_adapter(tmp_path / "none")


def test_nothing_is_left_of_what_can_t_be_written(tmp_path: Path) -> None:
    arrays = three()
    arrays[f"{UP}.lora_B.weight"][5, 1] = np.nan
    directory = make(tmp_path / "x", arrays)
    out = tmp_path / "out"
    with pytest.raises(gguf3n.QuantizationError, match="not finite"):
        gguf3n.convert_adapter(directory, output=out / "x.gguf")
    assert list(out.iterdir()) == []
    (out / "x.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        gguf3n.convert_adapter(make(tmp_path / "y", three()), output=out / "x.gguf")
    gguf3n.convert_adapter(tmp_path / "y", output=out / "x.gguf", force=True)
    assert len(open_gguf(out / "x.gguf").tensors) == 6
    (directory / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        gguf3n.plan_adapter(directory)


def test_no_other_command_takes_it_for_a_model(tmp_path: Path, base: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf", {"blk.0.ffn_up.weight.lora_a": np.ones((2, 64), np.float32)})
    with pytest.raises(SourceError, match="an adapter, not a model"):
        gguf3n.text_part(gguf3n.read_gguf(lora))
    with pytest.raises(SourceError, match="an adapter, not a model"):
        gguf3n.validate(lora, base)
    with pytest.raises(SourceError, match="an adapter, not a model"):
        gguf3n.read_recipe(lora)


def test_the_command(tmp_path: Path, base: Path, run: Run) -> None:
    directory = make(tmp_path / "x", three() | random(f"{TEXT}layers.0.{ROUTER}", 4, 64))

    def said(*arguments: object) -> tuple[str, str]:
        code, out, err = run("adapter", directory, *arguments)
        assert code == 0, err
        return out, err

    refused = run("adapter", directory, "--dry-run")
    assert refused.code == MappingError.exit_code and "modality_router (0)" in refused.err and not refused.out
    out, err = said("--drop-unsupported", "--dry-run", "--type", "F16", "-o", tmp_path)
    assert "blk.0.ffn_up.weight.lora_b" in out and "6 tensors: 6 F16" in out and "modality_router (0)" in err
    assert not list(tmp_path.glob("*.gguf"))
    out, err = said("--drop-unsupported", "--json", "--quiet", "--base", base, "-o", tmp_path / "a.gguf")
    result = json.loads(out)
    assert err == "" and result["outputs"][0]["path"] == str(tmp_path / "a.gguf")
    assert result["outputs"][0]["types"] == {"F32": 6} and result["outputs"][0]["findings"] == []
    out, _ = said("--drop-unsupported", "--quiet", "-o", tmp_path / "a.gguf", "--force", "--scale", "2")
    assert out.startswith(str(tmp_path / "a.gguf"))
    assert open_gguf(tmp_path / "a.gguf").value("adapter.lora.alpha") == 8.0
