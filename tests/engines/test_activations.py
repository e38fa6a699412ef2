"""Importance matrices from the reference: llama-imatrix's names, counts and values; chunks, texts, tables, faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n.engines.activations import (
    Measurement,
    measure_chunks,
    measure_importance,
    read_texts,
)
from gguf3n.engines.reference import Reference
from gguf3n.engines.reference_tokenizers import open_reference
from gguf3n.errors import QuantizationError, SourceError, UsageError
from gguf3n.formats.checkpoint import read_tensor_table
from gguf3n.formats.correlations import impossible
from gguf3n.formats.imatrix import ImportanceMatrix, merge_imatrices, write_imatrix
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.source import open_source
from gguf3n.progress import Progress
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from workshop.imatrix_comparison import GOLDEN, N_CHUNKS, N_CTX, TEXT, limit

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SHORT = 64
TABLES = {TOKEN_EMBD, PER_LAYER_TOKEN_EMBD}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))
    assert recorded["provenance"].startswith("llama-imatrix of ")
    assert (recorded["n_ctx"], recorded["n_chunks"], recorded["text"]) == (N_CTX, N_CHUNKS, TEXT.name)
    return recorded


@pytest.fixture(scope="module")
def measured(tiny_checkpoint: Path) -> list[Measurement]:
    """What is known after each chunk of the recorded run."""
    return list(measure_chunks(tiny_checkpoint, [TEXT], n_ctx=N_CTX, n_chunks=N_CHUNKS, device="cpu"))


@pytest.fixture(scope="module")
def two_chunks(tiny_checkpoint: Path) -> ImportanceMatrix:
    return measure_importance(tiny_checkpoint, [TEXT], n_ctx=SHORT, n_chunks=2, device="cpu")


def apart(one: ImportanceMatrix, other: ImportanceMatrix) -> float:
    """The largest difference of any value, as a share of its entry's largest."""
    assert one.entries.keys() == other.entries.keys()
    return max(
        float(np.abs(entry.sums - other.entries[name].sums).max() / entry.sums.max())
        for name, entry in one.entries.items()
    )


def test_names_and_counts_are_those_of_llama_imatrix(golden: dict[str, Any], measured: list[Measurement]) -> None:
    imatrix = measured[-1].imatrix
    assert set(imatrix.entries) - TABLES == set(golden["entries"])
    for name, recorded in golden["entries"].items():
        entry = imatrix.entries[name]
        assert (entry.sums.size, entry.counts.tolist()) == (recorded["columns"], [recorded["count"]]), name
    assert (imatrix.chunk_count, imatrix.chunk_size) == (golden["chunk_count"], N_CTX)
    assert imatrix.n_chunks == N_CHUNKS


def test_values_are_those_of_llama_imatrix(golden: dict[str, Any], measured: list[Measurement]) -> None:
    for name, recorded in golden["entries"].items():
        sums = measured[-1].imatrix.entries[name].sums.astype(np.float64)
        assert sums.sum() == pytest.approx(recorded["sum"], rel=limit(name)), name
        assert np.linalg.norm(sums) == pytest.approx(recorded["norm"], rel=limit(name)), name


def test_14_matrices_a_layer_and_the_tables(measured: list[Measurement]) -> None:
    kinds: dict[str, list[int]] = {}
    for name in measured[-1].sums:
        if name not in TABLES:
            _, bid, kind, _ = name.split(".")
            kinds.setdefault(kind, []).append(int(bid))
    assert len(kinds) == 14
    for kind, bids in kinds.items():
        assert sorted(bids) == list(range(20 if kind in ("attn_k", "attn_v") else 22))
    assert measured[-1].sums.keys() >= TABLES


def test_a_checkpoint_with_only_tokenizer_model(
    two_chunks: ImportanceMatrix, make_checkpoint: Callable[..., Path]
) -> None:
    """Its tokens are the same: transformers' own reading of such a file has no begin mark."""
    source = make_checkpoint(tokenizer="model")
    assert apart(measure_importance(source, [TEXT], n_ctx=SHORT, n_chunks=2, device="cpu"), two_chunks) == 0


def test_entries_of_the_tables(tiny_checkpoint: Path, two_chunks: ImportanceMatrix) -> None:
    """An oracle without hooks: the output of the last norm, and gates computed from what went into them."""
    tokens = open_reference(open_source(tiny_checkpoint)).encode(TEXT.read_text("utf-8"), special=False)
    seen: list[Any] = []
    with Reference(tiny_checkpoint, device="cpu") as reference:
        gate = reference.model.model.layers[3].per_layer_input_gate
        gate.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][0]))
        chunks = [tokens[:SHORT], [tokens[0], *tokens[SHORT + 1 : 2 * SHORT]]]
        hidden = torch.cat([reference.run(chunk) for chunk in chunks]).double().numpy()
        with torch.no_grad():
            gates = torch.nn.functional.gelu(torch.cat(seen) @ gate.weight.T, approximate="tanh").double().numpy()
    entries = two_chunks.entries
    assert entries[TOKEN_EMBD].sums[0] == pytest.approx(np.square(hidden).sum(0), rel=1e-5)
    third = entries[PER_LAYER_TOKEN_EMBD].sums[0, 3 * 256 : 4 * 256]
    assert third == pytest.approx(np.square(gates).sum(0), rel=1e-3)
    assert entries[PER_LAYER_TOKEN_EMBD].sums.shape == (1, 22 * 256)
    assert entries[TOKEN_EMBD].counts == entries[PER_LAYER_TOKEN_EMBD].counts == [2 * SHORT]


def test_without_tables(tiny_checkpoint: Path, two_chunks: ImportanceMatrix) -> None:
    bare = measure_importance(tiny_checkpoint, [TEXT], n_ctx=SHORT, n_chunks=1, tables=False, device="cpu")
    assert set(two_chunks.entries) - set(bare.entries) == TABLES


def test_progress_says_how_far_it_is(measured: list[Measurement]) -> None:
    assert [each.n_done for each in measured] == [1, 2, 3, 4]
    assert {each.n_chunks for each in measured} == {N_CHUNKS}
    assert all(100 < each.perplexity < 1e5 for each in measured)
    assert [len(each.seen) for each in measured] == sorted(len(each.seen) for each in measured)
    assert 2 in measured[0].seen and measured[0].n_vocab == 1088
    first = measured[0].imatrix.entries["blk.0.attn_q.weight"]
    assert first.counts == [N_CTX], "what came later must not change what was given out"


def test_progress_is_told_after_each_chunk_whatever_the_source_is_given_as(
    tiny_checkpoint: Path, two_chunks: ImportanceMatrix
) -> None:
    for source in (str(tiny_checkpoint), open_source(tiny_checkpoint)):
        seen: list[Progress] = []
        again = measure_importance(source, [str(TEXT)], n_ctx=SHORT, n_chunks=2, device="cpu", progress=seen.append)
        assert [(state.stage, state.done, state.total, state.unit) for state in seen] == [
            ("measuring", done, 2, "chunks") for done in (1, 2)
        ]
        assert apart(again, two_chunks) == 0


def test_a_gguf_file_cannot_be_measured(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (written,) = gguf3n.convert(tiny_checkpoint, "F16", tmp_path)
    with pytest.raises(SourceError, match="a GGUF file"):
        measure_importance(written.path, [TEXT], device="cpu")


def test_parts_merge_to_the_whole(tiny_checkpoint: Path, two_chunks: ImportanceMatrix) -> None:
    parts = [
        measure_importance(tiny_checkpoint, [TEXT], n_ctx=SHORT, n_chunks=1, first_chunk=k, device="cpu")
        for k in (0, 1)
    ]
    merged = merge_imatrices(parts)
    assert apart(merged, two_chunks) < 1e-6
    assert all(np.array_equal(merged.entries[n].counts, entry.counts) for n, entry in two_chunks.entries.items())
    assert merged.chunk_count == two_chunks.chunk_count
    assert apart(parts[0], parts[1]) > 1e-2


def test_several_texts_are_one(tiny_checkpoint: Path, two_chunks: ImportanceMatrix, tmp_path: Path) -> None:
    lines = TEXT.read_text("utf-8").splitlines(keepends=True)
    parts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    parts[0].write_text("".join(lines[:3]), "utf-8")
    parts[1].write_text("".join(lines[3:]), "utf-8")
    assert read_texts(parts) == read_texts([TEXT])
    again = measure_importance(tiny_checkpoint, parts, n_ctx=SHORT, n_chunks=2, device="cpu")
    assert apart(again, two_chunks) == 0
    assert again.datasets == tuple(map(str, parts))


def test_special_tokens_are_text_unless_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "chat.txt"
    text.write_text("<start_of_turn>user\nWhere is the harbour?<end_of_turn>\n" * 8, "utf-8")
    plain, special = (
        next(measure_chunks(tiny_checkpoint, [text], n_ctx=16, special=special, device="cpu"))
        for special in (False, True)
    )
    assert {105, 106} <= special.seen and not {105, 106} & plain.seen


def test_the_result_fits_the_model_and_changes_its_bytes(
    tiny_checkpoint: Path, two_chunks: ImportanceMatrix, tmp_path: Path
) -> None:
    model = gguf3n.read_source(tiny_checkpoint)
    importance = match_importance(two_chunks, text_part(model))
    assert importance.notices == ()
    write_imatrix(two_chunks, tmp_path / "i.gguf")
    files = {
        imatrix: gguf3n.convert(tiny_checkpoint, "Q4_0", tmp_path / f"{imatrix}.gguf", ple="Q4_0", imatrix=given)[
            0
        ].path
        for imatrix, given in (("with", tmp_path / "i.gguf"), ("without", None))
    }
    for name in (*TABLES, "blk.3.ffn_down.weight"):
        data = []
        for path in files.values():
            tensor = gguf3n.open_gguf(path).tensors[name]
            data.append(np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.offset).tobytes())
        assert data[0] != data[1], name


def test_a_text_that_is_too_short(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Too short.")
    with pytest.raises(UsageError, match="not enough text"):
        measure_importance(tiny_checkpoint, [tmp_path / "a.txt"], device="cpu")
    with pytest.raises(UsageError, match="chunk 1000"):
        measure_importance(tiny_checkpoint, [TEXT], n_ctx=SHORT, first_chunk=1000, device="cpu")
    with pytest.raises(UsageError, match="chunks of 8 tokens"):
        measure_importance(tiny_checkpoint, [TEXT], n_ctx=8, device="cpu")


@pytest.mark.parametrize("data", [b"\xff\xfe", None], ids=["not UTF-8", "missing"])
def test_a_text_that_cannot_be_read(tiny_checkpoint: Path, tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "a.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SourceError, match=r"a\.txt"):
        measure_importance(tiny_checkpoint, [path], device="cpu")


def test_activations_that_are_not_finite(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """One weight of a norm is NaN: the layer is named."""
    source = tmp_path / "broken"
    shutil.copytree(make_checkpoint(), source)
    (tensor,) = read_tensor_table(source)["model.language_model.layers.4.pre_feedforward_layernorm.weight"].stored
    assert isinstance(tensor.file, Path)
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xc0\x7f")
    with pytest.raises(QuantizationError, match=r"blk\.4\..*computed in float32"):
        measure_importance(source, [TEXT], n_ctx=16, n_chunks=1, device="cpu")


def test_memory_is_announced_and_must_suffice(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    next(measure_chunks(tiny_checkpoint, [TEXT], n_ctx=16, device="cpu", notice=said.append))
    assert len(said) == 1 and "float32" in said[0]
    monkeypatch.setattr("gguf3n.engines.memory.available_bytes", lambda: 1000)
    with pytest.raises(UsageError, match="not enough memory"):
        next(measure_chunks(tiny_checkpoint, [TEXT], n_ctx=16, device="cpu"))


def test_correlations_are_those_of_the_inputs(tiny_checkpoint: Path) -> None:
    """Their diagonals are the importance matrix's sums; whole ones have the blocks in them."""
    blocks, whole = (
        list(measure_chunks(tiny_checkpoint, [TEXT], n_ctx=16, n_chunks=2, device="cpu", correlations=kind))
        for kind in ("blocks", "full")
    )
    found, one = blocks[1].correlations, blocks[0].correlations
    other = whole[1].correlations
    assert found is not None and one is not None and other is not None
    assert set(found.entries) == set(other.entries)
    n_matrices = 6 * 22  # the inputs of attn_q, attn_output, ffn_gate, ffn_down, inp_gate, proj
    assert len(found.entries) == n_matrices + len(TABLES)
    for name, entry in found.entries.items():
        sums = found.read(name)
        assert entry.count == blocks[1].counts[name] and impossible(sums) == ""
        assert not np.array_equal(sums, one.read(name))
        diagonal = sums[np.arange(entry.n_columns), np.arange(entry.n_columns) % entry.width]
        if name != PER_LAYER_TOKEN_EMBD:
            assert diagonal == pytest.approx(blocks[1].sums[name], rel=1e-4)
            square = other.read(name)
            assert square.shape == (entry.n_columns, entry.n_columns)
            assert square[:256, :256] == pytest.approx(sums[:256], rel=1e-3, abs=1e-3 * float(np.abs(sums).max()))
    with pytest.raises(UsageError, match="blocks or full"):
        next(measure_chunks(tiny_checkpoint, [TEXT], device="cpu", correlations="half"))


def test_correlations_of_the_per_layer_table(tiny_checkpoint: Path) -> None:
    """What an error in a row of it does to what per_layer_projection gives, which is what they are to foretell."""
    (measured,) = measure_chunks(tiny_checkpoint, [TEXT], n_ctx=16, n_chunks=1, device="cpu", correlations="blocks")
    assert measured.correlations is not None
    sums = measured.correlations.read(PER_LAYER_TOKEN_EMBD)
    gates = []
    with Reference(open_source(tiny_checkpoint), device="cpu") as reference:
        layer = reference.model.model.layers[1]
        layer.per_layer_input_gate.register_forward_hook(lambda _m, _i, output: gates.append(layer.act_fn(output)))
        tokens = reference.tokenize(TEXT.read_text("utf-8"))
        reference.run([tokens[0], *tokens[1:16]])
        projection = layer.per_layer_projection.weight.detach().numpy()
    gate = gates[0].detach().numpy().reshape(16, -1)
    error = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    expected = (((gate * error) @ projection.T) ** 2).sum()
    assert error @ sums[256:512] @ error == pytest.approx(expected, rel=1e-3)
