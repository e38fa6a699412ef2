"""The vision stage: sound files pass, one that shows something else fails, and what can't be compared is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf3n
from gguf3n.cli.validate import print_validation
from gguf3n.engines.llama_vision import VisionProcess
from gguf3n.engines.pictures import Picture
from gguf3n.engines.vision_reference import EndRows
from gguf3n.errors import ConfigError, GGUFError, SourceError, UsageError
from gguf3n.validation import vision as module
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.logits import LIMITS
from gguf3n.validation.options import ValidationOptions, parse_validation
from gguf3n.validation.report import write_report
from gguf3n.validation.result import Stage, Verdict
from gguf3n.validation.validate import Validation, part_for, run_stages, validate
from gguf3n.validation.vision import VisionResult, prepare_vision, reaction_cosine

FEW = (Picture(256, 256, 1), Picture(120, 60, 4))


@pytest.fixture(scope="module", autouse=True)
def few_pictures_and_what_the_reference_says_of_them() -> Iterator[None]:
    """Which depends on the rows of <end_of_image> only, and is worked out once for each."""
    known: dict[bytes, Any] = {}
    ask = module._reference_rows

    def remembered(reference: Any, image_size: int, end: EndRows, tick: Callable[[], None]) -> Any:
        key = end.token_embd.tobytes() + end.per_layer.tobytes()
        if key not in known:
            known[key] = ask(reference, image_size, end, tick)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PICTURES", FEW)
        patch.setattr(module, "_reference_rows", remembered)
        yield


@pytest.fixture(scope="module")
def seeing(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(multimodal=True)


@pytest.fixture(scope="module")
def files(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vision")
    gguf3n.convert(seeing, ["F32", "BF16@llama.cpp"], folder, mmproj=["F16", "lossless"], audio=False)
    names = {"text": "*-F32.gguf", "as llama.cpp": "*-llama.cpp-BF16.gguf", "F16": "mmproj-*-F16.gguf"}
    found = {name: next(folder.glob(pattern)) for name, pattern in names.items()}
    return {**found, "lossless": next(folder.glob("mmproj-*-lossless.gguf"))}


def options(**changes: object) -> ValidationOptions:
    return parse_validation(["vision"], **{"device": "cpu", "threads": 1, **changes})  # type: ignore[arg-type]


def run(path: Path, reference: Path, **changes: object) -> tuple[Validation, VisionResult]:
    validation = run_stages(
        Candidate(path), part_for(Candidate(path), gguf3n.read_source(reference)), options(**changes)
    )
    result = validation.stages[Stage.VISION]
    assert isinstance(result, VisionResult), result.problems
    return validation, result


@pytest.fixture(scope="module")
def sound(seeing: Path, files: dict[str, Path]) -> tuple[Validation, VisionResult]:
    return run(files["F16"], seeing, text_model=files["text"])


def test_llama_cpp_sees_what_transformers_sees(sound: tuple[Validation, VisionResult]) -> None:
    validation, found = sound
    assert validation.verdict is Verdict.PASS and not found.problems
    assert found.divergence.maximum < 1e-4 and found.reaction > 0.99
    assert found.between_pictures > 100 * found.divergence.mean
    assert found.square < 1e-4, "the text file has the mark that ends a picture as the model has it"
    assert found.not_square > 1e-3, "llama.cpp pads, transformers squashes"


def test_it_is_told_everywhere(
    sound: tuple[Validation, VisionResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation, found = sound
    print_validation(validation)
    out = capsys.readouterr().out
    assert "vision" in out and "cosine" in out and "pads" in out
    facts = json.loads(json.dumps(validation.as_dict()))["stages"]["vision"]
    assert facts["verdict"] == "pass" and facts["reaction"] == found.reaction
    assert facts["pictures"] == [picture.name for picture in FEW]
    write_report(validation, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "reaction to another picture" in page and "120 x 60" in page


def test_a_text_file_of_the_converter_is_no_fault_of_the_encoder(seeing: Path, files: dict[str, Path]) -> None:
    """Its padding in <end_of_image>'s rows is, and shows against the reference's own way."""
    _, found = run(files["lossless"], seeing, text_model=files["as llama.cpp"])
    assert found.verdict is Verdict.PASS and found.divergence.maximum < 1e-3
    assert found.square > 20 * found.divergence.mean


def test_another_projection_is_found(seeing: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """And the text model is made where none is named."""
    path = tmp_path / "mmproj.gguf"
    shutil.copy(files["lossless"], path)
    reader = gguf.GGUFReader(path, "r+")
    (projection,) = [tensor for tensor in reader.tensors if tensor.name == "mm.input_projection.weight"]
    projection.data[:] = np.array(projection.data[::-1])
    reader.data.flush()
    validation, found = run(path, seeing)
    assert validation.verdict is Verdict.FAIL
    assert found.reaction < 0.5 and found.divergence.mean > LIMITS[gguf.GGMLQuantizationType.F32].poor
    assert "made for this" in found.text


def test_a_file_that_aborts_is_a_fault(seeing: Path, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "aborts.gguf"
    gguf3n.convert(
        seeing, [], path, mmproj="F16", audio=False, tensor_types=["v.blk.0.0.conv_exp.weight=BF16"], force_types=True
    )
    validation = run_stages(
        Candidate(path), part_for(Candidate(path), gguf3n.read_source(seeing)), options(text_model=files["text"])
    )
    (problem,) = validation.stages[Stage.VISION].problems
    assert problem.verdict is Verdict.FAIL and "aborts" in problem.what


def test_a_server_is_asked_likewise(seeing: Path, files: dict[str, Path]) -> None:
    with VisionProcess(files["text"], files["F16"], n_threads=1) as process:
        _, found = run(files["F16"], seeing, text_model=files["text"], server=process.ready["url"])
    assert found.verdict is Verdict.PASS and found.engine.startswith("llama-server at ")


def refused(path: Path, reference: str | Path, **changes: object) -> str:
    with pytest.raises((UsageError, GGUFError, ConfigError)) as caught:
        part = part_for(Candidate(path), gguf3n.read_source(reference))
        prepare_vision(Candidate(path), part, options(**changes))
    return caught.value.one_line


def test_what_cannot_be_compared_is_said(
    seeing: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "checkpoint" in refused(files["lossless"], files["F16"])
    assert "not the text model" in refused(files["F16"], seeing, text_model=files["lossless"])
    assert "--server without --text-model" in refused(files["F16"], seeing, server="http://127.0.0.1:9")
    monkeypatch.setattr(module, "MADE_BYTES", 1000)
    assert "--text-model FILE" in refused(files["F16"], seeing)
    gguf3n.convert(seeing, [], tmp_path / "hears.gguf", mmproj="F16", vision=False)
    assert "no vision encoder" in refused(tmp_path / "hears.gguf", seeing)


def test_a_text_file_without_the_mark(seeing: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of 2025."""
    monkeypatch.setattr(module.Subject, "array", lambda *_: [""] * 1024)
    assert "does not fit" in refused(files["F16"], seeing, text_model=files["text"])


@pytest.mark.parametrize(("value", "what"), [(None, "found: 262,144"), ("x", "impossible")])
def test_the_mark_of_a_config_that_is_no_token(
    seeing: Path, files: dict[str, Path], tmp_path: Path, value: object, what: str
) -> None:
    """Missing, it is the published one, which the small model does not have."""
    shutil.copytree(seeing, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text("utf-8"))
    (tmp_path / "x" / "config.json").write_text(json.dumps({**config, "eoi_token_id": value}), "utf-8")
    found = refused(files["F16"], tmp_path / "x", text_model=files["text"])
    assert "config.json: eoi_token_id is" in found and what in found


def test_a_tokenizer_that_cuts_a_text_otherwise_when_more_follows(seeing: Path) -> None:
    class Other:
        source = gguf3n.read_source(seeing)

        def prompts(self, before: str, afters: list[str]) -> list[list[int]]:
            return [[len(after)] for after in afters]

    with pytest.raises(SourceError) as caught:
        module._reference_rows(Other(), 256, EndRows(np.ones(1, np.float32), np.ones(1, np.float32)), lambda: None)  # type: ignore[arg-type]
    assert str(seeing) in caught.value.what and "tokenizer" in caught.value.what and caught.value.fix


def test_stages_are_those_of_the_kind_of_file(seeing: Path, files: dict[str, Path]) -> None:
    found = validate(files["lossless"], seeing, stages="structure,tensors,tokens,logits")
    assert list(found.stages) == [Stage.STRUCTURE, Stage.TENSORS] and found.verdict is Verdict.PASS
    with pytest.raises(UsageError, match="no stage to run for an mmproj file"):
        validate(files["lossless"], seeing, stages="tokens,logits")
    with pytest.raises(UsageError, match="no stage to run for a text model"):
        validate(files["text"], seeing, stages="vision")


def test_reactions() -> None:
    rng = np.random.default_rng(0)
    reference = [rng.standard_normal(50).astype(np.float32) for _ in range(6)]
    assert reaction_cosine(reference, reference, 2) == pytest.approx(1)
    shifted = [row + 3 for row in reference]
    assert reaction_cosine(reference, shifted, 2) == pytest.approx(1)
    bias = rng.standard_normal(50).astype(np.float32)
    assert reaction_cosine(reference, [row + bias for row in reference], 2) == pytest.approx(1, abs=1e-5)
    blind = [reference[0]] * 6
    assert reaction_cosine(reference, blind, 2) == 0
    assert abs(reaction_cosine(reference, [rng.permutation(row) for row in reference], 2)) < 0.5
