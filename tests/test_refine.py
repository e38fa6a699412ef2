"""`--refine`: what is refined, what the file and the plan say of it, what is refused, and that nothing else changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.cli import main
from gguf3n.conversion import read_source
from gguf3n.errors import GGUFError, QuantizationError
from gguf3n.formats.correlations import Correlations, Entry, write_correlations
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.imatrix import Entry as ImatrixEntry
from gguf3n.formats.imatrix import ImportanceMatrix
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.gemma3n.refinement import entry_name, match_correlations
from gguf3n.quants.api import dequantize
from gguf3n.validation.weights import WeightReader
from tests import micro, refining

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    raw = micro.config(
        hidden_size=256,
        hidden_size_per_layer_input=256,
        intermediate_size=[512] * 3,
        num_attention_heads=4,
        head_dim=64,
    )
    return text_part(read_source(micro.make(tmp_path_factory.mktemp("refine") / "model", raw=raw)))


@pytest.fixture(scope="module")
def correlations(part: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("correlations") / "c.gguf"
    write_correlations(refining.of_part(part), path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in an empty directory; exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gguf3n", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as left:
            code = int(left.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def data(path: Path) -> dict[str, bytes]:
    gguf = open_gguf(path)
    return {name: gguf.read(tensor) for name, tensor in gguf.tensors.items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_each_matrix_gets_better_and_nothing_else_changes(
    part: Part, correlations: Path, tmp_path: Path, weighted: bool
) -> None:
    imatrix = None
    if weighted:
        entry = ImatrixEntry(np.linspace(1, 9, 256, dtype=np.float32).reshape(1, -1), np.ones(1, np.float32))
        imatrix = ImportanceMatrix(Path("i.gguf"), {"blk.0.attn_q.weight": entry}, ("text",), 1, 512)
    paths = [tmp_path / "plain.gguf", tmp_path / "refined.gguf"]
    gguf3n.convert(part.source, "Q3_K_M", paths[0], imatrix=imatrix)
    (done,) = gguf3n.convert(part.source, "Q3_K_M", paths[1], imatrix=imatrix, refine=correlations)
    plain, refined = open_gguf(paths[0]), open_gguf(paths[1])
    names = {tensor.slot.name for tensor in done.plan.refined}
    refinement = match_correlations(refining.of_part(part), part)
    reader = WeightReader()
    for tensor in part.tensors:
        one, other = (gguf.read(gguf.tensors[tensor.name]) for gguf in (plain, refined))
        qtype = refined.tensors[tensor.name].qtype
        assert (tensor.name in names) == (tensor.name in refinement.entries and GGML_TYPES[qtype].refinable)
        if tensor.name not in names:
            assert one == other
            continue
        x = reader.source_rows(tensor, np.arange(tensor.n_rows))
        H = refinement.correlations(tensor.name)
        errors = [refining.errors(x - dequantize(data, qtype, x.shape), H) for data in (one, other)]
        assert (errors[1] <= errors[0]).all() and errors[1].sum() < 0.9 * errors[0].sum(), tensor.name
    reader.close()
    assert {"blk.0.attn_k.weight", "blk.1.ffn_up.weight", "token_embd.weight"} <= names
    added = {name: refined.value(name) for name in refined.keys if name not in plain.keys}
    assert added == {
        "quantize.refine.file": str(correlations),
        "quantize.refine.dataset": "text",
        "quantize.refine.entries_count": len(refining.of_part(part).entries),
        "quantize.refine.chunks_count": refining.N_INPUTS // 100,
        "quantize.refine.width": 256,
    }


def test_the_same_bytes_for_any_number_of_threads_and_outputs(part: Part, correlations: Path, tmp_path: Path) -> None:
    names = ("Q4_0", "Q4_K_M")
    for threads in (1, 4):
        gguf3n.convert(part.source, names, tmp_path / str(threads), refine=correlations, threads=threads)
    (alone,) = gguf3n.convert(part.source, "Q4_K_M", tmp_path / "alone.gguf", refine=correlations)
    for one in (tmp_path / "1").iterdir():
        assert one.read_bytes() == (tmp_path / "4" / one.name).read_bytes()
    (both,) = [path for path in (tmp_path / "1").iterdir() if "Q4_K_M" in path.name]
    assert both.read_bytes() == alone.path.read_bytes()


def test_a_gguf_file_gives_the_bytes_of_its_checkpoint(
    run: Run, part: Part, correlations: Path, tmp_path: Path
) -> None:
    gguf3n.convert(part.source, "BF16", tmp_path / "b.gguf")
    options = ("--refine", correlations, "-o", "q.gguf", "--validate", "--stages", "tensors")
    code, out, err = run("quantize", "b.gguf", "-q", "Q4_K_M", *options)
    assert code == 0, err
    assert "verdict: pass" in out and "refined: " in out
    gguf3n.convert(part.source, "Q4_K_M", tmp_path / "c.gguf", refine=correlations)
    assert data(tmp_path / "q.gguf") == data(tmp_path / "c.gguf")


def test_the_plan_says_what_is_refined(run: Run, part: Part, correlations: Path) -> None:
    source = part.source.origin
    command = ("convert", source, "-q", "Q4_K_M", "--dry-run", "--refine", correlations)
    code, out, _ = run(*command)
    assert code == 0
    result = json.loads(run(*command, "--json")[1])["outputs"][0]
    refined = [tensor for tensor in result["tensors"] if tensor["refined"]]
    n_rows = sum(int(np.prod(tensor["shape"][:-1])) for tensor in refined)
    assert result["refined"] == {"tensors": len(refined), "rows": n_rows}
    assert f"refined: {n_rows:,} rows of {len(refined)} tensors" in out
    plain = json.loads(run(*command[:-2], "--json")[1])["outputs"][0]
    assert plain["refined"] == {"tensors": 0, "rows": 0} and plain["types"] == result["types"]
    assert "refined" not in run(*command[:-2])[1]


def test_what_is_not_covered_is_said(part: Part) -> None:
    found = refining.of_part(part)
    less = {name: entry for name, entry in found.entries.items() if "ffn_down" not in name}
    entries = {**less, "blk.9.attn_q.weight": Entry(256, 256, 100)}
    refinement = match_correlations(replace(found, entries=entries), part)
    said = " ".join(refinement.notices)
    assert "1 entries have no tensor in this model: blk.9.attn_q.weight" in said
    assert "no entry for 3 matrices, which are not refined: blk.0.ffn_down.weight" in said
    assert "1 entries are of few inputs, 100 of 256 columns in blk.9.attn_q.weight" in said
    assert not refinement.refines("blk.0.ffn_down.weight", QType.Q4_K)


def test_memory_of_whole_correlations_is_said_first(part: Part) -> None:
    found = refining.of_part(part)
    entries = {**found.entries, "blk.9.ffn_down.weight": Entry(8192, 8192, 1e6)}
    assert any(
        "0.8 GB of memory" in notice for notice in match_correlations(replace(found, entries=entries), part).notices
    )


def test_matrices_of_one_input_share_an_entry() -> None:
    assert entry_name("blk.3.attn_v.weight") == entry_name("blk.3.attn_k.weight") == "blk.3.attn_q.weight"
    assert entry_name("blk.3.ffn_up.weight") == "blk.3.ffn_gate.weight"
    assert entry_name("blk.3.ffn_down.weight") == "blk.3.ffn_down.weight"


def renamed(found: Correlations) -> Correlations:
    return refining.of_arrays({f"{name}.x": found.read(name) for name in found.entries})


def narrower(found: Correlations) -> Correlations:
    return refining.of_arrays({name: refining.sums_of(refining.inputs(128)) for name in found.entries})


@pytest.mark.parametrize(("spoil", "said"), [(renamed, "of another model"), (narrower, "does not fit the model")])
def test_correlations_of_another_model(
    part: Part, spoil: Callable[[Correlations], Correlations], said: str, tmp_path: Path
) -> None:
    with pytest.raises(QuantizationError, match=said):
        gguf3n.convert(part.source, "Q4_0", tmp_path / "x.gguf", refine=spoil(refining.of_part(part)))
    assert list(tmp_path.iterdir()) == []


def test_sums_that_are_impossible_leave_nothing_behind(part: Part, tmp_path: Path) -> None:
    found = refining.of_part(part)
    arrays = {name: found.read(name).copy() for name in found.entries}
    arrays["blk.2.ffn_down.weight"][7, 7] = -1
    with pytest.raises(GGUFError, match=r"'blk\.2\.ffn_down\.weight': a negative sum of squares in column 7"):
        gguf3n.convert(part.source, "Q4_0", tmp_path / "x.gguf", refine=refining.of_arrays(arrays))
    assert list(tmp_path.iterdir()) == []


def test_what_the_command_refuses(run: Run, part: Part, correlations: Path, tmp_path: Path) -> None:
    source = part.source.origin
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    for options, code, said in (
        (("-q", "Q4_0", "--refine", "missing.gguf"), 11, "missing.gguf"),
        (("-q", "Q4_0", "--refine", "no.gguf"), 11, "no.gguf"),
        (("--mmproj", "F16", "--refine", correlations), 2, "--refine is for a file that is not wanted"),
        (("-q", "Q4_0", "--refine", correlations, "-o", correlations, "--force"), 10, "is what is read"),
    ):
        found = run("convert", source, *options)
        assert found[0] == code, found
        assert said in " ".join(found[2].split())
