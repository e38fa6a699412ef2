"""The whole validation: sound files pass, each planted fault fails in the stages that should see it."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import gguf3n
from gguf3n.cli.application import app
from gguf3n.errors import GGUFError, OutputError, UsageError
from gguf3n.formats.gguf_draft import Draft
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.gguf_reader import open_part
from gguf3n.gemma3n.part import PartKind, text_part
from gguf3n.progress import Progress
from gguf3n.validation.options import parse_validation
from gguf3n.validation.result import Stage, Verdict
from gguf3n.validation.stages import STAGES
from gguf3n.validation.validate import Validation, validate
from tests.validation import plant
from tests.validation.plant_keys import FAULTS

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")

STRUCTURE, TENSORS, TOKENS, LOGITS, _ = Stage
OF_TEXT = [STRUCTURE, TENSORS, TOKENS, LOGITS]
"""tests/validation/test_vision.py has the other kind of file."""


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("validated") / "tiny-Q8_0.gguf"
    gguf3n.convert(tiny_checkpoint, "Q8_0", path)
    return path


@pytest.fixture(scope="module")
def reference(sound: Path, tiny_checkpoint: Path) -> Path:
    """The reference's log-probabilities, so that its model is run once."""
    path = sound.with_name("reference.safetensors")
    validate(sound, tiny_checkpoint, stages=[LOGITS], save_reference=path, n_tokens=512, n_ctx=256, threads=1)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_sound_file_passes(sound: Path, tiny_checkpoint: Path, reference: Path) -> None:
    seen: list[Progress] = []
    validation = validate(
        sound,
        tiny_checkpoint,
        use_reference=reference,
        threads=1,
        progress=seen.append,
    )
    assert list(validation.stages) == OF_TEXT
    assert [problem for result in validation.stages.values() for problem in result.problems] == []
    assert validation.verdict is Verdict.PASS
    assert {state.stage for state in seen if state.done == state.total} == {TENSORS.value, LOGITS.value}
    assert {(state.stage, state.unit) for state in seen} == {("tensors", "weights"), ("logits", "positions")}


def failed_stages(validation: Validation) -> set[Stage]:
    return {stage for stage, result in validation.stages.items() if result.verdict is Verdict.FAIL}


def planted(name: str) -> Callable[[Path, Path], None]:
    function, _ = plant.PLANTS[name]

    def plant_it(path: Path, source: Path) -> None:
        function(plant.Planter(path, text_part(gguf3n.read_source(source))))

    return plant_it


def keyed(name: str) -> Callable[[Path, Path], None]:
    return lambda path, source: FAULTS[name].plant(path)


def norms_with_1_added(path: Path, source: Path) -> None:
    planter = plant.Planter(path, text_part(gguf3n.read_source(source)))
    for tensor in planter.source.tensors:
        if tensor.name.endswith("norm.weight"):
            planter.write(tensor.name, planter.values(tensor.name) + 1)


CAUGHT: dict[str, tuple[Callable[[Path, Path], None], set[Stage]]] = {
    "one tensor of a layer replaced by another layer's": (planted("another_layers_tensor"), {TENSORS, LOGITS}),
    "a row block zeroed": (planted("zeroed_rows"), {TENSORS}),
    "norms with +1": (norms_with_1_added, {TENSORS, LOGITS}),
    "wrong rope base": (keyed("wrong rope base"), {STRUCTURE, LOGITS}),
    "wrong sliding pattern": (keyed("wrong sliding pattern"), {STRUCTURE, LOGITS}),
    "shared_kv_layers off by one": (keyed("shared_kv_layers off by one"), {STRUCTURE}),
    "AltUp matrices in the wrong order": (planted("altup_in_another_order"), {TENSORS, LOGITS}),
    "a quantized tensor from an older checkpoint": (planted("older_version"), {TENSORS}),
    "a vocabulary shifted by one": (keyed("vocabulary shifted up"), {STRUCTURE, TOKENS}),
    "a chat template with a second BOS": (keyed("a second begin token"), {STRUCTURE, TOKENS}),
}
"""The fault, and the stages that must see it; others may."""


@pytest.mark.parametrize("name", CAUGHT)
def test_a_planted_fault_fails(name: str, sound: Path, tiny_checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    plant_fault, stages = CAUGHT[name]
    path = Path(shutil.copy(sound, tmp_path / "faulty.gguf"))
    plant_fault(path, tiny_checkpoint)
    validation = validate(path, tiny_checkpoint, use_reference=reference, threads=1)
    assert validation.verdict is Verdict.FAIL
    assert stages <= failed_stages(validation), [result.problems for result in validation.stages.values()]


def test_command(sound: Path, tiny_checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = run("validate", sound, "--reference", tiny_checkpoint, "--use-reference", reference, "--json",
                 "--threads", 1, "--quiet", "--report", report)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verdict"] == "pass"
    assert list(found["stages"]) == [stage.value for stage in OF_TEXT]
    assert found["stages"]["logits"]["divergence"]["n_positions"] == 2 * (256 - 1 - 128)
    assert found["stages"]["tensors"]["n_identical"] == len(found["stages"]["tensors"]["tensors"])
    assert report.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_command_says_what_is_wrong(sound: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(sound, tmp_path / "faulty.gguf"))
    planted("another_layers_tensor")(path, tiny_checkpoint)
    arguments = ("validate", path, "--reference", tiny_checkpoint, "--stages", "tensors,structure", "--quiet")
    result = run(*arguments)
    assert result.exit_code == 12
    assert "pass  structure" in result.stdout
    assert "fail  tensors" in result.stdout
    assert "the values of blk.4.attn_q.weight" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines()[2:])) <= 80


def test_a_file_that_llama_cpp_does_not_load(sound: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(sound.read_bytes()[:-100_000])
    validation = validate(path, tiny_checkpoint, n_tokens=32, threads=1)
    assert failed_stages(validation) >= {STRUCTURE, LOGITS}


def test_against_an_unquantized_gguf(sound: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny-BF16.gguf"
    gguf3n.convert(tiny_checkpoint, "BF16", source)
    validation = validate(sound, source, n_tokens=64, n_ctx=32, threads=1)
    assert validation.verdict is Verdict.PASS, [result.problems for result in validation.stages.values()]


def split(path: Path, folder: Path) -> list[Path]:
    """The two parts of a file."""
    parts = [folder / f"{path.stem}-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, part in enumerate(parts):
        draft = Draft(open_part(path))
        half = len(draft.tensors) // 2
        draft.set(KeyValue("split.no", GGUFValueType.UINT16, number))
        draft.set(KeyValue("split.count", GGUFValueType.UINT16, 2))
        draft.set(KeyValue("split.tensors.count", GGUFValueType.INT32, len(draft.tensors)))
        draft.tensors = draft.tensors[half:] if number else draft.tensors[:half]
        draft.save(part)
    return parts


def test_any_part_of_split_files(sound: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny-BF16.gguf"
    gguf3n.convert(tiny_checkpoint, "BF16", source)
    file, reference = split(sound, tmp_path)[1], split(source, tmp_path)[1]
    validation = validate(file, reference, stages=[TENSORS, LOGITS], n_tokens=64, n_ctx=32, threads=1)
    assert validation.verdict is Verdict.PASS, [result.problems for result in validation.stages.values()]


def test_convert_and_validate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = run("convert", tiny_checkpoint, "-q", "Q8_0", "-q", "Q4_0", "-o", tmp_path, "--validate", "--stages",
                 "structure,tensors", "--json", "--quiet")  # fmt: skip
    assert result.exit_code == 0, result.output
    outputs = json.loads(result.stdout)["outputs"]
    assert [output["validation"]["verdict"] for output in outputs] == ["pass", "pass"]
    assert [list(output["validation"]["stages"]) for output in outputs] == [["structure", "tensors"]] * 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stages", "logic"], "no stage 'logic'"),
        (["--report", "page.pdf"], "page.pdf"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--revision", "main"], "--revision is for Hub ids"),
        (["--device", "tpu"], "tpu"),
        (["--ctx", "5000", "--tokens", "9000"], "--ctx is more than the model reads"),
        (["--stages", "tensors", "--save-reference", "x.kld"], "--save-reference without the stage logits"),
        (["--stages", "logits", "--imatrix", "x.gguf"], "--imatrix without the stage tensors"),
    ],
)
def test_bad_options(options: list[str], said: str, sound: Path, tiny_checkpoint: Path) -> None:
    result = run("validate", sound, "--reference", tiny_checkpoint, *options)
    assert isinstance(result.exception, UsageError | gguf3n.Gguf3nError)
    assert said in str(result.exception)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (None, list(Stage)),
        ([TENSORS, STRUCTURE], [STRUCTURE, TENSORS]),
        (["tensors", STRUCTURE, "tensors"], [STRUCTURE, TENSORS]),
        ({"logits"}, [LOGITS]),
        ("tokens", [TOKENS]),
        ("logits, structure", [STRUCTURE, LOGITS]),
        (TENSORS, [TENSORS]),
    ],
    ids=str,
)
def test_stages_by_name(stages: Any, expected: list[Stage]) -> None:
    assert list(parse_validation(stages).stages) == expected


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([], "no stage to run"),
        ("", "no stage ''"),
        (["logic"], "no stage 'logic'"),
        ("tensors,logic", "no stage 'logic'"),
        ([TENSORS, "Tensors"], "no stage 'Tensors'"),
    ],
    ids=str,
)
def test_stages_that_there_are_not(stages: Any, said: str, sound: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        validate(sound, tiny_checkpoint, stages=stages)
    assert caught.value.expected == "structure, tensors, tokens, logits, vision"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stages": 5}, "not stages"),
        ({"n_tokens": 0}, "n_tokens"),
        ({"n_ctx": "x"}, "n_ctx"),
        ({"threads": -1}, "threads"),
        ({"imatrix": 5}, "not an importance matrix"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": None, "stages": "tensors"}, "device None"),
        ({"dtype": "float16"}, "dtype 'float16'"),
    ],
)
def test_options_that_can_not_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_validation(**options)


def test_the_table_has_a_row_for_each_stage() -> None:
    assert [row.stage for row in STAGES] == list(Stage)
    names = set(inspect.signature(parse_validation).parameters)
    for row in STAGES:
        assert row.compares and row.against
        assert set(row.options) <= names
    for kind in PartKind:
        own = [option for row in STAGES if kind in row.kinds for option in row.options]
        assert len(set(own)) == len(own), "each option is one stage's"


@pytest.mark.parametrize("options", [["--stages", "tensors"], ["--report", "x.md"], ["--validate", "--dry-run"]])
def test_validation_options_of_convert(options: list[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = run("convert", tiny_checkpoint, "-q", "Q8_0", "-o", tmp_path, *options)
    assert isinstance(result.exception, UsageError)
    assert not list(tmp_path.iterdir())


def test_the_reference_of_convert_must_fit(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf3n.engines.memory.available_bytes", lambda: 1)
    result = run("convert", tiny_checkpoint, "-q", "Q8_0", "-o", tmp_path, "--validate")
    assert isinstance(result.exception, UsageError)
    assert "--stages structure,tensors,tokens" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_file_and_source_swapped(sound: Path, tiny_checkpoint: Path) -> None:
    for file, source in ((tiny_checkpoint, sound), (sound, sound)):
        result = run("validate", file, "--reference", source)
        assert "name the file to check as FILE" in str(result.exception)
        assert "requantize" not in str(result.exception)


def test_the_file_is_looked_at_before_a_source_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf3n.cli.validate.read_reference", None)
    result = run("validate", tmp_path / "none.gguf", "--reference", "org/name")
    assert isinstance(result.exception, GGUFError)


def test_every_file_shows_its_progress(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = run("convert", tiny_checkpoint, "-q", "Q8_0", "-q", "F16", "-o", tmp_path, "--validate", "--stages",
                 "tensors")  # fmt: skip
    assert result.stderr.count("tensors  100%") == 2


@pytest.mark.parametrize("option", ["processors + 2", "a built-in one", "all"])
def test_help_says_what_is_taken_by_default(option: str) -> None:
    assert f"[default: ({option})]" in " ".join(run("validate", "--help").stdout.replace("│", " ").split())


def test_another_source(sound: Path, make_checkpoint: Callable[..., Path]) -> None:
    validation = validate(sound, make_checkpoint(seed=1), stages=[TENSORS])
    first = validation.stages[TENSORS].problems[0]
    assert "tensors are not the source's: was the file made from it?" in first.what


def test_not_a_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="cannot be read"):
        validate(tmp_path / "none.gguf", tiny_checkpoint)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        validate(tmp_path / "text.gguf", tiny_checkpoint)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float16"}, UsageError),
        ({"device": "tpu"}, UsageError),
        ({"text": "a"}, UsageError),
        ({"server": "http://127.0.0.1:1"}, UsageError),
        ({"use_reference": "missing.safetensors"}, UsageError),
        ({"save_reference": "."}, OutputError),
    ],
    ids=str,
)
def test_what_keeps_the_logits_from_running_is_said_first(
    options: dict[str, Any],
    error: type[Exception],
    sound: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gguf3n.validation.stages.check_structure", None)
    with pytest.raises(error):
        validate(sound, tiny_checkpoint, **options)


def test_too_little_memory_is_said_first(sound: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf3n.validation.stages.check_structure", None)
    monkeypatch.setattr("gguf3n.engines.memory.available_bytes", lambda: 1)
    with pytest.raises(UsageError, match="not enough memory for the reference"):
        validate(sound, tiny_checkpoint)


def test_a_saved_reference_needs_no_torch(
    sound: Path, tiny_checkpoint: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    validation = validate(sound, tiny_checkpoint, stages=[LOGITS], use_reference=reference, threads=1)
    assert validation.verdict is Verdict.PASS


def test_without_the_extra(sound: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(UsageError, match=r"logits cannot be validated: torch is not (.|\n)*gguf3n\[validate\]"):
        validate(sound, tiny_checkpoint)
    assert isinstance(validate(sound, tiny_checkpoint, stages=[STRUCTURE]), Validation)
