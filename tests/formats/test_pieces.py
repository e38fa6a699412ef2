"""Tensors in pieces: any tiling gives the values of the whole; what does not tile is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf3n.errors import CheckpointError
from gguf3n.formats.checkpoint import SINGLE, read_tensor_table
from gguf3n.formats.pieces import INFO
from gguf3n.formats.rows import RowReader, SideBySide, SourceTensor, Stored
from tests import micro
from tests.mutation import every_run_alike

Box = tuple[slice, ...]


def shard(rank: int, number: int = 1, n_files: int = 1) -> str:
    return f"shard-{rank:05d}-model-{number:05d}-of-{n_files:05d}.safetensors"


def write(path: Path, pieces: Mapping[str, tuple[np.ndarray, Sequence[Any]]]) -> None:
    """One rank's file: the tensors' pieces, and where each begins."""
    info = {name: {"saved_offsets": list(offsets)} for name, (_, offsets) in pieces.items()}
    metadata = {INFO: json.dumps(info), "DCP_VERSION": "1.0"}
    micro.write_safetensors(path, {name: array for name, (array, _) in pieces.items()}, metadata)


def save(directory: Path, array: np.ndarray, boxes: Sequence[Box]) -> None:
    """A tensor "w", a box of it a rank."""
    for rank, box in enumerate(boxes, 1):
        write(directory / shard(rank), {"w": (array[box], [cut.start for cut in box])})


def values(tensor: SourceTensor) -> np.ndarray:
    """All of it, some rows at a time."""
    out = np.empty((sum(rows.n_rows for rows in tensor.rows), tensor.rows[0].n_per_row), np.float32)
    start = 0
    with closing(RowReader()) as reader:
        for rows in tensor.rows:
            for first in range(0, rows.n_rows, 3):
                n = min(3, rows.n_rows - first)
                reader.fill(rows, first, out[start : start + n])
                start += n
    return out.reshape(tensor.shape)


def box(*cuts: tuple[int, int]) -> Box:
    return tuple(slice(*cut) for cut in cuts)


TILINGS: dict[str, tuple[tuple[int, ...], list[Box]]] = {
    "one piece": ((7, 6), [box((0, 7), (0, 6))]),
    "rows": ((7, 6), [box((0, 3), (0, 6)), box((3, 6), (0, 6)), box((6, 7), (0, 6))]),
    "rows in another order": ((7, 6), [box((6, 7), (0, 6)), box((0, 3), (0, 6)), box((3, 6), (0, 6))]),
    "columns": ((7, 6), [box((0, 7), (0, 1)), box((0, 7), (1, 6))]),
    "a grid": ((7, 6), [box(rows, columns) for columns in ((0, 4), (4, 6)) for rows in ((0, 2), (2, 7))]),
    "no grid": ((5, 5), [box((0, 2), (0, 3)), box((0, 3), (3, 5)), box((2, 5), (0, 2)), box((3, 5), (2, 5)),
                         box((2, 3), (2, 3))]),
    "an empty piece": ((4, 3), [box((0, 4), (0, 3)), box((4, 4), (0, 3))]),
    "a vector": ((9,), [box((0, 5)), box((5, 9))]),
    "a scalar": ((), [()]),
    "a convolution": ((6, 4, 3, 3), [box((0, 5), (0, 4), (0, 3), (0, 3)), box((5, 6), (0, 4), (0, 3), (0, 3))]),
    "no weights": ((0, 4), [box((0, 0), (0, 4))]),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "boxes"), TILINGS.values(), ids=TILINGS)
def test_pieces_that_make_up_a_tensor(tmp_path: Path, shape: tuple[int, ...], boxes: list[Box]) -> None:
    array = np.arange(1, math.prod(shape) + 1, dtype=np.float32).reshape(shape)
    save(tmp_path, array, boxes)
    tensor = read_tensor_table(tmp_path)["w"]
    assert (tensor.shape, tensor.dtypes) == (shape, {"F32"})
    assert np.array_equal(values(tensor), array)


def test_rows_are_read_of_files_as_they_are(tmp_path: Path) -> None:
    """What FSDP cuts is no slower than what is whole: no form but `Stored`; only columns are put side by side."""
    array = np.zeros((8, 6), np.float32)
    save(tmp_path, array, [box((0, 4), (0, 6)), box((4, 8), (0, 2)), box((4, 8), (2, 6))])
    assert [type(rows) for rows in read_tensor_table(tmp_path)["w"].rows] == [Stored, SideBySide]


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, int], list[Box]]:
    """A matrix that is cut again and again, any piece in any place."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    boxes = [((0, shape[0]), (0, shape[1]))]
    for _ in range(draw(st.integers(0, 6))):
        rows, columns = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        is_row = draw(st.booleans())
        begin, end = rows if is_row else columns
        at = draw(st.integers(begin, end))
        halves = ((begin, at), (at, end))
        boxes += [(half, columns) if is_row else (rows, half) for half in halves]
    return shape, [box(*cuts) for cuts in draw(st.permutations(boxes))]


@every_run_alike
@given(tilings())
def test_any_tiling(tmp_path_factory: pytest.TempPathFactory, tiling: tuple[tuple[int, int], list[Box]]) -> None:
    shape, boxes = tiling
    directory = tmp_path_factory.mktemp("tiling")
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    save(directory, array, boxes)
    assert np.array_equal(values(read_tensor_table(directory)["w"]), array)


def test_a_plain_file_may_say_where_its_tensors_begin(tmp_path: Path) -> None:
    """Torch's writer says it of whole tensors too."""
    write(tmp_path / SINGLE, {"w": (np.ones((2, 3), np.float32), [0, 0])})
    assert [type(rows) for rows in read_tensor_table(tmp_path)["w"].rows] == [Stored]


UNTILED: dict[str, tuple[list[Box], str, str]] = {
    # boxes of a tensor of 6 x 6, what is wrong, where
    "no first rows": ([box((2, 6), (0, 6))], "leave a gap", "rows 0 to 1, columns 0 to 5 in none"),
    "no rows between": ([box((0, 2), (0, 6)), box((4, 6), (0, 6))], "leave a gap", "rows 2 to 3, columns 0 to 5"),
    "no last columns": ([box((0, 3), (0, 6)), box((3, 6), (0, 4))], "leave a gap", "rows 3 to 5, columns 4 to 5"),
    "a hole": ([box((0, 6), (0, 2)), box((0, 6), (4, 6))], "leave a gap", "rows 0 to 5, columns 2 to 3"),
    "rows twice": ([box((0, 4), (0, 6)), box((2, 6), (0, 6))], "overlap", "rows 2 to 3, columns 0 to 5 more than once"),
    "columns twice": ([box((0, 6), (0, 4)), box((0, 6), (3, 6))], "overlap", "rows 0 to 5, columns 3 to 3"),
    "the same piece twice": ([box((0, 6), (0, 6))] * 2, "overlap", "rows 0 to 5, columns 0 to 5"),
    "a corner only": ([box((0, 6), (0, 6)), box((5, 6), (5, 6))], "overlap", "rows 5 to 5, columns 5 to 5"),
}


@pytest.mark.parametrize(("boxes", "what", "where"), UNTILED.values(), ids=UNTILED)
def test_pieces_that_do_not_tile(tmp_path: Path, boxes: list[Box], what: str, where: str) -> None:
    save(tmp_path, np.zeros((6, 6), np.float32), boxes)
    with pytest.raises(CheckpointError) as caught:
        read_tensor_table(tmp_path)
    error = caught.value
    assert f"{tmp_path / shard(1)}: tensor 'w'" in error.what and what in error.what
    assert (
        error.found is not None and where in error.found and all(shard(i + 1) in error.found for i in range(len(boxes)))
    )
    assert error.expected == "each place of [6, 6] once" and error.fix is not None


def test_the_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    """One of several of a rank, so that the rank is there."""
    for rank in (1, 2, 3):
        for number in (1, 2):
            piece = np.zeros((2, 2), np.float32), [2 * (rank - 1), 0]
            write(tmp_path / shard(rank, number, 2), {f"w{number}": piece})
    (tmp_path / shard(2, 2, 2)).unlink()
    with pytest.raises(CheckpointError, match="'w2' and its other pieces leave a gap") as caught:
        read_tensor_table(tmp_path)
    assert caught.value.fix is not None and caught.value.fix.endswith(f": {shard(2, 2, 2)} is not there")


def test_pieces_that_are_not_alike(tmp_path: Path) -> None:
    write(tmp_path / shard(1), {"w": (np.zeros((2, 2), np.float32), [0, 0])})
    for other, offsets in ((np.zeros((2, 2), np.float16), [2, 0]), (np.zeros(2, np.float32), [2])):
        write(tmp_path / shard(2), {"w": (other, offsets)})
        with pytest.raises(CheckpointError, match=r"shard-00002.*'w' is not like its piece in shard-00001"):
            read_tensor_table(tmp_path)


def test_a_convolution_that_is_cut_in_its_middle(tmp_path: Path) -> None:
    save(tmp_path, np.zeros((4, 4, 3), np.float32), [box((0, 4), (0, 2), (0, 3)), box((0, 4), (2, 4), (0, 3))])
    with pytest.raises(CheckpointError, match="'w' is cut in a way that can't be read") as caught:
        read_tensor_table(tmp_path)
    assert caught.value.found == "[4, 2, 3] at [0, 0, 0], of [4, 4, 3]"


def test_many_files_are_not_all_named(tmp_path: Path) -> None:
    save(tmp_path, np.zeros((20, 1), np.float32), [box((2 * i, 2 * i + 1), (0, 1)) for i in range(10)])
    with pytest.raises(CheckpointError, match=r"shard-00005-[^,]* and 5 more"):
        read_tensor_table(tmp_path)


HOSTILE: dict[str, tuple[Any, str]] = {
    # what stands for the metadata's JSON, what is said
    "a number": (7, "malformed"),
    "an object": ({"w": {"saved_offsets": [0, 0]}}, "malformed"),
    "no JSON": ("{nope", "not JSON"),
    "a list": ("[]", "malformed"),
    "deep": ("[" * 100_000, "not JSON"),
    "half a character": ('{"\ud800": 1}', "not JSON"),
    "many lists": ("[" + "[]," * (1 << 21) + "[]]", "too many lists"),
    "many entries": (json.dumps({f"t{i}": {} for i in range(1_000_000)}, separators=(",", ":")), "malformed"),
    "no entry": ("{}", "malformed"),
    "an entry of another tensor": ('{"v": {"saved_offsets": [0, 0]}}', "malformed"),
    "an entry too many": ('{"w": {"saved_offsets": [0, 0]}, "v": {"saved_offsets": [0, 0]}}', "malformed"),
    "a null": ('{"w": null}', "unusable"),
    "no offsets": ('{"w": {}}', "unusable"),
    "offsets a number": ('{"w": {"saved_offsets": 0}}', "unusable"),
    "offsets a string": ('{"w": {"saved_offsets": "00"}}', "unusable"),
    "one offset": ('{"w": {"saved_offsets": [0]}}', "unusable"),
    "three offsets": ('{"w": {"saved_offsets": [0, 0, 0]}}', "unusable"),
    "negative": ('{"w": {"saved_offsets": [-1, 0]}}', "unusable"),
    "boolean": ('{"w": {"saved_offsets": [false, 0]}}', "unusable"),
    "fractional": ('{"w": {"saved_offsets": [0.0, 0]}}', "unusable"),
    "as large as no file": (f'{{"w": {{"saved_offsets": [{1 << 63}, 0]}}}}', "unusable"),
    "of 4,000 digits": (f'{{"w": {{"saved_offsets": [{"1" * 4000}, 0]}}}}', "unusable"),
    "of 5,000 digits": (f'{{"w": {{"saved_offsets": [{"1" * 5000}, 0]}}}}', "not JSON"),
    "far out": (f'{{"w": {{"saved_offsets": [{(1 << 63) - 1}, {(1 << 63) - 1}]}}}}', "leave a gap"),
}


@pytest.mark.parametrize(("info", "said"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_metadata(tmp_path: Path, info: object, said: str) -> None:
    micro.write_safetensors(tmp_path / shard(1), {"w": np.zeros((2, 3), np.float32)}, {INFO: info})
    with pytest.raises(CheckpointError) as caught:
        read_tensor_table(tmp_path)
    assert str(tmp_path / shard(1)) in caught.value.what
    assert said in caught.value.what
    assert INFO in caught.value.what or said in ("leave a gap", "too many lists")  # of the whole header
    assert len(str(caught.value)) < 1000


def test_other_metadata_is_nobody_s_business(tmp_path: Path) -> None:
    for metadata in ([], "DCP_SHARDING_INFO", {"format": "pt"}, {INFO: None}):
        micro.write_safetensors(tmp_path / SINGLE, {"w": np.ones((2, 3), np.float32)}, metadata)
        assert read_tensor_table(tmp_path)["w"].shape == (2, 3)


MISSING: dict[str, tuple[list[str], str, str]] = {
    # files, the one that is named, what is said
    "a rank": ([shard(1), shard(3)], "shard-00002-model-*.safetensors", "missing"),
    "the first rank": ([shard(2), shard(3)], "shard-00001-model-*.safetensors", "missing"),
    "a file of all ranks": ([shard(1, 1, 2), shard(2, 1, 2)], "shard-*-model-00002-of-00002.safetensors", "missing"),
    "two saves": ([shard(1, 1, 1), shard(1, 1, 2), shard(1, 2, 2)], shard(1, 1, 2), "another set"),
}


@pytest.mark.parametrize(("names", "named", "said"), MISSING.values(), ids=MISSING)
def test_files_that_are_missing(tmp_path: Path, names: list[str], named: str, said: str) -> None:
    for i, name in enumerate(names):
        write(tmp_path / name, {f"w{i}": (np.zeros((2, 2), np.float32), [0, 0])})
    with pytest.raises(CheckpointError) as caught:
        read_tensor_table(tmp_path)
    assert caught.value.what.startswith(f"{tmp_path / named}: ") and said in caught.value.what


def test_a_rank_with_nothing_of_a_file_writes_none(tmp_path: Path) -> None:
    write(tmp_path / shard(1, 1, 2), {"v": (np.zeros((2, 2), np.float32), [0, 0])})
    write(tmp_path / shard(2, 2, 2), {"w": (np.zeros((2, 2), np.float32), [0, 0])})
    assert sorted(read_tensor_table(tmp_path)) == ["v", "w"]


def test_a_truncated_shard(tmp_path: Path) -> None:
    save(tmp_path, np.zeros((4, 4), np.float32), [box((0, 2), (0, 4)), box((2, 4), (0, 4))])
    path = tmp_path / shard(2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"shard-00002.*truncated"):
        read_tensor_table(tmp_path)
