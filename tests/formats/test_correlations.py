"""Files of correlations: what is written is read, added, refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguf3n.errors import Gguf3nError, GGUFError, UsageError
from gguf3n.formats.correlations import (
    DAMPING,
    Correlations,
    as_correlations,
    correlations_path,
    impossible,
    is_correlations,
    merge_correlations,
    read_correlations,
    write_correlations,
)
from gguf3n.formats.gguf_draft import Draft
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.gguf_reader import open_part
from gguf3n.formats.imatrix import Entry as ImatrixEntry
from gguf3n.formats.imatrix import ImportanceMatrix, write_imatrix
from tests import refining

NAMES = {"blk.0.attn_q.weight": 320, "blk.0.ffn_down.weight": 512, "token_embd.weight": 64}


def made(width: int = 256, seed: int = 0) -> Correlations:
    return refining.of_arrays({name: refining.sums_of(refining.inputs(n, seed), width) for name, n in NAMES.items()})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.gguf"
    write_correlations(made(), path)
    return path


@pytest.mark.parametrize("width", [256, 512])
def test_what_is_written_is_read(tmp_path: Path, width: int) -> None:
    path = tmp_path / "c.gguf"
    write_correlations(made(width), path)
    found = read_correlations(path)
    assert found.entries == made(width).entries
    assert (found.datasets, found.chunk_size, found.n_chunks) == (("text",), 100, refining.N_INPUTS // 100)
    assert found.total_bytes == sum(4 * n * min(n, width) for n in NAMES.values())
    assert found.largest_bytes == 4 * 512 * width
    for name in NAMES:
        assert np.array_equal(found.read(name), made(width).read(name))
    before = path.read_bytes()
    write_correlations(found, path, force=True)
    assert path.read_bytes() == before


def test_a_matrix_is_a_mean_with_a_hundredth_of_its_diagonal() -> None:
    name = "blk.0.ffn_down.weight"
    found, sums = made().matrix(name), made().read(name)
    means = sums / np.float32(refining.N_INPUTS)
    diagonal = np.arange(512), np.arange(512) % 256
    assert found[diagonal] == pytest.approx(means[diagonal] * (1 + DAMPING))
    found[diagonal] = means[diagonal]
    assert np.array_equal(found, means)


def test_files_are_added(tmp_path: Path) -> None:
    one, other = made(seed=1), made(seed=2)
    merged = merge_correlations([one, other])
    write_correlations(merged, tmp_path / "m.gguf")
    found = read_correlations(tmp_path / "m.gguf")
    assert found.datasets == ("text", "text") and found.n_chunks == 2 * refining.N_INPUTS // 100
    for name in NAMES:
        assert np.array_equal(found.read(name), one.read(name) + other.read(name))


def test_a_file_is_told_by_its_kind(file: Path, tmp_path: Path) -> None:
    imatrix = tmp_path / "i.gguf"
    write_imatrix(ImportanceMatrix(imatrix, {"x": ImatrixEntry(np.ones((1, 32), "f4"), np.ones(1, "f4"))}), imatrix)
    assert is_correlations(file)
    assert not is_correlations(imatrix)
    assert not is_correlations(tmp_path / "missing.gguf")
    with pytest.raises(GGUFError, match="not correlations"):
        read_correlations(imatrix)


def test_what_may_be_given() -> None:
    assert as_correlations(None) is None
    given = made()
    assert as_correlations(given) is given
    with pytest.raises(UsageError, match="not correlations"):
        as_correlations(3)  # type: ignore[arg-type]


def test_where_they_go() -> None:
    assert correlations_path(Path("a/imatrix.gguf")) == Path("a/imatrix-correlations.gguf")


def other_version(path: Path) -> None:
    draft = Draft(open_part(path))
    draft.set(KeyValue("correlations.version", GGUFValueType.UINT32, 2))
    draft.save()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def without_counts(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"token_embd.weight.counts", b"token_embd.weight.coints"))


def no_inputs(path: Path) -> None:
    tensor = open_part(path).tensors["token_embd.weight.counts"]
    with open(path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(np.zeros(1, "<f4").tobytes())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (other_version, "another version"),
        (truncated, "c.gguf"),
        (without_counts, "'token_embd.weight' is incomplete"),
        (no_inputs, "counted 0 inputs"),
    ],
)
def test_a_file_that_cannot_be_used(file: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(file)
    with pytest.raises(GGUFError, match=said):
        read_correlations(file)


def test_blocks_of_another_width(tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    write_correlations(refining.of_arrays({"x": refining.sums_of(refining.inputs(512), 128)}), path)
    with pytest.raises(GGUFError, match="'x' has blocks of 128 columns"):
        read_correlations(path)


def spoiled(change: Callable[[np.ndarray], None]) -> np.ndarray:
    sums = refining.sums_of(refining.inputs(512))
    change(sums)
    return sums


def set_at(row: int, column: int, value: float, *, both: bool = False) -> Callable[[np.ndarray], None]:
    def change(sums: np.ndarray) -> None:
        sums[row, column] = value
        if both:
            sums[column, row] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_at(3, 5, np.nan), "not finite"),
        (set_at(3, 5, np.inf, both=True), "not finite"),
        (set_at(300, 5, 1e3), "not symmetric in columns 256 to 511"),
        (set_at(300, 44, -1.0), "a negative sum of squares in column 300"),
        (set_at(256, 3, 1.0), "products with column 256, which is always zero"),
        (set_at(3, 5, 1e9, both=True), "not positive semidefinite in columns 0 to 255"),
    ],
)
def test_sums_that_no_inputs_give(change: Callable[[np.ndarray], None], said: str) -> None:
    sums = spoiled(change)
    if "always zero" in said:
        sums[259, 0] = 1.0
    assert said in impossible(sums)
    with pytest.raises(GGUFError, match=r"entry 'x'.*"):
        refining.of_arrays({"x": sums}).matrix("x")


def test_sums_of_few_inputs_are_possible() -> None:
    assert impossible(refining.sums_of(refining.inputs(512)[:3])) == ""
    assert impossible(refining.sums_of(refining.inputs(320), 320)) == ""
    assert impossible(np.zeros((64, 64), np.float32)) == ""


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "no correlations"),
        ([made(), made(512)], "another form"),
        ([made(), replace(made(), chunk_size=7)], "different sizes"),
    ],
    ids=["none", "other blocks", "other chunks"],
)
def test_what_cannot_be_added(files: list[Correlations], said: str) -> None:
    with pytest.raises(Gguf3nError, match=said):
        merge_correlations(files)
