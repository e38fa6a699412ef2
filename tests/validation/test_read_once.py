"""One run of validation reads each file's header, config and tokenizer once, whatever stages want of them."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gguf3n
from gguf3n.formats import checkpoint, gguf_reader, training_folder
from gguf3n.formats.byte_source import ByteSource, LocalFile
from gguf3n.gemma3n import config, source, tokenizer
from gguf3n.validation.report import write_report
from gguf3n.validation.result import Verdict
from gguf3n.validation.validate import validate

WHAT_IS_THERE = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "xllamacpp", "psutil"))
ALL = pytest.param(
    ("structure", "tensors", "tokens", "logits"),
    marks=pytest.mark.skipif(not WHAT_IS_THERE, reason="needs gguf3n[validate]"),
    id="all",
)
every_choice = pytest.mark.parametrize(
    "stages", [("structure",), ("tensors",), ("structure", "tensors"), ALL], ids=lambda stages: "-".join(stages)
)
OPTIONS: dict[str, Any] = {"n_tokens": 40, "n_ctx": 20, "threads": 1}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read, by what and its name."""
    counts: Counter[str] = Counter()

    def count(owner: Any, function: str, name: Callable[[Any], str]) -> None:
        original = getattr(owner, function)

        def counting(first: Any, *arguments: Any, **options: Any) -> Any:
            # what was just written, held against its own header; what the reference has said, kept for a second look
            if not name(first).endswith((".partial", "reference.safetensors")):
                counts[f"{function} {name(first)}"] += 1
            return original(first, *arguments, **options)

        monkeypatch.setattr(owner, function, counting)

    def of_source(given: ByteSource) -> str:
        return given.path.name if isinstance(given, LocalFile) else given.name

    count(gguf_reader, "read_header", of_source)
    count(checkpoint, "read_file", lambda path: path.name)
    count(config, "read_checkpoint_json", lambda path: path.name)
    count(tokenizer, "read_checkpoint_json", lambda path: path.name)
    count(source, "load_config", lambda path: path.name)
    count(source, "parse_config", lambda raw: "config.json")
    count(training_folder, "read_tensor_table", lambda path: path.name)
    count(source, "read_vocabulary", lambda path: path.name)
    return counts


@every_choice
def test_a_checkpoint(
    stages: tuple[str, ...], make_checkpoint: Callable[..., Path], tmp_path: Path, reads: Counter[str]
) -> None:
    directory = make_checkpoint(layout="nested", shards=3)
    (written,) = gguf3n.convert(directory, "Q8_0", tmp_path / "x.gguf")
    reads.clear()
    validation = validate(written.path, directory, stages=stages, **OPTIONS)
    write_report(validation, tmp_path / "x.md")
    assert validation.verdict is Verdict.PASS
    assert [stage.value for stage in validation.stages] == list(stages)
    expected = {"read_header x.gguf", "read_checkpoint_json config.json"}
    expected |= {f"read_file {path.name}" for path in directory.glob("*.safetensors")}
    expected |= {f"load_config {directory.name}", "parse_config config.json"}
    expected |= {f"read_tensor_table {directory.name}", f"read_vocabulary {directory.name}"}
    assert len(expected) == 9
    assert set(reads) >= expected
    assert set(reads.values()) == {1}, reads
    assert set(reads) - expected <= {f"read_checkpoint_json {path.name}" for path in directory.glob("*token*.json")}


@every_choice
def test_a_gguf_file(stages: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path, reads: Counter[str]) -> None:
    (reference,) = gguf3n.convert(tiny_checkpoint, "BF16", tmp_path / "source.gguf")
    (written,) = gguf3n.convert(tiny_checkpoint, "Q8_0", tmp_path / "x.gguf")
    reads.clear()
    assert validate(written.path, reference.path, stages=stages, **OPTIONS).verdict is Verdict.PASS
    assert reads == {"read_header x.gguf": 1, "read_header source.gguf": 1}


@every_choice
def test_a_source_that_is_open_is_not_read_again(
    stages: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path, reads: Counter[str]
) -> None:
    """A conversion and the validation of its file: what the plan has read is there."""
    opened = gguf3n.read_source(tiny_checkpoint)
    (written,) = gguf3n.convert(opened, "Q8_0", tmp_path / "x.gguf")
    assert validate(written.path, opened, stages=stages, **OPTIONS).verdict is Verdict.PASS
    assert set(reads.values()) == {1}, reads
    assert reads["read_header x.gguf"] == reads["load_config " + tiny_checkpoint.name] == 1
