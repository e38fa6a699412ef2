"""What trainers write: every layout gives the bytes of the same weights saved plainly, in every command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

import gguf3n
from gguf3n.errors import CheckpointError, MappingError
from gguf3n.formats.checkpoint import INDEX, read_header
from gguf3n.formats.rows import SideBySide
from tests import micro, sharded
from tests.formats import test_pieces

Arrays: TypeAlias = Mapping[str, np.ndarray]

NAME = "gem"
"""Of every folder: it is the model's, and in the files."""
QUANTS = ("BF16", "Q8_0")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.make(tmp_path_factory.mktemp("plain") / NAME)


@pytest.fixture(scope="module")
def run(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training with NeMo Automodel: a save of torch's own writer."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("run") / NAME
    sharded.write(plain, folder / "checkpoints" / "epoch_1_step_200" / "model")
    return folder


def shards(run: Path) -> Path:
    return run / "checkpoints" / "epoch_1_step_200" / "model"


def converted(source: str | Path | gguf3n.Source, directory: Path, **options: str) -> list[bytes]:
    return [each.path.read_bytes() for each in gguf3n.convert(source, QUANTS, directory, **options)]


@pytest.fixture(scope="module")
def expected(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return converted(plain, tmp_path_factory.mktemp("expected"))


@pytest.fixture(scope="module")
def ranks(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of the ranks only, with `.hf_metadata`, as a training leaves them before its last step."""
    folder = tmp_path_factory.mktemp("ranks") / NAME
    shutil.copytree(shards(run), folder, ignore=shutil.ignore_patterns("consolidated", "pickles"))
    return folder


def test_the_shards_of_ranks(ranks: Path, expected: list[bytes], tmp_path: Path) -> None:
    """Rows in three, columns in two, of different sizes; vectors in three."""
    model = gguf3n.read_source(ranks)
    forms = [type(rows) for rows in model.tensors["model.language_model.layers.0.mlp.up_proj.weight"].rows]
    assert forms == [SideBySide] * 3
    assert {path for path in model.files if path.suffix} == set(ranks.glob("shard-*"))
    assert (model.path, model.notices) == (ranks / ".hf_metadata", ())
    assert converted(model, tmp_path) == expected


def test_the_folder_of_a_training(run: Path, ranks: Path, expected: list[bytes], tmp_path: Path) -> None:
    """Consolidated by torch, or not yet."""
    model = gguf3n.read_source(run)
    assert model.path == shards(run) / "consolidated"
    assert model.notices == (f"took {model.path}, the newest complete model in {run}",)
    assert converted(model, tmp_path / "out") == expected
    not_yet = tmp_path / NAME / "epoch_0_step_9" / "model"
    shutil.copytree(ranks, not_yet)
    model = gguf3n.read_source(tmp_path / NAME)
    assert model.path == not_yet / ".hf_metadata"
    assert converted(model, tmp_path / "again") == expected


def in_two_shards(directory: Path, arrays: Arrays, names: Callable[[str], str] = str) -> None:
    """As save_pretrained does."""
    half, weight_map = len(arrays) // 2, {}
    for i, part in enumerate((list(arrays)[:half], list(arrays)[half:]), 1):
        file_name = f"model-{i:05d}-of-00002.safetensors"
        micro.write_safetensors(directory / file_name, {names(n): arrays[n] for n in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(map(names, part), file_name)
    micro.write_json(directory / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    (directory / "model.safetensors").unlink()


def unsloth(directory: Path, arrays: Arrays) -> None:
    """merged_16bit: the base's shards with other values."""
    in_two_shards(directory, arrays)
    (directory / "unsloth.py").write_bytes(b"")


def transformers_4(directory: Path, arrays: Arrays) -> None:
    """A checkpoint of TRL, with what else it needs to go on."""
    in_two_shards(directory, arrays)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (directory / name).write_bytes(b"")


def transformers_5(directory: Path, arrays: Arrays) -> None:
    """The text model alone, in its own names."""
    in_two_shards(directory, arrays, lambda name: name.replace("model.language_model.", "model."))


def automodel(directory: Path, arrays: Arrays) -> None:
    """v4_compatible: the original config.json, and beside it that of transformers 5, which is not read."""
    in_two_shards(directory, arrays)
    for name in ("config.v5.json", "generation_config.v5.json"):
        (directory / name).write_text("{nope", "utf-8")


def one_rank(directory: Path, arrays: Arrays) -> None:
    """NeMo Automodel on one GPU."""
    (directory / "model.safetensors").unlink()
    test_pieces.write(
        directory / test_pieces.shard(1), {name: (array, [0] * array.ndim) for name, array in arrays.items()}
    )
    beside = [path for path in directory.iterdir() if path.suffix != ".safetensors"]
    (directory / ".hf_metadata").mkdir()
    for path in beside:
        path.rename(directory / ".hf_metadata" / path.name)


@pytest.mark.parametrize("save", [unsloth, transformers_4, transformers_5, automodel, one_rank])
@pytest.mark.parametrize("shared_kv", [True, False], ids=["shared kv", "no shared kv"])
def test_a_layout(save: Callable[[Path, Arrays], None], shared_kv: bool, plain: Path, tmp_path: Path) -> None:
    """By its folder, and by that of its training."""
    shared = re.compile(r".*\.layers\.2\.self_attn\.(k_proj|v_proj|k_norm)\.weight")  # of three layers the last
    arrays = micro.tensors(micro.config())
    if not shared_kv:
        arrays = {name: array for name, array in arrays.items() if not shared.fullmatch(name)}
        assert len(arrays) == len(micro.tensors(micro.config())) - 3
    expected = converted(micro.make(tmp_path / "plain" / NAME, arrays=arrays), tmp_path / "expected")
    saved = micro.make(tmp_path / "run" / NAME / "checkpoint-7", arrays=arrays)
    save(saved, arrays)
    assert converted(tmp_path / "run" / NAME, tmp_path / "out") == expected
    saved.rename(tmp_path / NAME)
    assert converted(tmp_path / NAME, tmp_path / "again") == expected


def test_vision_and_audio_in_pieces(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Of convolutions too; matrices in columns."""
    whole, cut = make_checkpoint(multimodal=True), tmp_path / "cut"
    shutil.copytree(whole, cut / ".hf_metadata", ignore=shutil.ignore_patterns("*.safetensors"))
    raw = np.memmap(whole / "model.safetensors", np.uint8, "r")
    files: list[dict[str, tuple[np.ndarray, list[int]]]] = [{}, {}, {}]
    for stored in read_header(whole / "model.safetensors"):
        array = raw[stored.offset : stored.offset + stored.stored_bytes].view(np.uint16).reshape(stored.shape)
        axis = 1 if array.ndim == 2 and array.shape[1] > 2 else 0
        begin = 0
        for file, piece in zip(files, np.array_split(array, 3, axis) if array.ndim else [array], strict=False):
            file[stored.name] = piece, [begin if dimension == axis else 0 for dimension in range(array.ndim)]
            begin += piece.shape[axis] if array.ndim else 0
    for rank, file in enumerate(files, 1):
        test_pieces.write(cut / test_pieces.shard(rank), file)
    one, other = (
        gguf3n.convert(source, (), tmp_path / f"{i}.gguf", mmproj="F16") for i, source in enumerate((whole, cut))
    )
    keys = [
        {key.name: key.value for key in each.plan.part.keys if key.name != "general.name"} for (each,) in (one, other)
    ]
    assert keys[0] == keys[1]
    data = [gguf3n.open_gguf(each.path) for (each,) in (one, other)]
    for name, tensor in data[0].tensors.items():
        assert data[0].read(tensor, 0, tensor.n_bytes) == data[1].read(data[1].tensors[name], 0, tensor.n_bytes), name


def test_every_command_reads_the_shards(plain: Path, ranks: Path, tmp_path: Path) -> None:
    """Statistics, plans; tensors held against their source, and the logits of transformers; importances."""
    pytest.importorskip("transformers")
    from gguf3n.engines.reference import Reference

    one, other = (
        [(each.name, each.part.moments.n, each.part.minimum, each.part.maximum) for each in statistics.tensors]
        for statistics in map(gguf3n.measure_statistics, (plain, ranks))
    )
    assert sorted(one) == sorted(other)
    (written,) = gguf3n.convert(plain, "Q8_0", tmp_path)
    assert gguf3n.validate(written.path, ranks, stages="tensors").verdict is gguf3n.Verdict.PASS
    ids = [2, 17, 400, 33]
    for dtype in ("float32", "bfloat16"):
        with Reference(plain, dtype=dtype) as model, Reference(ranks, dtype=dtype) as again:
            assert np.array_equal(model.next_token_logprobs(ids), again.next_token_logprobs(ids))
    text = tmp_path / "text.txt"
    text.write_text("So it goes. " * 40, "utf-8")
    first, second = (
        gguf3n.measure_importance(source, [text], n_ctx=16, n_chunks=1, device="cpu") for source in (plain, ranks)
    )
    for name, entry in first.entries.items():
        assert np.array_equal(entry.sums, second.entries[name].sums), name


def test_a_rank_that_was_not_copied(ranks: Path, tmp_path: Path) -> None:
    """The last one's rows are missed by nobody but config.json."""
    shutil.copytree(ranks, tmp_path / NAME)
    for rank in (5, 6):
        for path in (tmp_path / NAME).glob(f"shard-{rank:05d}-*"):
            path.unlink()
    with pytest.raises(MappingError, match="wrong shape") as caught:
        gguf3n.convert(tmp_path / NAME, "Q8_0", tmp_path)
    assert caught.value.fix is not None and "all of them are there" in caught.value.fix


def test_a_shard_that_is_written_while_it_is_read(ranks: Path, tmp_path: Path) -> None:
    shutil.copytree(ranks, tmp_path / NAME)
    model = gguf3n.read_source(tmp_path / NAME)
    path = max((tmp_path / NAME).glob("shard-*"))
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match=f"{path.name}: changed while it was read"):
        gguf3n.convert(model, "Q8_0", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_pickles_become_safetensors_as_the_errors_say(run: Path, expected: list[bytes], tmp_path: Path) -> None:
    """The commands are run as they are printed: DCP's to a pickle, the pickle to safetensors."""
    made = tmp_path / NAME
    folder = shards(run) / "pickles"
    for _ in range(2):
        with pytest.raises(gguf3n.SourceError) as caught:
            gguf3n.read_source(folder)
        assert caught.value.fix is not None
        command = re.search(r"(mkdir DIR; )?python .*", caught.value.fix)
        assert command is not None
        told = command[0].replace("python", shlex.quote(sys.executable), 1).replace("DIR", shlex.quote(str(made)))
        subprocess.run(told, shell=True, check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}, timeout=300)
        folder = made
    shutil.copytree(shards(run) / ".hf_metadata", made, dirs_exist_ok=True)
    assert converted(made, tmp_path / "out") == expected
