"""`gguf3n sensitivity` and `gguf3n tune` as a person or a script sees them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gguf3n.cli
from gguf3n.cli import sensitivity as command
from gguf3n.errors import Interrupted, OutputError, SourceError, UsageError
from gguf3n.formats.sensitivity import read_sensitivity, write_sensitivity
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.source import Source
from gguf3n.tuning.measure import Measurement, measure_batches, parse_types
from tests import micro
from tests.tuning.facts import made_up
from workshop.imatrix_comparison import TEXT

Run = Callable[..., tuple[int, str, str]]

MEASURE = ("--text", TEXT, "--ctx", 16, "--types", "Q8_0,Q4_0", "--device", "cpu", "--batch", 1, "--threads", 1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`run("tune", path, …)` in an empty directory: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["gguf3n", *map(str, arguments)])
        code: Any = 0
        try:
            gguf3n.cli.main()
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return int(code), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.make(tmp_path_factory.mktemp("commands") / "micro")


@pytest.fixture(scope="module")
def recorded(small: Path) -> list[Measurement]:
    """Four chunks, one after the other."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    types = parse_types("Q8_0,Q4_0")
    return list(measure_batches(small, [TEXT], types=types, n_ctx=16, n_chunks=4, batch=1, device="cpu", threads=1))


@pytest.fixture
def replayed(recorded: list[Measurement], monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[Any]]:
    """Measuring gives out the recorded chunks, and is interrupted after some; what it was asked for is kept."""

    def replay(interrupt_after: int | None) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def batches(source: Source, texts: list[Path], **options: Any) -> Iterator[Measurement]:
            asked.append({"source": source, "texts": texts, **options})
            options["before"](recorded[-1].sensitivity)
            for measurement in recorded:
                if measurement.n_done - 1 == interrupt_after:
                    raise KeyboardInterrupt
                yield measurement

        monkeypatch.setattr(command, "measure_batches", batches)
        return asked

    return replay


def plain(text: str) -> bool:
    lines = text.splitlines()
    return "\x1b" not in text and all(len(line) <= 80 or ("/" in line and " " not in line) for line in lines)


def test_measure(run: Run, small: Path, recorded: list[Measurement], tmp_path: Path) -> None:
    code, out, err = run("sensitivity", small, *MEASURE, "--chunks", 4, "-o", "s.json")
    assert code == 0 and plain(out)
    assert "27 tensors, 4 chunks of 16 tokens" in out and "perplexity" in out and "ffn_down" in out
    assert "memory" in err and "perplexity of the first chunks" in err and "100%" in err
    assert read_sensitivity(tmp_path / "s.json").tensors == recorded[-1].sensitivity.tensors


def test_the_options_reach_the_measurement(run: Run, small: Path, replayed: Callable[[int | None], list[Any]]) -> None:
    asked = replayed(None)
    options = ("--chunks", 9, "--from-chunk", 3, "--seed", 5, "--parse-special", "--dtype", "bfloat16")
    code, out, err = run("sensitivity", small, *MEASURE, *options, "--json", "--quiet")
    assert (code, err) == (0, "")
    (given,) = asked
    for name in ("source", "notice", "before", "progress"):
        del given[name]
    assert given == {
        "texts": [TEXT], "imatrix": None, "types": parse_types("Q8_0,Q4_0"), "n_ctx": 16, "n_chunks": 9,
        "first_chunk": 3, "batch": 1, "seed": 5, "special": True, "device": "cpu", "dtype": "bfloat16", "threads": 1,
    }  # fmt: skip
    result = json.loads(out)
    assert result["schema"] == "gguf3n.sensitivity/1" and result["types"] == ["Q8_0", "Q4_0"]
    assert (result["chunks"], result["path"]) == (4, "sensitivity.json")
    assert result["costs"]["blk.0.attn_q.weight"]["Q4_0"] > result["costs"]["blk.0.attn_q.weight"]["Q8_0"]


@pytest.mark.parametrize(("after", "kept"), [(3, 3), (0, None)])
def test_interrupted(
    run: Run,
    small: Path,
    replayed: Callable[[int | None], list[Any]],
    tmp_path: Path,
    after: int,
    kept: int | None,
) -> None:
    replayed(after)
    code, _, err = run("sensitivity", small, *MEASURE, "-o", "s.json", "--quiet")
    assert code == Interrupted.exit_code
    if kept is None:
        assert list(tmp_path.iterdir()) == []
    else:
        assert "after 3 of 4 chunks" in err and "--from-chunk 3 --chunks 1 --merge s.json --force" in err
        assert read_sensitivity(tmp_path / "s.json").n_chunks == kept


def test_go_on(run: Run, small: Path, recorded: list[Measurement], tmp_path: Path) -> None:
    """Three chunks, then the fourth with --from-chunk and --merge into the same file: as if measured at once."""
    path = tmp_path / "s.json"
    write_sensitivity(recorded[2].sensitivity, path)
    options = (*MEASURE, "--from-chunk", 3, "--chunks", 1, "--merge", path, "-o", path, "--quiet")
    assert run("sensitivity", small, *options)[0] == OutputError.exit_code
    code, out, _ = run("sensitivity", small, *options, "--force")
    assert code == 0 and "1 chunks of 16 tokens, 4 with those of" in " ".join(out.split())
    merged = read_sensitivity(path)
    assert merged.spans == ((0, 4),)
    for name, tensor in recorded[-1].sensitivity.tensors.items():
        for qtype, sums in tensor.types.items():
            assert merged.tensors[name].types[qtype].diagonal == pytest.approx(sums.diagonal, rel=1e-4)


def test_what_does_not_add_up_is_refused_before_the_model_is_loaded(
    run: Run, small: Path, recorded: list[Measurement], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf3n.tuning.measure.Reference", None)
    path = tmp_path / "s.json"
    write_sensitivity(replace(recorded[-1].sensitivity, seed=7), path)
    for options, message in (((), "another --seed"), (("--seed", 7), "in another file too")):
        code, _, err = run("sensitivity", small, *MEASURE, "--chunks", 2, "--merge", path, "-o", "new.json", *options)
        assert code == UsageError.exit_code and message in err
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--types", "Q9"), 2),
        (("--text", "missing.txt"), 3),
        (("--dtype", "float16"), 2),
        (("--merge", "missing.json"), 3),
        (("--imatrix", "missing.gguf"), 11),
        (("-o", "missing/s.json"), 10),
        (("--chunks", 0), 2),
    ],
)
def test_options_are_looked_at_before_a_source_is_fetched(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], code: int
) -> None:
    monkeypatch.setattr(command, "read_source", None)
    assert run("sensitivity", "org/name", *MEASURE, *options)[0] == code


def test_a_file_is_no_checkpoint(run: Run, small: Path) -> None:
    code, _, err = run("sensitivity", small / "config.json", *MEASURE)
    assert code == UsageError.exit_code and "a checkpoint directory" in err


@pytest.fixture(scope="module")
def costs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("costs") / "made-up.json"
    write_sensitivity(made_up(text_part(gguf3n.read_source(tiny_checkpoint))), path)
    return path


def test_tune(run: Run, tiny_checkpoint: Path, costs: Path, tmp_path: Path) -> None:
    """A recipe that convert takes, in a file of the size that was allowed."""
    code, out, _ = run("tune", tiny_checkpoint, "--sensitivity", costs, "--size", "19.5MB", "-o", "mine.toml")
    assert code == 0 and plain(out)
    assert "below 19.5MB" in " ".join(out.split()) and "expected KL divergence" in out and "ffn_down" in out
    code, out, _ = run("convert", tiny_checkpoint, "-q", "mine.toml", "--dry-run", "--json")
    assert code == 0
    (output,) = json.loads(out)["outputs"]
    assert 19_000_000 < output["bytes"] <= 19_500_000
    assert run("tune", tiny_checkpoint, "--sensitivity", costs, "--size", "19.5MB", "-o", "mine.toml")[0] == 10
    assert run("tune", tiny_checkpoint, "--sensitivity", costs, "--bpw", "7", "-o", "mine.toml", "--force")[0] == 0
    code, out, _ = run("recipes", "show", "mine.toml")
    assert code == 0 and "evidence = [" in out and "costs KL" in out


def test_the_sizes_that_can_be_asked_for(run: Run, tiny_checkpoint: Path, costs: Path) -> None:
    def bytes_of(*options: object) -> dict[str, Any]:
        code, out, err = run("tune", tiny_checkpoint, "--sensitivity", costs, *options, "--json")
        assert code == 0, err
        result: dict[str, Any] = json.loads(out)
        assert result["schema"] == "gguf3n.tune/1" and result["exact"] is True and result["recipe"] is None
        assert result["bytes"] <= result["budget"]["bytes"]
        return result

    like = bytes_of("--like", "Q4_K_M")
    assert like["budget"]["bytes"] == gguf3n.plan(tiny_checkpoint, "Q4_K_M").total_bytes
    bits = bytes_of("--bpw", "6.25")
    assert bits["bits_per_weight"] <= 6.25 < bits["bits_per_weight"] + 0.01
    fits = bytes_of("--size", "fits:143MB", "--ctx", "512")
    assert fits["budget"]["bytes"] < 33_000_000 and "512 tokens" in fits["budget"]["said"]
    fast = bytes_of("--like", "Q4_K_M", "--fast-cpu", "--engine", "ollama-old")
    assert {t["type"] for t in fast["tensors"]}.isdisjoint({"Q3_K", "IQ4_XS"})
    assert fast["expected_divergence"] >= like["expected_divergence"]


def test_without_a_file_the_recipe_is_printed(run: Run, tiny_checkpoint: Path, costs: Path, tmp_path: Path) -> None:
    code, out, err = run("tune", tiny_checkpoint, "--sensitivity", costs, "--like", "Q4_0", "--quiet")
    assert (code, err) == (0, "")
    (tmp_path / "printed.toml").write_text(out, "utf-8")
    assert gguf3n.find_recipe(str(tmp_path / "printed.toml")).name == "tuned"


def test_curve(run: Run, tiny_checkpoint: Path, costs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, out, _ = run("tune", tiny_checkpoint, "--sensitivity", costs, "--curve", "c.svg")
    assert code == 0 and "| Q4_K_M@llama.cpp |" in out and out.count("| tuned |") > 10
    assert "<svg" in (tmp_path / "c.svg").read_text("utf-8")
    code, out, _ = run(
        "tune", tiny_checkpoint, "--sensitivity", costs, "--like", "Q4_K_M", "--curve", "c.png", "--json"
    )
    assert code == 0
    result = json.loads(out)
    assert {point["name"] for point in result["curve"]["stock"]} >= {"Q4_K_M", "Q8_0@llama.cpp"}
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert run("tune", tiny_checkpoint, "--sensitivity", costs, "--curve", "c.png")[0] == OutputError.exit_code


def test_verify(run: Run, tiny_checkpoint: Path, costs: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("xllamacpp")
    options = ("--like", "Q4_0", "--verify", "--tokens", "32", "--text", TEXT, "--device", "cpu", "--json", "--quiet")
    code, out, err = run("tune", tiny_checkpoint, "--sensitivity", costs, *options)
    assert code == 0, err
    tuned, stock = json.loads(out)["measured"]
    assert (tuned["name"], stock["name"]) == ("tuned", "Q4_0") and tuned["bytes"] <= stock["bytes"]
    assert 0 < tuned["divergence"]["mean"] < 1 and tuned["divergence"]["n_positions"] == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no size"),
        (("--size", "20MB", "--bpw", "4"), "--size and --bpw exclude each other"),
        (("--size", "20MB", "--like", "Q4_0"), "--size and --like exclude each other"),
        (("--size", "20"), "not a size"),
        (("--size", "1MB"), "at least"),
        (("--bpw", "nan"), "not bits a weight"),
        (("--like", "Q9_Z"), "unknown quantization"),
        (("--size", "20MB", "--types", "Q4_K,Q9"), "unknown type 'Q9'"),
        (("--size", "20MB", "--types", "Q4_K"), "no type is left"),
        (("--size", "20MB", "--engine", "vllm"), "--engine vllm"),
        (("--size", "20MB", "--engine", "ollama-old", "--any-table-type"), "in few types"),
        (("--size", "20MB", "-o", "mine.gguf"), "not the name of a recipe"),
        (("--size", "20MB", "--text", "x.txt"), "--text without --verify"),
        (("--curve", "c.svg", "-o", "mine.toml"), "-o without a size"),
        (("--curve", "c.svg", "--verify"), "--verify without a size"),
        (("--curve", "c.jpg"), "no such kind of picture"),
        (("--size", "20MB", "--sensitivity", "missing.json"), "missing.json"),
        (("--size", "fits:8GB", "--ctx", "99999"), "not a context of this model"),
    ],
    ids=str,
)
def test_what_cannot_be_used(
    run: Run, tiny_checkpoint: Path, costs: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, out, err = run("tune", tiny_checkpoint, "--sensitivity", costs, *options)
    assert code in (UsageError.exit_code, SourceError.exit_code) and out == ""
    assert message in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_not_written(run: Run, tiny_checkpoint: Path, costs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "costs.toml"
    copy.write_bytes(costs.read_bytes())
    code, _, err = run("tune", tiny_checkpoint, "--sensitivity", copy, "--size", "20MB", "-o", copy, "--force")
    assert code == OutputError.exit_code and "is what is read" in err


def test_of_another_model(run: Run, small: Path, costs: Path) -> None:
    code, _, err = run("tune", small, "--sensitivity", costs, "--size", "20MB")
    assert code == UsageError.exit_code and "measured of another model" in err
