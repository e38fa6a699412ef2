"""An importance matrix against a model: what fits, what is told, what is refused; what it changes in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.errors import QuantizationError
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.quants import QUANTIZERS, QType


@pytest.fixture(scope="module")
def part(tiny_checkpoint: Path) -> Part:
    return text_part(gguf3n.read_source(tiny_checkpoint))


def measured(part: Part, seed: int = 0) -> dict[str, Entry]:
    """What llama-imatrix has entries for: the matrices of each layer that are evaluated."""
    rng = np.random.default_rng(seed)
    return {
        tensor.name: Entry(rng.random((1, tensor.n_per_row), np.float32) + 0.1, np.array([64], np.float32))
        for tensor in part.tensors
        if tensor.bid is not None and tensor.evaluated and len(tensor.shape) == 2
    }


def test_a_full_matrix_has_nothing_to_tell(part: Part) -> None:
    importance = match_importance(ImportanceMatrix(Path("i.gguf"), measured(part), ("a.txt",), 5, 512), part)
    assert importance.notices == ()
    assert {key.name: key.value for key in importance.keys} == {
        "quantize.imatrix.file": "i.gguf",
        "quantize.imatrix.dataset": "a.txt",
        "quantize.imatrix.entries_count": len(importance.quant_weights),
        "quantize.imatrix.chunks_count": 5,
    }


def test_unevaluated_matrices_need_no_entry(part: Part) -> None:
    lacking = {t.name for t in part.tensors if t.storage is Storage.QUANTIZABLE and t.bid and not t.evaluated}
    assert lacking == {f"blk.{bid}.attn_{k}.weight" for bid in (20, 21) for k in "kv"}


def test_what_does_not_cover_is_told(part: Part) -> None:
    entries = measured(part)
    del entries["blk.3.ffn_up.weight"]
    entries["blk.99.ffn_up.weight"] = entries["blk.2.ffn_up.weight"]
    entries["blk.2.ffn_up.weight"] = Entry(entries["blk.2.ffn_up.weight"].sums, np.zeros(1, np.float32))
    notices = match_importance(ImportanceMatrix(Path("i.gguf"), entries), part).notices
    assert [part in notice for part, notice in zip(("blk.99", "blk.2.", "blk.3."), notices, strict=True)] == [True] * 3


def test_importances_that_are_all_zero_are_told(part: Part) -> None:
    entries = measured(part)
    name = "blk.2.ffn_up.weight"
    entries[name] = Entry(np.zeros_like(entries[name].sums), entries[name].counts)
    (notice,) = match_importance(ImportanceMatrix(Path("i.gguf"), entries), part).notices
    assert "all zero" in notice and notice.endswith(name)


@pytest.mark.parametrize("kind", ["other names", "other lengths"])
def test_another_models_matrix_is_refused(part: Part, kind: str) -> None:
    entries = measured(part)
    if kind == "other names":
        entries = {f"model.{name}": entry for name, entry in entries.items()}
    else:
        entries["blk.0.attn_q.weight"] = Entry(np.ones((1, 64), np.float32), np.ones(1, np.float32))
    with pytest.raises(QuantizationError, match=r"importance matrix|does not fit"):
        match_importance(ImportanceMatrix(Path("i.gguf"), entries), part)


def test_the_file_has_the_weighted_bytes_and_the_keys(part: Part, tiny_checkpoint: Path, tmp_path: Path) -> None:
    entries = measured(part)
    write_imatrix(ImportanceMatrix(tmp_path / "i.gguf", entries, ("a.txt",), 5, 512), tmp_path / "i.gguf")
    (plain,) = gguf3n.convert(tiny_checkpoint, "F32", tmp_path / "f32.gguf")
    (with_weights,) = gguf3n.convert(
        tiny_checkpoint, "Q4_0@llama.cpp", tmp_path / "q.gguf", imatrix=tmp_path / "i.gguf"
    )
    source, result = gguf3n.open_gguf(plain.path), gguf3n.open_gguf(with_weights.path)
    assert result.value("quantize.imatrix.entries_count") == len(entries)
    weighted = QUANTIZERS[QType.Q4_0].weighted
    assert weighted is not None
    for name in ("blk.0.attn_q.weight", "blk.21.ffn_down.weight", "blk.21.attn_k.weight"):
        tensor = source.tensors[name]
        rows = np.fromfile(plain.path, "<f4", tensor.n_weights, offset=tensor.offset).reshape(tensor.shape)
        out = np.empty((tensor.shape[0], tensor.shape[1] // 32 * 18), np.uint8)
        if name in entries:
            weighted(rows, entries[name].quant_weights.reshape(-1), out)
        else:
            QUANTIZERS[QType.Q4_0].plain(rows, out)
        written = result.tensors[name]
        assert (
            np.fromfile(with_weights.path, np.uint8, written.n_bytes, offset=written.offset).tobytes() == out.tobytes()
        )
