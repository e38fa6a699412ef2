"""What is said after a conversion: how to run what was just written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import micro
from tests.command_line import Run


def steps(out: str) -> dict[str, list[str]]:
    """Engine -> the words of its line, as a shell reads them."""
    lines = out.splitlines()
    if "to run it:" not in lines:
        return {}
    rows = [line.strip().split("  ", 1) for line in lines[lines.index("to run it:") + 1 :]]
    return {engine: shlex.split(command) for engine, command in rows}


@pytest.mark.parametrize("folder", ["out", "a b's", "-out"])
def test_each_engine_gets_the_file(tiny_checkpoint: Path, tmp_path: Path, run: Run, folder: str) -> None:
    """Its name as a shell takes it; of several files the first."""
    code, out, _ = run("convert", tiny_checkpoint, "-q", "Q8_0", "-q", "F16", f"--output={tmp_path / folder}")
    assert code == 0
    path = tmp_path / folder / f"{tiny_checkpoint.name}-Q8_0.gguf"
    found = steps(out)
    assert found["llama.cpp"] == ["llama-cli", "-m", str(path)]
    assert found["LM Studio"] == ["lms", "import", "--copy", str(path)]
    assert found["Ollama"][:3] == ["gguf3n", "ollama", f"{path};"]


def test_the_line_for_ollama_writes_a_modelfile(tiny_checkpoint: Path, tmp_path: Path, run: Run) -> None:
    _, out, _ = run("convert", tiny_checkpoint, "-q", "Q8_0", "-o", tmp_path / "a b's")
    line = next(line for line in out.splitlines() if line.startswith("  Ollama")).split("  ", 2)[2]
    make, create, start = (shlex.split(command) for command in line.strip().split("; "))
    assert run(*make[1:])[0] == 0
    name = f"{tiny_checkpoint.name}-q8_0".lower()
    assert create[:4] == ["ollama", "create", name, "-f"] and start == ["ollama", "run", name]
    (said,) = (line for line in Path(create[4]).read_text("utf-8").splitlines() if line.startswith("FROM "))
    assert (Path(create[4]).parent / said.removeprefix("FROM ").strip('"')).is_file()


def test_a_name_that_looks_like_an_option(
    tiny_checkpoint: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert steps(run("convert", tiny_checkpoint, "-q", "Q8_0", "--output=-x.gguf")[1])["llama.cpp"][2] == "./-x.gguf"


def test_with_the_encoders(make_checkpoint: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    source = make_checkpoint(multimodal=True)
    _, out, _ = run("convert", source, "-q", "Q8_0", "--mmproj", "F16", "-o", tmp_path / "out")
    text, mmproj = (tmp_path / "out" / f"{name}.gguf" for name in (f"{source.name}-Q8_0", f"mmproj-{source.name}-F16"))
    assert steps(out)["llama.cpp"] == ["llama-mtmd-cli", "-m", str(text), "--mmproj", str(mmproj)]
    assert steps(out)["Ollama"][:5] == ["gguf3n", "ollama", str(text), "--mmproj", f"{mmproj};"]
    assert not steps(run("convert", source, "--mmproj", "F16", "-o", tmp_path / "alone")[1])


def test_of_a_file_that_can_not_be_run(tmp_path: Path, run: Run) -> None:
    """The tests' smallest model has too few layers for llama.cpp, which lint says."""
    assert not steps(run("convert", micro.make(tmp_path / "micro"), "-q", "Q8_0", "-o", tmp_path / "out")[1])


def test_where_nobody_reads_it(tiny_checkpoint: Path, tmp_path: Path, run: Run) -> None:
    words = ("convert", tiny_checkpoint, "-q", "Q8_0", "-o", tmp_path / "out", "--force")
    assert not steps(run(*words, "--quiet")[1])
    assert json.loads(run(*words, "--json")[1])["outputs"]
    assert not steps(run(*words, "--dry-run")[1])


def test_quantize_says_it_too(tiny_checkpoint: Path, tmp_path: Path, run: Run) -> None:
    assert run("convert", tiny_checkpoint, "-q", "BF16", "-o", tmp_path / "x.gguf", "--quiet")[0] == 0
    out = run("quantize", tmp_path / "x.gguf", "-q", "Q8_0", "-o", tmp_path / "y.gguf")[1]
    assert steps(out)["llama.cpp"] == ["llama-cli", "-m", str(tmp_path / "y.gguf")]


def test_against_without_a_dry_run(tmp_path: Path, run: Run) -> None:
    code, out, err = run("convert", tmp_path / "nowhere", "-q", "Q8_0", "--against", "Q4_0")
    assert (code, out) == (2, "") and "--against without --dry-run" in err


@pytest.mark.parametrize("scheme", ["https://huggingface.co/", "http://www.huggingface.co/", "hf.co/"])
@pytest.mark.parametrize("rest", ["", "/", "/tree/main", "?library=transformers"])
def test_the_address_of_a_page(run: Run, scheme: str, rest: str) -> None:
    """The id is what to type; nothing is fetched."""
    code, _, err = run("convert", f"{scheme}google/gemma-3n-E4B-it{rest}", "-q", "Q8_0")
    assert code == 3 and "a model's page" in err and err.splitlines()[-1].split()[-1] == "google/gemma-3n-E4B-it"
