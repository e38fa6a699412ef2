"""Training folders: the newest complete model is found, and that is said; else what is there is listed."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np
import pytest

from gguf3n.errors import CheckpointError, SourceError
from gguf3n.formats import training_folder as module
from gguf3n.formats.training_folder import find_model, settings_directory
from tests import micro

CONSOLIDATED = "model/consolidated"


def save(directory: Path, *, config: bool = True, names: tuple[str, ...] = ("model.safetensors",)) -> Path:
    """A model of one tensor."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        micro.write_safetensors(directory / name, {name: np.ones((2, 2), np.float32)})
    if config:
        micro.write_json(directory / "config.json", {})
    return directory


def save_shards(directory: Path) -> Path:
    """One rank's, as NeMo Automodel has them."""
    save(directory, config=False, names=("shard-00001-model-00001-of-00001.safetensors",))
    (directory / ".hf_metadata").mkdir(exist_ok=True)
    micro.write_json(directory / ".hf_metadata" / "config.json", {})
    return directory


def truncate(directory: Path) -> Path:
    """As a save that ran out of disk leaves it."""
    path = next(directory.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    return directory


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_a_checkpoint_is_taken_as_it_is(tmp_path: Path) -> None:
    """Whatever is below; what is missing is said by who needs it."""
    save(tmp_path, config=False)
    save(tmp_path / "checkpoint-9")
    model = find_model(tmp_path)
    assert (model.directory, model.notices) == (tmp_path, ())
    assert list(model.tensors) == ["model.safetensors"]


FOUND: dict[str, tuple[list[str], str]] = {
    # saves, the one that is taken
    "Trainer": (["checkpoint-100", "checkpoint-200", "checkpoint-1000"], "checkpoint-1000"),
    "Automodel": (["epoch_0_step_90/model", "epoch_1_step_120/model"], "epoch_1_step_120/model"),
    "Automodel, consolidated": (["epoch_0_step_90/model", "epoch_0_step_90/model/consolidated"], CONSOLIDATED),
    "the newest is not consolidated": (["epoch_0_step_9/model/consolidated", "epoch_1_step_10/model"], "step_10/model"),
    "torch": (["step_5", "step_5/sharded"], "step_5"),
    "one": (["final/merged"], "final/merged"),
    "epochs": (["epoch-1", "epoch-2"], "epoch-2"),
    "a run in a folder": (["run/checkpoints/epoch_0_step_1/model/consolidated"], CONSOLIDATED),
}


@pytest.mark.parametrize(("saves", "taken"), FOUND.values(), ids=FOUND)
def test_the_newest_model(tmp_path: Path, saves: list[str], taken: str) -> None:
    for each in saves:
        save(tmp_path / each)
    model = find_model(tmp_path)
    assert str(model.directory).endswith(taken)
    assert model.notices == (f"took {model.directory}, the newest complete model in {tmp_path}",)


def test_of_shards_and_their_consolidation_either_will_do(tmp_path: Path) -> None:
    shards = save_shards(tmp_path / "epoch_0_step_9" / "model")
    assert find_model(tmp_path).directory == shards
    assert settings_directory(shards) == shards / ".hf_metadata"
    consolidated = save(shards / "consolidated")
    assert find_model(tmp_path).directory == consolidated == settings_directory(consolidated)
    truncate(consolidated)
    model = find_model(tmp_path / "epoch_0_step_9")
    assert model.directory == shards
    assert len(model.notices) == 2 and str(consolidated) in model.notices[1]
    assert find_model(shards).notices == ()  # that is a checkpoint by itself


def test_what_is_not_complete_is_passed_over(tmp_path: Path) -> None:
    """Half a file, a shard that is missing, no config.json, a save that goes on."""
    for step in range(1, 6):
        save(tmp_path / f"checkpoint-{step}")
    truncate(tmp_path / "checkpoint-5")
    touch(tmp_path / "checkpoint-4" / ".incomplete")
    (tmp_path / "checkpoint-3" / "config.json").unlink()
    micro.write_json(
        tmp_path / "checkpoint-2" / "model.safetensors.index.json", {"weight_map": {"a": "x-00002.safetensors"}}
    )
    (tmp_path / "checkpoint-2" / "model.safetensors").unlink()
    model = find_model(tmp_path)
    assert model.directory == tmp_path / "checkpoint-1"
    _, *passed_over = model.notices
    for note, step, why in zip(
        passed_over, (5, 4, 3, 2), ("truncated", "not finished", "no config.json", "missing"), strict=True
    ):
        assert note.startswith(f"passed over what is not complete: {tmp_path / f'checkpoint-{step}'}")
        assert why in note and "\n" not in note
    truncate(tmp_path / "checkpoint-1")
    with pytest.raises(SourceError, match="5 saves of a model, and none is complete") as caught:
        find_model(tmp_path)
    assert caught.value.found is not None and len(caught.value.found.splitlines()) == 5


def test_the_only_one_says_itself_what_is_wrong(tmp_path: Path) -> None:
    truncate(save(tmp_path / "checkpoint-5"))
    with pytest.raises(CheckpointError, match=r"checkpoint-5.*truncated"):
        find_model(tmp_path)


AMBIGUOUS: dict[str, list[str]] = {
    "two runs": ["a/checkpoint-9", "b/checkpoint-9"],
    "a run and what was made of it": ["checkpoint-9", "merged"],
    "two models of a step": ["checkpoint-9/student", "checkpoint-9/teacher"],
}


@pytest.mark.parametrize("saves", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_of_several_models_none_is_taken(tmp_path: Path, saves: list[str]) -> None:
    for each in saves:
        save(tmp_path / each)
    save(tmp_path / "a" / "checkpoint-8")
    with pytest.raises(SourceError, match="several models") as caught:
        find_model(tmp_path)
    assert caught.value.found is not None
    assert set(map(str, (tmp_path / each for each in saves))) <= set(caught.value.found.splitlines())


def test_of_many_models_some_are_listed(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / f"run{i:02d}")
    with pytest.raises(SourceError) as caught:
        find_model(tmp_path)
    assert caught.value.found is not None and caught.value.found.splitlines()[-1] == "and 12 more"


def test_only_adapters(tmp_path: Path) -> None:
    for step in (9, 10):
        touch(tmp_path / f"checkpoint-{step}" / "adapter_config.json")
    with pytest.raises(SourceError, match="only adapters, no model") as caught:
        find_model(tmp_path)
    assert caught.value.found is not None and len(caught.value.found.splitlines()) == 2
    assert caught.value.fix is not None and caught.value.fix.endswith(f"--adapter {tmp_path / 'checkpoint-10'}")
    touch(tmp_path / "adapter_config.json")
    with pytest.raises(SourceError, match="a PEFT adapter") as caught:
        find_model(tmp_path)
    assert caught.value.fix is not None and caught.value.fix.endswith(f"--adapter {tmp_path}")
    merged = save(tmp_path / "merged")
    assert find_model(tmp_path).directory == merged


PICKLES: dict[str, tuple[str, str]] = {
    # a file, the command that makes safetensors of it
    "Automodel": (
        "epoch_0_step_9/model/__0_0.distcp",
        "scripts/export_llm_dcp_to_hf.py --checkpoint-dir {}/epoch_0_step_9 --output-dir DIR",
    ),
    "accelerate": (
        "checkpoint-9/pytorch_model_fsdp_0/__0_0.distcp",
        "accelerate merge-weights {}/checkpoint-9/pytorch_model_fsdp_0 DIR",
    ),
    "DCP": (
        "checkpoint-9/__0_0.distcp",
        "torch.distributed.checkpoint.format_utils dcp_to_torch {}/checkpoint-9 DIR/pytorch_model.bin",
    ),
    "FSDP, whole": (
        "checkpoint-9/pytorch_model_fsdp.bin",
        "{0}/checkpoint-9/model.safetensors {0}/checkpoint-9/pytorch_model_fsdp.bin",
    ),
    "pickle": (
        "checkpoint-9/pytorch_model.bin",
        "{0}/checkpoint-9/model.safetensors {0}/checkpoint-9/pytorch_model.bin",
    ),
    "DeepSpeed": ("checkpoint-9/zero_to_fp32.py", "python {0}/checkpoint-9/zero_to_fp32.py {0}/checkpoint-9 DIR"),
}


@pytest.mark.parametrize(("name", "command"), PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("folder", ["run", "my run; echo"])
def test_pickles_with_the_command_that_converts_them(tmp_path: Path, name: str, command: str, folder: str) -> None:
    """Found where they are, in words that a shell takes as they stand."""
    root = tmp_path / folder
    touch(root / name)
    touch(root / "checkpoint-9" / "optimizer_0" / "__0_0.distcp")
    with pytest.raises(SourceError) as caught:
        find_model(root)
    assert caught.value.fix is not None
    assert (
        shlex.split(command.format("ROOT"))
        == [text.replace(str(root), "ROOT") for text in shlex.split(caught.value.fix)][-len(command.split()) :]
    )


def test_what_is_not_looked_into(tmp_path: Path) -> None:
    """Links, hidden folders, what is copied just now, optimizers; and nothing far below."""
    elsewhere = save(tmp_path / "elsewhere")
    run = tmp_path / "run"
    for name in (".cache", "tmp-checkpoint-9", "optim", "a/b/c/d/e/f"):
        save(run / name)
    os.symlink(elsewhere, run / "LATEST")
    with pytest.raises(SourceError, match="no checkpoint here"):
        find_model(run)


def test_too_many_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FOLDERS", 5)
    for i in range(6):
        (tmp_path / f"{i}").mkdir()
    with pytest.raises(SourceError, match="too many folders"):
        find_model(tmp_path)
