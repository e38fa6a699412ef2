"""Checkpoints that are written: the same tensors by the safetensors package, shards of a size, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from gguf3n.errors import CheckpointError, OutputError, UsageError
from gguf3n.formats import safetensors_writer
from gguf3n.formats.checkpoint import read_tensor_table
from gguf3n.formats.rows import SourceTensor, Stored, View, Zeros, cut
from gguf3n.formats.safetensors_writer import write_checkpoint
from tests import micro


@pytest.fixture
def tensors(tmp_path: Path) -> list[SourceTensor]:
    """Of each dtype and form that is copied: 8 to 1,200 bytes."""
    (tmp_path / "source").mkdir()
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((20, 15), np.float32),
        "b": rng.standard_normal((2, 3, 4), np.float32).astype(np.float16),
        "c": rng.integers(0, 1 << 16, 9).astype(np.uint16),
    }
    micro.write_safetensors(tmp_path / "source" / "model.safetensors", arrays)
    table = read_tensor_table(tmp_path / "source")
    (stored,) = table["a"].rows
    assert isinstance(stored, Stored)
    view = View(stored, range(2, 8), (range(3, 5), range(14, 15)))
    parts = (cut(stored, range(3)), cut(stored, range(7, 9)))
    return [*table.values(), SourceTensor("view", (6, 3), (view,)), SourceTensor("parts", (5, 15), parts)]


@pytest.mark.parametrize(("max_bytes", "n_shards"), [(10**6, 1), (1300, 2), (1, 5)])
def test_the_package_reads_the_same(
    tensors: list[SourceTensor], max_bytes: int, n_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_writer, "CHUNK_WEIGHTS", 31)
    copied: list[int] = []
    out = tmp_path / "out"
    small = {"config.json": b"{}", "additional_chat_templates/x.jinja": b"x"}
    paths = write_checkpoint(out, tensors, small, max_shard_bytes=max_bytes, copied=copied.append)
    assert set(paths) == {path for path in out.rglob("*") if path.is_file()}
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == n_shards
    found = {}
    for shard in shards:
        with safe_open(shard, "np") as file:
            assert file.metadata() == {"format": "pt"}
            names = set(file.keys())
            assert names
            found |= {name: file.get_tensor(name) for name in names - {"c"}}
    a = found["a"]
    assert (a.shape, found["b"].dtype, found["b"].shape) == ((20, 15), np.float16, (2, 3, 4))
    assert np.array_equal(found["view"], a[2:8, [3, 4, 14]])
    assert np.array_equal(found["parts"], a[[0, 1, 2, 7, 8]])
    table = read_tensor_table(out)
    assert {name: (*t.dtypes, t.shape) for name, t in table.items()} == {
        tensor.name: (*tensor.dtypes, tensor.shape) for tensor in tensors
    }
    assert sum(copied) == sum(tensor.rows[0].stored_bytes for tensor in table.values())
    if n_shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(copied) and set(index["weight_map"]) == set(table)


def test_a_directory_that_is_not_empty_is_left_alone(tensors: list[SourceTensor], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is not empty"):
        write_checkpoint(tmp_path / "source", tensors, {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is not a directory"):
        write_checkpoint(tmp_path / "file", tensors, {})


def test_what_a_killed_run_has_left_is_removed(tensors: list[SourceTensor], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".model.safetensors.0123abcd.partial").write_bytes(b"half")
    write_checkpoint(out, tensors, {})
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("is_new", [True, False])
def test_nothing_is_left_of_what_goes_wrong(tensors: list[SourceTensor], is_new: bool, tmp_path: Path) -> None:
    """A source that became shorter, when the first shard is complete."""
    out = tmp_path / "out"
    if not is_new:
        out.mkdir()
    source = tmp_path / "source" / "model.safetensors"
    source.write_bytes(source.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="became shorter"):
        write_checkpoint(out, tensors, {"folder/x": b"x"}, max_shard_bytes=1)
    assert out.exists() != is_new
    assert is_new or not list(out.iterdir())


def test_a_source_that_changes_is_an_error(tensors: list[SourceTensor], tmp_path: Path) -> None:
    def change(_: int) -> None:
        (tmp_path / "source" / "model.safetensors").touch()

    with pytest.raises(CheckpointError, match="changed while it was read"):
        write_checkpoint(tmp_path / "out", tensors, {}, copied=change)
    assert not (tmp_path / "out").exists()


def test_what_no_file_has_is_refused(tensors: list[SourceTensor], tmp_path: Path) -> None:
    zeros = SourceTensor("zeros", (3, 4), (Zeros(3, 4),))
    nested = SourceTensor("nested", (2, 2), (View(tensors[3].rows[0], range(2), (range(2),)),))
    mixed = SourceTensor("mixed", (7, 15), (*tensors[0].rows, *tensors[1].rows))
    for tensor in (zeros, nested, mixed):
        with pytest.raises(UsageError, match="can't be copied"):
            write_checkpoint(tmp_path / "out", [tensors[0], tensor], {})
        assert not (tmp_path / "out").exists()
