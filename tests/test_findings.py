"""What is written is linted first: a plan says what lint will say of its file, and the sources' slips are mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import TokenType
from sentencepiece.sentencepiece_model_pb2 import ModelProto

import gguf3n
from gguf3n.conversion import plan_all, read_source
from gguf3n.deciding import estimate
from gguf3n.formats.gguf_layout import GGUFValueType
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.source import Checkpoint, Source
from gguf3n.gemma3n.tokenizer import CONTROL_TOKENS, Vocabulary
from gguf3n.inspection.lint import CHECKS, Severity
from gguf3n.recipes import find_recipe, preset_names
from tests import micro
from tests.inspection.faults import PLANTS, set_array, values
from tests.test_cli import run


def said(findings: tuple[Any, ...]) -> list[dict[str, str]]:
    return [finding.as_dict() for finding in findings if finding.check.severity is not Severity.NOTE]


def test_nothing_is_said_of_what_the_presets_make_of_a_sound_checkpoint(tiny_checkpoint: Path) -> None:
    part = text_part(read_source(tiny_checkpoint))
    assert isinstance(part.source, Checkpoint)
    recipes = [find_recipe(name) for name in preset_names()]
    recipes = [recipe for recipe in recipes if not estimate(recipe, part.source.config).needs_imatrix]
    assert len(recipes) > 25
    assert {plan.recipe.name: plan.findings for plan in plan_all(part, recipes) if plan.findings} == {}


@pytest.mark.parametrize(
    "text",
    [
        {"altup_active_idx": 1},
        {"activation_sparsity_pattern": [0.0] * 3},
        {"intermediate_size": [128, 128, 192]},
        {},
    ],
    ids=lambda text: "+".join(text) or "as-it-is",
)
def test_a_plan_says_what_lint_says_of_the_file(text: dict[str, Any], tmp_path: Path) -> None:
    raw = micro.config(**text)
    arrays = {name: fitted(name, array, raw) for name, array in micro.tensors(raw).items()}
    source = micro.make(tmp_path / "source", raw=raw, arrays=arrays)
    (source / "chat_template.jinja").unlink()
    (written,) = gguf3n.convert(source, "Q8_0", tmp_path / "x.gguf")
    found = said(written.plan.findings)
    assert found == said(gguf3n.plan(source, "Q8_0").findings) == said(gguf3n.lint(written.path).findings)
    ids = {entry["id"] for entry in found}
    assert {"fixed-size", "chat-template"} <= ids
    assert ("mixed-ffn" in ids) is ("intermediate_size" in text)


def fitted(name: str, array: np.ndarray, raw: dict[str, Any]) -> np.ndarray:
    """The last layer's FFN in its own width, where the config gives it one."""
    if ".layers.2.mlp." not in name:
        return array
    return np.zeros([raw["text_config"]["intermediate_size"][2] if n == 128 else n for n in array.shape], array.dtype)


@pytest.mark.parametrize("check_id", ["token-scores", "control-type", "special-id", "no-bos", "size-key"])
def test_faults_of_a_gguf_source_are_said(check_id: str, tmp_path: Path) -> None:
    source = micro.make(tmp_path / "source")
    (written,) = gguf3n.convert(source, "BF16", tmp_path / "x.gguf")
    sound = gguf3n.plan(written.path, "Q8_0").findings
    PLANTS[check_id](written.path)
    new = [finding for finding in gguf3n.plan(written.path, "Q8_0").findings if finding not in sound]
    assert {finding.check.id for finding in new} == {check_id}


def test_the_command_prints_them_where_notes_stand(tmp_path: Path) -> None:
    source = micro.make(tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    for extra in ((), ("--dry-run",)):
        result = run(tmp_path, "convert", source, "-q", "Q8_0", "-q", "Q4_0", "--json", *extra)
        assert result.code == 0
        warnings = [line.removeprefix("warning: ") for line in result.stderr.splitlines() if "warning: " in line]
        assert len(warnings) == len(set(warnings)) == 4
        for output in result.json["outputs"]:
            assert len(output["findings"]) == 4
            for finding, line in zip(output["findings"], warnings, strict=True):
                assert line.startswith(f"{finding['found']}: {finding['meaning']}")


def test_of_many_findings_of_a_check_some_are_told(tmp_path: Path) -> None:
    source = micro.make(tmp_path / "source")
    (written,) = gguf3n.convert(source, "BF16", tmp_path / "x.gguf")
    tokens = values(written.path, "tokenizer.ggml.tokens")
    set_array(written.path, "tokenizer.ggml.tokens", GGUFValueType.STRING, [*tokens[:-5], *[tokens[-6]] * 5])
    result = run(tmp_path, "quantize", written.path, "-q", "Q8_0", "--dry-run")
    told = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [line for line in told if "as is token" in line] == told[-4:-1]
    assert told[-1] == "warning: duplicate-token: 2 more; gguf3n lint names them all"


def test_a_notice_is_one_line_that_names_no_empty_remedy() -> None:
    for check in CHECKS:
        finding = gguf3n.Finding(check, "here", "is wrong", "here is wrong")
        assert finding.notice.startswith(f"here is wrong: {check.meaning}")
        assert "download" not in finding.notice or check.id == "split-parts"
        assert "\n" not in finding.notice


# what the sources tell is mended


def unlisted(directory: Path) -> None:
    """Chat marks and begin and end tokens are ordinary pieces of tokenizer.json, and no file says more."""
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink()
    raw = micro.read_json(directory / "tokenizer.json")
    micro.write_json(directory / "tokenizer.json", raw | {"added_tokens": []})


def ordinary(directory: Path) -> None:
    """The same in a tokenizer.model that is alone."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).unlink()
    model = ModelProto()
    model.ParseFromString((directory / "tokenizer.model").read_bytes())
    for piece in model.pieces:
        if piece.piece in CONTROL_TOKENS:
            piece.type = ModelProto.SentencePiece.NORMAL
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("slip", [unlisted, ordinary])
def test_gemmas_marks_are_control_tokens(slip: Any, tmp_path: Path) -> None:
    directory = micro.make(tmp_path / "source")
    before = vocabulary_of(read_source(directory))
    slip(directory)
    plan = gguf3n.plan(directory, "Q8_0")
    assert {finding.check.id for finding in plan.findings} == {"fixed-size"}
    vocabulary = vocabulary_of(plan.part.source)
    assert plan.notices == vocabulary.notices
    (notice,) = plan.notices
    assert notice.endswith(f": {', '.join(CONTROL_TOKENS)} are written as control tokens, which no file says")
    for text in CONTROL_TOKENS:
        token_id = vocabulary.tokens.index(text)
        assert vocabulary.types[token_id] is TokenType.CONTROL
        assert vocabulary.scores[token_id] == before.scores[token_id]
    roles = ("bos", "eos", "pad")
    assert {role: vocabulary.special_ids[role] for role in roles} == {role: before.special_ids[role] for role in roles}
    assert before.notices == ()


def vocabulary_of(source: Source) -> Vocabulary:
    assert isinstance(source, Checkpoint)
    return source.vocabulary
