"""The JSON Schemas: made of the code as it is, and what every command prints is what they say, with nothing beside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import gguf3n
from gguf3n import cli
from gguf3n.cli.imatrix import _measured_json
from gguf3n.cli.sensitivity import _as_json as _sensitivity_json
from gguf3n.engines.activations import Measurement
from gguf3n.formats.correlations import write_correlations
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguf3n.formats.sensitivity import read_sensitivity, write_sensitivity
from gguf3n.schemas.generate import DRAFT, file_name
from gguf3n.schemas.outputs import OUTPUTS
from gguf3n.tuning.measure import Measurement as SensitivityMeasurement
from gguf3n.validation.divergence import Divergence
from gguf3n.validation.logits import Limits, LogitsResult
from gguf3n.validation.result import Problem, Stage, Verdict
from gguf3n.validation.vision import VisionResult
from tests import micro, refining
from tests.tuning.facts import made_up
from workshop.places import ROOT

FOLDER = ROOT / "gguf3n/schemas"
REPO = "me/micro-GGUF"


def strict(schema: Any) -> Any:
    """The schema without what may be added: a field that it does not name is then a fault."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {name: strict(value) for name, value in schema.items()} | closed


def check(result: dict[str, Any]) -> str:
    """Hold a result against its schema; gives the schema's name."""
    name = str(result["schema"])
    schema = json.loads((FOLDER / file_name(name)).read_text("utf-8"))
    jsonschema.Draft202012Validator(strict(schema)).validate(result)
    return name


def test_they_are_those_of_the_code() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "scripts/make_schemas.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert made.returncode == 0, f"run scripts/make_schemas.py: {made.stderr}"


@pytest.mark.parametrize("name", OUTPUTS)
def test_they_are_schemas(name: str) -> None:
    schema = json.loads((FOLDER / file_name(name)).read_text("utf-8"))
    assert (schema["$schema"], schema["title"]) == (DRAFT, name)
    jsonschema.Draft202012Validator.check_schema(schema)


def an_imatrix(path: Path) -> None:
    entries = {
        f"blk.{bid}.ffn_down.weight": Entry(np.full((1, 128), 2 + bid, np.float32), np.array([8], np.float32))
        for bid in range(3)
    }
    write_imatrix(ImportanceMatrix(Path("x"), entries, ("text.txt",), 1, 8), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """What the commands need; they follow one another."""
    folder = tmp_path_factory.mktemp("schemas")
    micro.make(folder / "micro")
    micro.make(folder / "other", arrays=micro.tensors(micro.config(), seed=1))
    (folder / "wide").symlink_to(make_checkpoint(size="tiny-e4b"))
    (folder / "seeing").symlink_to(make_checkpoint(multimodal=True))
    an_imatrix(folder / "imatrix.gguf")
    part = gguf3n.text_part(gguf3n.read_source(folder / "micro"))
    write_sensitivity(made_up(part, (QType.Q8_0, QType.Q5_1, QType.Q4_0)), folder / "costs.json")
    write_correlations(refining.of_part(part), folder / "correlations.gguf")
    (folder / "jobs.toml").write_text('[[model]]\nsource = "micro"\nrepo = "me/micro-GGUF"\nquants = ["Q8_0"]\n')
    gguf3n.convert(folder / "micro", "Q8_0", folder / "x.gguf", threads=1)
    gguf3n.convert(folder / "micro", "Q4_0", folder / "y.gguf", threads=1)
    gguf3n.convert(folder / "seeing", mmproj="F16", output=folder / "mmproj.gguf", threads=1)
    return folder


CONVERT = "gguf3n.convert/1"
COMMANDS: tuple[tuple[str, str], ...] = (
    ("gguf3n.inspect/1", "inspect x.gguf"),
    ("gguf3n.inspect/1", "inspect x.gguf --tokens 0:3 --chat-template"),
    ("gguf3n.inspect/1", "inspect mmproj.gguf"),
    ("gguf3n.inspect/1", "inspect imatrix.gguf"),
    ("gguf3n.lint/1", "lint x.gguf --deep"),
    ("gguf3n.lint/1", "lint x.gguf y.gguf"),
    ("gguf3n.lint/1", "lint x.gguf --mmproj mmproj.gguf"),
    ("gguf3n.lint/1", "lint --checks"),
    ("gguf3n.repair/1", "repair x.gguf --dry-run"),
    ("gguf3n.edit/1", "edit x.gguf --set general.name=other --unset general.type --dry-run"),
    ("gguf3n.diff/1", "diff x.gguf y.gguf --data"),
    ("gguf3n.diff/1", "diff x.gguf mmproj.gguf"),
    ("gguf3n.validate/1", "validate x.gguf --reference micro --stages structure,tensors"),
    ("gguf3n.validate/1", "validate y.gguf --reference micro --stages tensors --imatrix imatrix.gguf"),
    (CONVERT, "convert micro -q Q8_0 -q F16 --dry-run --against Q4_0"),
    (CONVERT, "convert micro -q Q4_0 -o out --manifest --validate --stages tensors --imatrix imatrix.gguf"),
    (CONVERT, "quantize x.gguf -q Q4_0 --allow-requantize -o again.gguf"),
    ("gguf3n.slices/1", "slices"),
    ("gguf3n.slice/1", "slice wide E2B -o sliced"),
    ("gguf3n.tune/1", "tune micro --sensitivity costs.json --like Q4_0 -o mine.toml"),
    ("gguf3n.tune/1", "tune micro --sensitivity costs.json --curve curve.svg"),
    ("gguf3n.stats/1", "stats micro"),
    ("gguf3n.stats/1", "stats y.gguf --against micro"),
    ("gguf3n.stats/1", "stats seeing"),
    ("gguf3n.imatrix/1", "imatrix show imatrix.gguf"),
    ("gguf3n.imatrix/1", "imatrix merge imatrix.gguf imatrix.gguf -o both.gguf"),
    ("gguf3n.correlations/1", "imatrix show correlations.gguf"),
    (CONVERT, "convert micro -q Q4_0 -o refined.gguf --refine correlations.gguf"),
    ("gguf3n.verify/1", "verify out/micro-Q4_0.gguf --source micro"),
    ("gguf3n.verify/1", "verify out/micro-Q4_0.gguf --source other"),
    ("gguf3n.publish-plan/1", f"publish micro {REPO} -q Q8_0,Q4_0 --validate tensors --dry-run"),
    ("gguf3n.publish/1", f"publish micro {REPO} -q Q8_0 --validate tensors --local published"),
    ("gguf3n.jobs-plan/1", "publish jobs.toml --dry-run --executor dask"),
    ("gguf3n.jobs/1", "publish jobs.toml --local many"),
    ("gguf3n.card/1", f"card published --repo {REPO}"),
    ("gguf3n.lint/1", "lint published"),
    ("gguf3n.ollama/1", "ollama published/micro-Q8_0.gguf -o modelfile"),
)
"""Schema, and a command that prints it."""


@pytest.mark.parametrize("name, words", COMMANDS, ids=[words for _, words in COMMANDS])
def test_what_the_commands_print(
    name: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["gguf3n", *words.split(), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    assert ended.value.code in (0, 12), out.err
    assert check(json.loads(out.out)) == name


def test_every_manifest(folder: Path) -> None:
    paths = list(folder.rglob("*.manifest.json"))
    assert paths and {check(json.loads(path.read_text())) for path in paths} == {"gguf3n.manifest/1"}


def test_every_output_is_looked_at() -> None:
    others = {"gguf3n.manifest/1", "gguf3n.hf-jobs/1", "gguf3n.sensitivity/1"}
    assert {name for name, _ in COMMANDS} | others == set(OUTPUTS)


DIVERGENCE = Divergence(8, 0.1, 0.1, 0.2, 0.3, float("inf"), 0.9, 0.8, 3.0, 3.1)
PROBLEM = Problem(Verdict.WARN, "logits", "far")
LIMITS = Limits(0.1, 0.2, 0.9)
STAGES = {
    Stage.LOGITS: LogitsResult((PROBLEM,), 1.0, DIVERGENCE, QType.Q8_0, LIMITS, "a", "b", 8, 1, 99, DIVERGENCE),
    Stage.VISION: VisionResult((), 1.0, DIVERGENCE, 0.9, 0.1, 0.1, 0.2, QType.F16, LIMITS, "a", "b", "t", ("cat",)),
}


def stages() -> Iterator[dict[str, Any]]:
    for stage, result in STAGES.items():
        found = {"path": "x", "reference": "y", "verdict": "warn", "stages": {stage.value: result.as_dict()}}
        yield {"schema": "gguf3n.validate/1", **found}


def test_stages_that_take_engines(capsys: pytest.CaptureFixture[str]) -> None:
    from gguf3n.cli.console import print_json

    for found in stages():
        print_json(found)
        assert check(json.loads(capsys.readouterr().out)) == "gguf3n.validate/1"


def test_an_importance_matrix_that_was_measured() -> None:
    measured = Measurement(
        ("t",), 8, 99, 0, 1, 1, 12.5, frozenset({1}), {"blk.0.attn_q.weight": np.ones(4)}, {"blk.0.attn_q.weight": 8}
    )
    assert check(_measured_json(measured, measured.imatrix, 1.0)) == "gguf3n.imatrix/1"


def test_sensitivities_that_were_measured(folder: Path) -> None:
    found = read_sensitivity(folder / "costs.json")
    result = _sensitivity_json(found, Path("costs.json"), SensitivityMeasurement(found, 8, 8, 12.5), 1.0)
    assert check(result) == "gguf3n.sensitivity/1"


def test_a_schema_refuses_what_is_none() -> None:
    schema = json.loads((FOLDER / "gguf3n.verify.1.json").read_text("utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate({"schema": "gguf3n.verify/1", "path": 3})
