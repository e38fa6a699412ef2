"""Adapters that PEFT has made, merged by us: PEFT's own merge in float64, rounded once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n.engines.reference import Reference
from gguf3n.engines.torchvision_operators import declare_operators
from gguf3n.formats.rows import RowReader, chunks
from gguf3n.gemma3n.adapter import REFUSED, read_adapter
from gguf3n.gemma3n.merging import merge
from gguf3n.gemma3n.source import Checkpoint, open_checkpoint
from gguf3n.pipeline import compiled_arithmetic, run
from gguf3n.planning import make_plan
from gguf3n.recipes import find_recipe
from tests import micro
from tests.gemma3n import trained

declare_operators()  # peft looks at torchvision
peft = pytest.importorskip("peft", exc_type=ModuleNotFoundError)

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = {"r": 2, "target_modules": ["q_proj"]}
KINDS: Mapping[str, tuple[dict[str, Any], int]] = {
    # the settings, and how many units in the last place PEFT's float64, rounded, may be off
    "LoRA": ({"r": 4, "lora_alpha": 6, "target_modules": LINEAR}, 0),
    "rsLoRA": ({"r": 5, "lora_alpha": 6, "target_modules": LINEAR, "use_rslora": True}, 0),
    "patterns": (
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 7, r"layers\.1\..*q_proj": 3},
            "alpha_pattern": {  # PEFT sorts them when it saves, and the first that fits counts
                "^mlp.gate_proj": 9,
                "^model.language_model.layers.1.mlp.gate_proj": 2.5,
                r"layers\.[12]\..*": 3,
                "model.language_model.layers.0.mlp.up_proj": 11,
                "q_proj": 5,
            },
        },
        0,
    ),
    "DoRA": ({"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_dora": True}, 2),
    "embeddings": ({"r": 4, "lora_alpha": 3, "target_modules": ["embed_tokens", "embed_tokens_per_layer"]}, 0),
    "modules to save": (Q | {"modules_to_save": ["embed_tokens", "o_proj", "input_layernorm"]}, 0),
    "trained tokens": (Q | {"trainable_token_indices": [5, 0, 1, 1023, 700]}, 0),
    "tokens of tables": (
        Q | {"trainable_token_indices": {"embed_tokens": [5, 6], "embed_tokens_per_layer": [3, 9, 8]}},
        0,
    ),
    "only tokens": ({"token_indices": [7, 3], "target_modules": ["embed_tokens"]}, 0),
}
EXPECTED = {
    "LoRA": "25 LoRA",
    "rsLoRA": "25 LoRA",
    "patterns": "70 LoRA",
    "DoRA": "25 DoRA",
    "embeddings": "2 LoRA of an embedding",
    "modules to save": "5 LoRA, 7 replaced",
    "trained tokens": "5 LoRA, 1 trained tokens",
    "tokens of tables": "5 LoRA, 2 trained tokens",
    "only tokens": "1 trained tokens",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained.make_base(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def everything(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that together have every kind; the second changes what the first has changed."""
    folder = tmp_path_factory.mktemp("everything")
    first = {"r": 3, "target_modules": [*LINEAR, "embed_tokens"], "modules_to_save": ["input_layernorm"]}
    second = {"r": 2, "target_modules": LINEAR, "use_dora": True, "trainable_token_indices": [5, 800]}
    trained.train(base, folder / "first", 1, **first)
    trained.train(base, folder / "second", 2, **second)
    return [folder / "first", folder / "second"]


def merged(base: Path, *adapters: Path, scale: float = 1.0) -> Checkpoint:
    source = merge(open_checkpoint(base), [read_adapter(adapter) for adapter in adapters], scale)
    assert isinstance(source, Checkpoint)
    return source


def ulps(one: np.ndarray, two: np.ndarray) -> int:
    """The largest distance. Shapes: float32, of one sign where they differ."""
    return int(np.abs(one.view(np.int32).astype(np.int64) - two.view(np.int32)).max(initial=0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_makes_of_it(kind: str, base: Path, tmp_path: Path) -> None:
    settings, n_ulps = KINDS[kind]
    made = trained.train(base, tmp_path / "adapter", **settings)
    source, before = merged(base, made.directory), open_checkpoint(base)
    assert source.notices[0] == f"merged {made.directory}: {EXPECTED[kind]}"
    changed = set()
    for name, expected in made.exact.items():
        found = trained.values(source.tensors[name])
        assert ulps(found, expected.astype(np.float32)) <= n_ulps, name
        # PEFT's float32 rounds at every step
        assert np.abs(found - made.single[name]).max() <= 8 * 2.0**-24 * np.abs(found).max(), name
        if not np.array_equal(found, trained.values(before.tensors[name])):
            changed.add(name)
    assert micro.changed(before, source) == changed


def test_one_after_another(base: Path, everything: list[Path], tmp_path: Path) -> None:
    """As if the first were merged and saved, and the second trained on that."""
    between = trained.write_merged(merged(base, everything[0]), tmp_path / "between")
    once, twice = merged(base, *everything), merged(between, everything[1])
    for name in once.tensors:
        assert ulps(trained.values(once.tensors[name]), trained.values(twice.tensors[name])) == 0, name
    assert once.name == "base-first-second"
    assert once.changes == ("first", "second")


def test_a_scale(base: Path, tmp_path: Path) -> None:
    """As PEFT's set_scale."""
    made = trained.train(base, tmp_path / "adapter", **KINDS["LoRA"][0])
    whole, part, before = merged(base, made.directory), merged(base, made.directory, scale=-0.5), open_checkpoint(base)
    for name in micro.changed(before, whole):
        w, one, half = (trained.values(each.tensors[name]).astype(np.float64) for each in (before, whole, part))
        assert np.abs((half - w) + 0.5 * (one - w)).max() <= 2.0**-22 * np.abs(one).max()


def test_files(base: Path, everything: list[Path], tmp_path: Path) -> None:
    """Both files have the bytes of those of a merged checkpoint, and are valid; threads and chunks change nothing."""
    options: dict[str, Any] = {"mmproj": "F32", "vision": False}
    written = gguf3n.convert(base, ["F32", "Q8_0"], tmp_path / "out", adapters=everything, threads=3, **options)
    copy = trained.write_merged(merged(base, *everything), tmp_path / "copy")
    expected = gguf3n.convert(copy, ["F32", "Q8_0"], tmp_path / "copied", **options)
    assert [each.path.name for each in written] == [
        "base-first-second-F32.gguf",
        "base-first-second-Q8_0.gguf",
        "mmproj-base-first-second-F32.gguf",
    ]
    for ours, theirs in zip(written, expected, strict=True):
        assert data(ours.path) == data(theirs.path)
    source = merged(base, *everything)
    plan = make_plan(gguf3n.text_part(source), find_recipe("F32"))
    run([(plan, tmp_path / "small.gguf")], threads=1, chunk_weights=500)
    assert (tmp_path / "small.gguf").read_bytes() == written[0].path.read_bytes()
    for each in written[:2]:
        assert gguf3n.validate(each.path, source, stages="tensors").verdict is gguf3n.Verdict.PASS
        assert gguf3n.validate(each.path, base, stages="tensors").verdict is gguf3n.Verdict.FAIL


def data(path: Path) -> dict[str, bytes]:
    """A file's tensors."""
    file, raw = gguf3n.open_gguf(path), path.read_bytes()
    return {name: raw[tensor.offset : tensor.offset + tensor.n_bytes] for name, tensor in file.tensors.items()}


def test_compiled_values(base: Path, everything: list[Path]) -> None:
    """What a conversion computes with gives the same."""
    source = merged(base, *everything)
    with closing(RowReader(compiled_arithmetic())) as reader:
        for name in micro.changed(open_checkpoint(base), source):
            parts = []
            for chunk in (chunk for rows in source.tensors[name].rows for chunk in chunks(rows, 300)):
                parts.append(np.empty((chunk.n_rows, chunk.rows.n_per_row), np.float32))
                reader.fill(chunk.rows, chunk.first, parts[-1])
            expected = trained.values(source.tensors[name])
            assert np.concatenate(parts).tobytes() == expected.tobytes(), name


def test_the_reference_has_the_adapters(base: Path, everything: list[Path], tmp_path: Path) -> None:
    source = merged(base, *everything)
    copy = trained.write_merged(source, tmp_path / "copy")
    ids = [2, 500, 600, 7, 5]
    with Reference(source) as one, Reference(copy) as two, Reference(base) as without:
        ours, theirs, others = (np.array(list(each.logprobs(ids))) for each in (one, two, without))
    assert (ours == theirs).all()
    assert (ours != others).any()


SETTINGS_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "velora_config",
}  # fmt: skip
"""That say how an adapter was trained, or what its tensors say again."""
READ = {"alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "trainable_token_indices", "use_rslora"}


def test_every_setting_of_peft_is_known() -> None:
    names = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert names == SETTINGS_WITHOUT_EFFECT | READ | set(REFUSED)
    assert not SETTINGS_WITHOUT_EFFECT & (READ | set(REFUSED))
