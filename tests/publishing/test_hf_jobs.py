"""Jobs on the Hub's machines: script, estimate, submission, against the loopback Hub with the real client."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from gguf3n import cli
from tests import micro
from tests.formats.hub_server import Refusal
from tests.formats.hub_uploads import UploadHub
from tests.test_schemas import check

FILE = """
[[model]]
source = "org/gemma-3n-micro"
repo = "me/micro-GGUF"
quants = ["Q8_0", "Q4_0"]
mmproj = []
validate = "tensors"
private = true
"""


@pytest.fixture
def file(hub: UploadHub, tmp_path: Path) -> Path:
    source = micro.make(tmp_path / "made")
    hub.add("org/gemma-3n-micro", {path.name: path.read_bytes() for path in source.iterdir()})
    (tmp_path / "jobs.toml").write_text(FILE)
    return tmp_path / "jobs.toml"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["gguf3n", "publish", "jobs.toml", "--executor", "hf-jobs", *words])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_an_estimate_first_and_then_the_job(
    file: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert check(plan) == "gguf3n.hf-jobs/1" and hub.jobs == [] and plan["scripts"] == []
    [job] = plan["jobs"]
    assert (
        job["download_bytes"]
        < hub.n_sent["model.safetensors"] + (file.parent / "made/model.safetensors").stat().st_size
    )
    assert job["upload_bytes"] > 400_000 and job["timeout_seconds"] == 1800
    assert run(monkeypatch) == 0
    out = capsys.readouterr().out
    assert "estimates" in out.partition("job1")[0]
    [sent] = hub.jobs
    assert (sent["namespace"], sent["flavor"], sent["timeoutSeconds"]) == ("me", "cpu-basic", 1800)
    assert sent["secrets"] == {"HF_TOKEN": "hf_a_token_of_the_tests"}
    script = (file.parent / "published/me-micro-GGUF.job.sh").read_text()
    assert sent["command"] == ["/bin/sh", "-c", script] and "hf_a_token" not in script
    words = shlex.split(script.splitlines()[-1])
    assert words[words.index("publish") + 1 :] == [
        "org/gemma-3n-micro", "me/micro-GGUF", "-q", "Q8_0,Q4_0", "--validate", "tensors", "--private",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "before, after, told",
    [
        ('"org/gemma-3n-micro"', '"made"', "a source that is not on the Hub"),
        ("private = true", 'imatrix = "made/config.json"', "imatrix with --executor hf-jobs"),
        ("private = true", '[model.importance]\ntexts = ["t"]\nchunks = 1', "importance with --executor hf-jobs"),
    ],
)
def test_what_such_a_machine_can_not_get_at(
    before: str,
    after: str,
    told: str,
    file: Path,
    hub: UploadHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file.write_text(FILE.replace(before, after))
    assert run(monkeypatch) == 2 and told in capsys.readouterr().err and hub.jobs == []


def test_a_hub_that_does_not_start_it(
    file: Path, hub: UploadHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.answers["jobs"] = [(Refusal(402, None, "no credit"), None)]
    assert run(monkeypatch) == 8 and "me: the Hub does not start the job" in capsys.readouterr().err
    assert run(monkeypatch, "--local", "x") == 2
    monkeypatch.delenv("HF_TOKEN")
    assert run(monkeypatch) == 8 and "no token for the Hub" in capsys.readouterr().err
