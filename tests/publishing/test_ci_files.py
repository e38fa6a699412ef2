"""action.yml, the hooks, the workflow of the docs and the Dockerfile: their shell is run, what they name exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import compile_quantizers
import gguf3n
from gguf3n.cli.application import app
from gguf3n.quants import QUANTIZERS
from tests import micro
from workshop.places import DOCS, ROOT

ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
WORKFLOW = yaml.safe_load((DOCS / "examples" / "publish.yml").read_text("utf-8"))
HOOKS = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")

SHIM = """#!{python}
import os, pathlib, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "venv"]:
    bin = pathlib.Path(arguments[2], "bin")
    bin.mkdir(parents=True)
    (bin / "python").symlink_to(sys.argv[0])
elif arguments[:3] == ["-m", "pip", "install"]:
    pathlib.Path({record!r}).write_text(arguments[-1])
    command = pathlib.Path(sys.argv[0]).parent / "gguf3n"
    command.write_text("#!/bin/sh\\nexec {python} -m gguf3n \\"$@\\"\\n")
    command.chmod(0o755)
else:
    os.execv({python!r}, [{python!r}, *arguments])
"""
"""A Python for which to install is to note what, and to put a gguf3n beside it that is this one."""


@dataclass
class Runner:
    """Runs a composite action's steps as GitHub's runner does: expressions, conditions, environment, outputs."""

    folder: Path
    inputs: Mapping[str, str]
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    log: str = ""

    def __post_init__(self) -> None:
        self.temp = self.folder / "temp dir"
        self.temp.mkdir()
        self.summary = self.folder / "summary.md"
        self.installed = self.folder / "installed"
        python = self.folder / "python"
        python.write_text(SHIM.format(python=sys.executable, record=str(self.installed)))
        python.chmod(0o755)
        self.outputs["python"] = {"python-path": str(python)}
        given = {name: row["default"] for name, row in ACTION["inputs"].items()}
        assert set(self.inputs) <= set(given)
        self.inputs = given | dict(self.inputs)

    def value(self, expression: str) -> str:
        kind, _, name = expression.partition(".")
        if kind == "inputs":
            return self.inputs[name]
        if kind == "steps":
            step, _, output = name.partition(".outputs.")
            return self.outputs.get(step, {}).get(output, "")
        return {"runner.temp": str(self.temp), "github.action_path": str(ROOT)}[expression]

    def filled(self, text: str) -> str:
        return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda found: self.value(found[1]), text)

    def wanted(self, condition: str) -> bool:
        name, value = re.fullmatch(r"(\S+) != '(.*)'", condition).groups()  # type: ignore[union-attr]
        return self.value(name) != value

    def run(self) -> int:
        """The exit code of the first step that fails, or 0."""
        for step in ACTION["runs"]["steps"]:
            if "run" not in step or not self.wanted(step.get("if", "inputs.source != '\0'")):
                continue
            output = self.folder / f"output-{step['id']}"
            output.touch()
            env = {name: self.filled(value) for name, value in step["env"].items()} | {
                "GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(self.summary), "RUNNER_TEMP": str(self.temp),
                "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(self.folder),
            }  # fmt: skip
            script = self.folder / f"{step['id']}.sh"
            script.write_text(step["run"])
            command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", str(script)]
            done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
            self.log += done.stdout + done.stderr
            if done.returncode:
                return done.returncode
            lines = output.read_text("utf-8").splitlines()
            self.outputs[step["id"]] = dict(line.split("=", 1) for line in lines)
        return 0


def test_the_action_converts_describes_and_checks(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "my model").symlink_to(tiny_checkpoint)
    inputs = {
        "source": "my model",
        "quant": "Q8_0\n Q4_0 ",
        "card": "me/x-GGUF",
        "base-model": "me/x",
        "extras": "plot",
    }
    runner = Runner(tmp_path, inputs | {"directory": "out dir"})
    assert runner.run() == 0, runner.log
    assert runner.installed.read_text() == f"{ROOT}[plot]"
    files = json.loads(runner.outputs["convert"]["files"])
    assert [Path(file).name for file in files] == ["my model-Q8_0.gguf", "my model-Q4_0.gguf"]
    assert all((tmp_path / file).is_file() for file in files)
    assert Path(runner.outputs["convert"]["directory"]) == tmp_path / "out dir"
    assert "me/x-GGUF" in (tmp_path / "out dir" / "README.md").read_text("utf-8")
    summary = runner.summary.read_text("utf-8")
    assert all(f"`out dir/{Path(file).name}`" in summary for file in files) and "| `out dir` | 0 |" in summary
    assert runner.log.count("::group::") == runner.log.count("::endgroup::") == 3
    outputs = {name: row["value"] for name, row in ACTION["outputs"].items()}
    assert all(runner.filled(value) for value in outputs.values())


def test_the_action_only_checks(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (made,) = gguf3n.convert(tiny_checkpoint, "Q8_0", tmp_path / "a b.gguf")
    inputs = {"lint": f"{made.path.name}\n\n", "extras": ""}
    runner = Runner(tmp_path, inputs)
    assert runner.run() == 0, runner.log
    assert runner.installed.read_text() == str(ROOT)
    assert runner.outputs["convert"]["files"] == "[]" and "card" not in runner.outputs
    made.path.write_bytes(made.path.read_bytes()[:5000])
    broken = tmp_path / "again"
    broken.mkdir()
    made.path.rename(broken / made.path.name)
    runner = Runner(broken, inputs)
    assert runner.run() == 12
    assert "::error file=a b.gguf," in runner.log


def test_what_is_put_into_the_action_is_never_run(tmp_path: Path) -> None:
    micro.make(tmp_path / "source")
    evil = "$(touch evil) `touch evil` ; touch evil #"
    runner = Runner(tmp_path, {"source": "source", "quant": evil, "directory": evil, "lint": evil, "card": evil})
    assert runner.run() != 0
    assert not list(tmp_path.rglob("evil"))
    assert not any("${{" in step.get("run", "") for step in ACTION["runs"]["steps"])


def test_the_actions_form() -> None:
    assert ACTION["runs"]["using"] == "composite"
    ids = [step["id"] for step in ACTION["runs"]["steps"]]
    assert len(set(ids)) == len(ids)
    text = (ROOT / "action.yml").read_text("utf-8")
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(ACTION["inputs"])
    assert set(re.findall(r"steps\.(\w+)\.", text)) <= set(ids)
    for row in (*ACTION["inputs"].values(), *ACTION["outputs"].values()):
        assert row["description"]
    for row in ACTION["inputs"].values():
        assert isinstance(row["default"], str)
    for step in ACTION["runs"]["steps"]:
        assert ("uses" in step) != ("run" in step and step["shell"] == "bash")


def test_the_workflow_uses_what_the_action_has() -> None:
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    ours = [step for step in steps if step.get("uses", "").startswith("OWNER/gguf3n@")]
    assert [step["uses"] for step in ours] == [f"OWNER/gguf3n@v{gguf3n.__version__}"] * 2
    for step in ours:
        assert set(step["with"]) <= set(ACTION["inputs"])
    assert "steps.gguf3n.outputs.directory" in json.dumps(WORKFLOW) and "directory" in ACTION["outputs"]
    publish = WORKFLOW["jobs"]["publish"]
    assert publish["needs"] == "convert" and publish["permissions"]["id-token"] == "write"
    assert WORKFLOW["permissions"] == {} and all("timeout-minutes" in job for job in WORKFLOW["jobs"].values())
    for step in steps:
        assert "${{" not in step.get("run", "")
        check = subprocess.run(["bash", "-n"], input=step.get("run", ""), text=True, check=False)
        assert check.returncode == 0


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_hooks(hook: dict[str, Any]) -> None:
    assert {"id", "name", "entry", "language", "files", "description"} <= set(hook)
    program, name, *words = [*shlex.split(hook["entry"]), *hook.get("args", [])]
    assert program == "gguf3n" and hook["language"] == "python" and hook["require_serial"] is True
    matched = [
        path for path in ("a.gguf", "b/c.gguf", "README.md", "a.gguf.txt", "params") if re.search(hook["files"], path)
    ]
    assert "b/c.gguf" in matched and "a.gguf.txt" not in matched
    command: Any = get_command(app)
    context = command.make_context("gguf3n", [name, *words, *(() if hook.get("pass_filenames") is False else matched)])
    rest = [*context._protected_args, *context.args]
    name, command, rest = command.resolve_command(context, rest)
    assert command.make_context(name, rest, parent=context).params["files"]


def test_the_image() -> None:
    """It is built only where docker runs; here what it names is there, and nobody in it is root."""
    stages = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert len(stages) == 2 and all(image.endswith("-slim") for image in stages)
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)", DOCKERFILE, re.M):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists() and f"!{source}" in ignored, source
    last = DOCKERFILE.split("\nFROM ")[-1]
    assert last.index("USER gguf3n") < last.index("compile_quantizers.py\nWORKDIR") < last.index("ENTRYPOINT")
    assert f"ARG VERSION={gguf3n.__version__}\n" in last
    labels = re.findall(r"org\.opencontainers\.image\.(\w+)=", last)
    assert set(labels) == {"title", "description", "licenses", "version", "revision"}


def test_every_quantizer_is_compiled_for_the_image(capsys: pytest.CaptureFixture[str]) -> None:
    compile_quantizers.main()
    assert capsys.readouterr().out == f"{len(QUANTIZERS)} quantizers compiled\n"
