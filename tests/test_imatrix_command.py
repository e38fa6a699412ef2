"""`gguf3n imatrix` as a person or a script sees it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf3n.cli import imatrix as command
from gguf3n.engines.activations import Measurement, measure_chunks
from gguf3n.errors import GGUFError, Interrupted, OutputError, UsageError
from gguf3n.formats.correlations import read_correlations, write_correlations
from gguf3n.formats.imatrix import merge_imatrices, read_imatrix, write_imatrix
from gguf3n.gemma3n.source import Checkpoint, Source
from tests.command_line import Run, plain
from workshop import imatrix_comparison

pytest.importorskip("torch")
pytest.importorskip("transformers")

TEXT = imatrix_comparison.TEXT
OPTIONS = ("--text", TEXT, "--ctx", "16", "--device", "cpu")


@pytest.fixture(autouse=True)
def in_an_empty_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def recorded(tiny_checkpoint: Path) -> list[Measurement]:
    """Four chunks of a real run."""
    return list(measure_chunks(tiny_checkpoint, [TEXT], n_ctx=16, n_chunks=4, device="cpu", correlations="blocks"))


@pytest.fixture
def replayed(
    recorded: list[Measurement], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int | None], list[dict[str, Any]]]:
    """Measuring gives out the recorded chunks, and is interrupted after some; what it was asked for is kept."""

    def replay(interrupt_after: int | None) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def chunks(source: Source, texts: list[Path], **options: Any) -> Iterator[Measurement]:
            asked.append({"source": source, "texts": texts, **options})
            for measurement in recorded:
                if measurement.n_done - 1 == interrupt_after:
                    raise KeyboardInterrupt
                yield measurement

        monkeypatch.setattr(command, "measure_chunks", chunks)
        return asked

    return replay


def test_measure(run: Run, tiny_checkpoint: Path, recorded: list[Measurement], tmp_path: Path) -> None:
    code, out, err = run("imatrix", tiny_checkpoint, *OPTIONS, "--chunks", "4", "-o", "i.gguf")
    assert code == 0 and plain(out)
    assert "306 entries, 4 chunks of 16 tokens" in out and "perplexity" in out
    assert f"{len(recorded[-1].seen)} of 1,088 tokens of the vocabulary seen" in out
    assert "memory" in err and "perplexity of the first chunk" in err and "100%" in err
    written = read_imatrix(tmp_path / "i.gguf")
    assert (written.n_chunks, written.chunk_size, written.datasets) == (4, 16, (str(TEXT),))
    for name, entry in recorded[-1].imatrix.entries.items():
        assert np.array_equal(written.entries[name].sums, entry.sums)


def test_the_options_reach_the_measurement(
    run: Run, tiny_checkpoint: Path, replayed: Callable[[int | None], list[dict[str, Any]]]
) -> None:
    asked = replayed(None)
    options = ("--chunks", 9, "--from-chunk", 3, "--parse-special", "--layers-only", "--dtype", "bfloat16")
    code, out, err = run("imatrix", "measure", tiny_checkpoint, *OPTIONS, "--text", TEXT, *options, "--json", "--quiet")
    assert (code, err) == (0, "")
    (given,) = asked
    del given["notice"]
    source = given.pop("source")
    assert isinstance(source, Checkpoint)
    assert (source.path, source.origin) == (tiny_checkpoint, str(tiny_checkpoint))
    assert given == {
        "texts": [TEXT, TEXT],
        "n_ctx": 16,
        "n_chunks": 9,
        "first_chunk": 3,
        "special": True,
        "tables": False,
        "correlations": None,
        "device": "cpu",
        "dtype": "bfloat16",
    }
    result = json.loads(out)
    assert result["schema"] == command.SCHEMA and result["path"] == "imatrix.gguf"
    assert (result["chunks"], result["chunks_measured"]) == (4, 4)
    assert result["vocabulary"]["total"] == 1088 and len(result["entries"]) == 306


@pytest.mark.parametrize(("after", "kept"), [(3, 3), (0, None)])
def test_interrupted(
    run: Run,
    tiny_checkpoint: Path,
    replayed: Callable[[int | None], list[dict[str, Any]]],
    tmp_path: Path,
    after: int,
    kept: int | None,
) -> None:
    """What is done is in the file, and the error says how to go on; before the first chunk there is no file."""
    replayed(after)
    code, _, err = run("imatrix", tiny_checkpoint, *OPTIONS, "-o", "i.gguf", "--quiet")
    assert code == Interrupted.exit_code
    if kept is None:
        assert list(tmp_path.iterdir()) == []
    else:
        assert "after 3 of 4 chunks" in err and "--from-chunk 3 --merge i.gguf --force" in err
        assert read_imatrix(tmp_path / "i.gguf").n_chunks == kept


def test_saved_on_the_way(
    run: Run,
    tiny_checkpoint: Path,
    replayed: Callable[[int | None], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replayed(None)
    saved = []

    def write(imatrix: Any, path: Path, *, force: bool) -> None:
        write_imatrix(imatrix, path, force=force)
        saved.append(read_imatrix(path).n_chunks)

    monkeypatch.setattr(command, "write_imatrix", write)
    assert run("imatrix", tiny_checkpoint, *OPTIONS, "--save-every", "3", "--quiet")[0] == 0
    assert saved == [3, 4]


def test_how_to_go_on_with_a_number_of_chunks(
    run: Run, tiny_checkpoint: Path, replayed: Callable[[int | None], list[dict[str, Any]]]
) -> None:
    replayed(3)
    _, _, err = run("imatrix", tiny_checkpoint, *OPTIONS, "--chunks", 4, "-o", "i.gguf", "--quiet")
    assert "--from-chunk 3 --chunks 1 --merge i.gguf" in err


@pytest.mark.parametrize("options", [("--text", "missing.txt"), ("--dtype", "float16")])
def test_options_are_looked_at_before_a_source_is_fetched(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, str]
) -> None:
    monkeypatch.setattr(command, "read_source", None)
    code, _, err = run("imatrix", "org/name", *OPTIONS, *options)
    assert code in (2, 3) and options[1] in err


def test_go_on(run: Run, tiny_checkpoint: Path, recorded: list[Measurement], tmp_path: Path) -> None:
    """Three chunks, then the fourth with --from-chunk and --merge into the same file: as if measured at once."""
    path = tmp_path / "i.gguf"
    write_imatrix(recorded[2].imatrix, path)
    options = (*OPTIONS, "--from-chunk", "3", "--chunks", "1", "--merge", path, "-o", path, "--quiet")
    assert run("imatrix", tiny_checkpoint, *options)[0] == OutputError.exit_code
    code, out, _ = run("imatrix", tiny_checkpoint, *options, "--force")
    assert code == 0 and "1 chunks of 16 tokens, 4 with those of" in " ".join(out.split())
    merged = read_imatrix(path)
    assert merged.n_chunks == 4
    for name, entry in recorded[-1].imatrix.entries.items():
        assert np.array_equal(merged.entries[name].counts, entry.counts)
        assert merged.entries[name].sums == pytest.approx(entry.sums, rel=1e-5)


def test_what_cannot_be_used_is_refused_before_any_work(
    run: Run, tiny_checkpoint: Path, replayed: Callable[[int | None], list[dict[str, Any]]], tmp_path: Path
) -> None:
    asked = replayed(None)
    other, sample = tmp_path / "other.gguf", imatrix_comparison.sample_files(tmp_path)[0]
    imatrix = read_imatrix(sample)
    entries = {name.replace("attn_q", "laurel_r"): entry for name, entry in imatrix.entries.items()}
    write_imatrix(replace(imatrix, chunk_size=16, entries=entries), other)
    code, _, err = run("imatrix", tiny_checkpoint, *OPTIONS, "--merge", sample)
    assert code == UsageError.exit_code and "--ctx 128" in err
    code, _, err = run("imatrix", tiny_checkpoint, *OPTIONS, "--merge", other)
    assert code == 9 and "does not fit the model" in err
    code, _, err = run("imatrix", other, *OPTIONS)
    assert code == UsageError.exit_code and "llama-imatrix" in err
    assert asked == [] and not (tmp_path / "imatrix.gguf").exists()


def test_correlations_go_beside(
    run: Run,
    tiny_checkpoint: Path,
    replayed: Callable[[int | None], list[dict[str, Any]]],
    recorded: list[Measurement],
    tmp_path: Path,
) -> None:
    asked = replayed(None)
    code, out, _ = run("imatrix", tiny_checkpoint, *OPTIONS, "--correlations", "-o", "i.gguf", "--quiet")
    assert code == 0 and plain(out) and "i-correlations.gguf\n  correlations of 134 inputs, 44.25 MiB" in out
    found, expected = read_correlations(tmp_path / "i-correlations.gguf"), recorded[-1].correlations
    assert expected is not None and found.entries == expected.entries and found.n_chunks == 4
    for name in ("blk.3.ffn_down.weight", "per_layer_token_embd.weight"):
        assert np.array_equal(found.read(name), expected.read(name))
    options = ("--correlations", "full", "-o", "i.gguf", "--quiet", "--json")
    assert run("imatrix", tiny_checkpoint, *OPTIONS, *options)[0] == OutputError.exit_code
    result = json.loads(run("imatrix", tiny_checkpoint, *OPTIONS, *options, "--force")[1])
    assert result["correlations"] == "i-correlations.gguf"
    assert [given["correlations"] for given in asked] == ["blocks", "full"]
    code, out, _ = run("imatrix", "show", "i-correlations.gguf")
    assert code == 0 and plain(out)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["chunks"] == ["4", "of", "16", "tokens"] and rows["ffn_down"] == ["22", "512", "256", "64"]
    result = json.loads(run("imatrix", "show", "i-correlations.gguf", "--json")[1])
    assert result["schema"] == command.CORRELATIONS_SCHEMA and result["chunks"] == 4
    assert {"name": "blk.0.attn_q.weight", "columns": 256, "width": 256, "count": 64} in result["entries"]
    assert run("imatrix", "show", "i-correlations.gguf", "--statistics")[0] == UsageError.exit_code


def test_going_on_with_correlations(
    run: Run,
    tiny_checkpoint: Path,
    replayed: Callable[[int | None], list[dict[str, Any]]],
    recorded: list[Measurement],
    tmp_path: Path,
) -> None:
    replayed(2)
    options = (*OPTIONS, "-o", "i.gguf", "--quiet", "--correlations")
    code, _, err = run("imatrix", tiny_checkpoint, *options)
    assert code == Interrupted.exit_code
    assert "--from-chunk 2 --merge i.gguf --force --correlations blocks" in " ".join(err.split())
    assert read_correlations(tmp_path / "i-correlations.gguf").n_chunks == 2
    replayed(None)
    assert run("imatrix", tiny_checkpoint, *options, "--merge", "i.gguf", "--force")[0] == 0
    merged = read_correlations(tmp_path / "i-correlations.gguf")
    assert merged.n_chunks == 6
    one, four = recorded[1].correlations, recorded[3].correlations
    assert one is not None and four is not None
    name = "blk.0.attn_q.weight"
    assert np.array_equal(merged.read(name), one.read(name) + four.read(name))
    write_imatrix(recorded[0].imatrix, tmp_path / "i.gguf", force=True)
    code, _, err = run("imatrix", tiny_checkpoint, *options, "--merge", "i.gguf", "--force")
    assert code == UsageError.exit_code and "not measured together" in err


def test_merging_correlations(run: Run, recorded: list[Measurement], tmp_path: Path) -> None:
    for i in (0, 1):
        measured = recorded[i].correlations
        assert measured is not None
        write_correlations(measured, tmp_path / f"{i}.gguf")
    write_imatrix(recorded[0].imatrix, tmp_path / "i.gguf")
    code, out, _ = run("imatrix", "merge", "0.gguf", "1.gguf", "-o", "m.gguf")
    assert code == 0 and "134 entries, 3 chunks of 16 tokens" in out
    assert json.loads(run("imatrix", "merge", "0.gguf", "-o", "m.gguf", "--force", "--json")[1])["chunks"] == 1
    assert run("imatrix", "merge", "0.gguf", "-o", "m.gguf")[0] == OutputError.exit_code
    assert run("imatrix", "merge", "0.gguf", "i.gguf", "-o", "n.gguf")[0] == GGUFError.exit_code
    assert run("imatrix", "merge", "0.gguf", "-o", "n.gguf", "--ctx", "16")[0] == UsageError.exit_code
    assert not (tmp_path / "n.gguf").exists()


def test_show(run: Run, recorded: list[Measurement], tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_imatrix(recorded[-1].imatrix, path)
    code, out, _ = run("imatrix", "show", path)
    assert code == 0 and plain(out)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows["chunks"] == ["4", "of", "16", "tokens"]
    assert rows["attn_k"] == ["20", "256", "64"] and rows["altup_router"] == ["22", "256", "128"]
    assert rows["per_layer_token_embd"] == ["1", "5,632", "64"]
    assert str(TEXT) in out.replace("\n", "").replace("    ", "")
    assert json.loads(run("imatrix", "show", path, "--json")[1])["chunk_count"] == 8


def test_show_statistics(
    run: Run, recorded: list[Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "i.gguf"
    write_imatrix(recorded[-1].imatrix, path)
    code, out, _ = run("imatrix", "show", path, "--statistics")
    assert code == 0 and plain(out)
    assert sum(line.split()[1:2] == ["ffn_down"] for line in out.splitlines()) == 22
    assert out.splitlines()[-1].split()[0] == "21"
    monkeypatch.setattr(command, "line_width", lambda: 200)
    assert "entropy" in run("imatrix", "show", path, "--statistics")[1]
    statistics = json.loads(run("imatrix", "show", path, "--statistics", "--json")[1])["statistics"]
    assert len(statistics["entries"]) == 306 and len(statistics["layers"]) == 22


def test_merge(run: Run, tmp_path: Path) -> None:
    paths = imatrix_comparison.sample_files(tmp_path)
    code, out, _ = run("imatrix", "merge", *paths, "-o", "m.gguf")
    assert code == 0 and plain(out) and "9 entries, 12 chunks of 128 tokens" in out
    expected = merge_imatrices([read_imatrix(path) for path in paths])
    assert read_imatrix(tmp_path / "m.gguf").datasets == expected.datasets
    assert run("imatrix", "merge", *paths, "-o", "m.gguf")[0] == OutputError.exit_code
    merged = (tmp_path / "m.gguf").read_bytes()
    code, _, err = run("imatrix", "merge", *paths, "m.gguf", "-o", "m.gguf", "--force")
    assert code == OutputError.exit_code and "is what is read" in err
    assert (tmp_path / "m.gguf").read_bytes() == merged
    out = run("imatrix", "merge", paths[-1], "-o", "m.gguf", "--ctx", "64", "--force", "--json")[1]
    assert json.loads(out)["chunk_size"] == 64
    out = run("imatrix", "show", paths[-1])[1]
    assert "legacy .dat" in out


def test_help_names_the_three_and_says_what_the_short_form_is(run: Run) -> None:
    code, out, _ = run("imatrix", "--help")
    assert code == 0
    for word in ("measure", "show", "merge", "gguf3n imatrix SRC"):
        assert word in out
    assert "--text" in run("imatrix", "measure", "--help")[1]


def test_a_directory_with_the_name_of_a_command(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "show").symlink_to(tiny_checkpoint, target_is_directory=True)
    code, _, _ = run("imatrix", "./show", *OPTIONS, "--chunks", "1", "-o", "i.gguf", "--quiet")
    assert code == 0 and (tmp_path / "i.gguf").exists()


@pytest.mark.parametrize("arguments", [(".", *OPTIONS), ("merge", "a.gguf", "b.gguf")])
def test_the_legacy_name_is_not_given_to_the_gguf_form(arguments: tuple[object, ...], run: Run) -> None:
    code, _, err = run("imatrix", *arguments, "-o", "i.dat")
    assert code == 2
    assert "give a name in .gguf" in err
