"""What a repository can have wrong: each check on a repository that has that fault, and none on a sound one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_reader import LFS_POINTER
from gguf3n.formats.hub import file_hash
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, write_imatrix
from gguf3n.inspection.lint import CHECKS
from gguf3n.publishing.checks import REPOSITORY_CHECKS, RepositoryReport, lint_repository
from gguf3n.publishing.ollama import TEMPLATE
from gguf3n.publishing.terms import NOTICE
from tests.command_line import Run
from tests.formats.hub_server import HubServer
from workshop.places import ROOT

Files = dict[str, bytes]

CARD = """---
license: gemma
base_model: google/gemma-3n-E2B-it
base_model_relation: quantized
library_name: gguf
pipeline_tag: text-generation
---
# m

[the file](m-Q4_K_M.gguf), [others](#m), [Gemma](https://ai.google.dev/gemma), `[code](nowhere)`

    llama-server -hf me/m-GGUF:Q4_K_M
    ollama run hf.co/me/m-GGUF:Q4_K_M
"""

SOUND: Files = {
    "m-Q4_K_M.gguf": b"GGUF",
    "README.md": CARD.encode(),
    "Notice": NOTICE.encode(),
    "template": TEMPLATE.encode(),
    "params": json.dumps({"stop": ["<end_of_turn>"], "num_ctx": 4096, "temperature": 1.0}).encode(),
    "system": b"Be kind.",
}


def card(old: str, new: str) -> Files:
    assert old in CARD
    return {"README.md": CARD.replace(old, new).encode()}


def seeing(*names: str, task: str = "image-text-to-text") -> Files:
    return dict.fromkeys(names, b"GGUF") | card("text-generation", task)


FAULTS: dict[str, tuple[Files, tuple[str, ...], str]] = {
    "lfs-pointer": ({"m-Q4_K_M.gguf": LFS_POINTER + b"\noid sha256:00\nsize 5\n"}, (), "m-Q4_K_M.gguf is a Git LFS"),
    "no-model": (seeing("mmproj-m-F16.gguf"), ("m-Q4_K_M.gguf",), "has no GGUF"),
    "hidden-model": ({"m-imatrix-Q8_0.gguf": b"GGUF"}, (), "'imatrix' in its name"),
    "no-label": ({"m-mine.gguf": b"GGUF"}, (), "m-mine.gguf"),
    "same-label": ({"m-llama.cpp-Q4_K_M.gguf": b"GGUF"}, (), "Q4_K_M is the label of m-Q4_K_M.gguf and of m-llama"),
    "other-file": (
        {"m-F16.gguf": b"GGUF", "m-BF16.gguf": b"GGUF"}, (), ":F16 gives m-BF16.gguf in llama.cpp, not m-F16.gguf",
    ),
    "unreachable": ({"m-Q8_0@llama.cpp.gguf": b"GGUF"}, (), "m-Q8_0@llama.cpp.gguf is not found by :Q8_0"),
    "borrowed-tag": ({"m-UD-Q4_K_XL.gguf": b"GGUF"}, (), ":Q4_K_XL gives m-UD-Q4_K_XL.gguf in llama.cpp"),
    "no-default": ({"m-Q8_0.gguf": b"GGUF"}, ("m-Q4_K_M.gguf",), "without a tag llama.cpp gives m-Q8_0.gguf"),
    "split-model": (
        {"m-F16-00001-of-00002.gguf": b"GGUF", "m-F16-00002-of-00002.gguf": b"GGUF"}, (), "is the first of 2 parts",
    ),
    "missing-part": ({"m-F16-00001-of-00002.gguf": b"GGUF"}, (), "there is no m-F16-00002-of-00002.gguf"),
    "preset-ini": ({"preset.ini": b""}, (), "preset.ini"),
    "mmproj-place": (seeing("vision/mmproj-m-F16.gguf"), (), "m-Q4_K_M.gguf has no mmproj file in its folder"),
    "mmproj-start": (seeing("m-mmproj-F16.gguf"), (), "m-mmproj-F16.gguf"),
    "mmproj-choice": (seeing("mmproj-m-F16.gguf", "mmproj-m-F32.gguf"), (), "mmproj-m-F32.gguf is taken for no model"),
    "no-card": ({}, ("README.md",), "there is no README.md"),
    "front-matter": (card("---\nlicense", "---\n: [\nlicense"), (), "can't be read"),
    "card-license": (card("license: gemma", "license: apache-2.0"), (), "is 'apache-2.0', not gemma"),
    "card-base-model": (card("base_model: google/gemma-3n-E2B-it\n", ""), (), "base_model is missing"),
    "card-relation": (card("quantized", "finetune"), (), "is 'finetune', not quantized"),
    "card-library": (card("library_name: gguf", "library_name: transformers"), (), "'transformers', not gguf"),
    "card-task": (seeing("mmproj-m-F16.gguf", task="text-generation"), (), "not image-text-to-text"),
    "dead-link": (card("(m-Q4_K_M.gguf)", "(./m-Q5_K_M.gguf?download=true)"), (), "m-Q5_K_M.gguf?download=true leads"),
    "dead-tag": (card("-hf me/m-GGUF:Q4_K_M", "-hf me/m-GGUF:Q5_K_M"), (), "me/m-GGUF:Q5_K_M gives no file in"),
    "no-notice": ({"Notice": b"Enjoy."}, (), "Notice does not say"),
    "hub-params": ({"params": b'{"temprature": 1}'}, (), "params: temprature is no parameter"),
    "hub-template": ({"template": b"{{ if .Messages }}x"}, (), "lacks 1 {{ end }}"),
    "hub-system": ({"system": b" \n"}, (), "system is empty"),
    "checksums": ({"SHA256SUMS": b"0" * 64 + b"  m-Q5_0.gguf\n"}, (), "SHA256SUMS: m-Q5_0.gguf is not there"),
}  # fmt: skip
"""Check -> files to add to a sound repository, those to leave out, and what is found."""


def make(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def said(report: RepositoryReport, check: str) -> list[str]:
    return [finding.found for finding in report.findings if finding.check.id == check]


def with_fault(check: str) -> Files:
    added, left_out, _ = FAULTS[check]
    return {name: data for name, data in (SOUND | added).items() if name not in left_out}


def test_a_sound_repository(tmp_path: Path) -> None:
    report = lint_repository(make(tmp_path, SOUND), with_data=True)
    assert report.findings == () and report.n_checks == len(REPOSITORY_CHECKS)


def test_every_check_has_a_fault_and_an_id_of_its_own() -> None:
    ids = [check.id for check in REPOSITORY_CHECKS]
    assert set(FAULTS) == set(ids)
    assert len({*ids, *(check.id for check in CHECKS)}) == len(ids) + len(CHECKS)


@pytest.mark.parametrize("check", FAULTS)
def test_each_fault_is_found(check: str, tmp_path: Path) -> None:
    found = said(lint_repository(make(tmp_path, with_fault(check))), check)
    assert found and FAULTS[check][2] in found[0]


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("params", "{", "is not JSON"),
        ("params", "[1]", "is list, not an object"),
        ("params", '{"stop": [1]}', "has what is no text"),
        ("params", '{"num_ctx": "many"}', 'is "many"'),
        ("params", '{"num_ctx": true}', "is true"),
        ("template", "{% for m in messages %}", "jinja's language"),
        ("template", "{{ end }}", "where nothing is open"),
        ("template", "{{ else }}{{ .Prompt }}", "where nothing is open"),
        ("template", "{{ .Prompt }", "braces without their others"),
        ("template", "}} {{ .Prompt }}", "braces without their others"),
        ("template", "{{ .Prompt }} }}", "braces without their others"),
        ("template", "{{-" + " " * 1_000_000, "braces without their others"),
        ("template", "{{" * 1_000_000, "braces without their others"),
        ("template", "hello", "uses neither"),
        ("SHA256SUMS", "x", "line 1 is no checksum"),
        ("README.md", "# m\n", "has no front matter"),
        ("README.md", "---\n- a\n---\n", "not keys and values"),
        ("README.md", "--- \na: &x [1]\nb: *x\n---\n", "alias"),
        ("README.md", "---\na: " + "[" * 5000 + "\n---\n", "can't be read"),
        ("README.md", "---\na: &x [1]\nb: *x\n---\n", "alias"),
    ],
)
def test_what_small_files_can_have_wrong(name: str, text: str, found: str, tmp_path: Path) -> None:
    report = lint_repository(make(tmp_path, SOUND | {name: text.encode()}))
    assert any(found in finding.found for finding in report.findings)


def test_deep_holds_files_against_their_checksums(tmp_path: Path) -> None:
    make(tmp_path, SOUND)
    (tmp_path / "SHA256SUMS").write_text(f"{file_hash(tmp_path / 'm-Q4_K_M.gguf', is_sha256=True)}  m-Q4_K_M.gguf\n")
    assert lint_repository(tmp_path, with_data=True).findings == ()
    (tmp_path / "m-Q4_K_M.gguf").write_bytes(b"GGUG")
    assert lint_repository(tmp_path).findings == ()
    assert said(lint_repository(tmp_path, with_data=True), "checksums")


def test_importance_matrices_and_encoders_hide_no_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """By what is in the file: one with a model's name in it may be a matrix."""
    make(tmp_path, SOUND)
    model = gguf3n.convert(tiny_checkpoint, "Q8_0", tmp_path / "x.gguf")[0].path
    model.rename(tmp_path / "m-imatrix-Q8_0.gguf")
    entry = Entry(np.ones((1, 4), np.float32), np.ones(1, np.float32))
    matrix = ImportanceMatrix(tmp_path, {"blk.0.attn_q.weight": entry}, (), 1, 1)
    write_imatrix(matrix, tmp_path / "m-Q8_0.imatrix.gguf")
    assert said(lint_repository(tmp_path), "hidden-model") == ["m-imatrix-Q8_0.gguf has 'imatrix' in its name"]


def test_which_file_each_tag_gives(tmp_path: Path) -> None:
    files = dict.fromkeys(("m-Q4_K_M.gguf", "m-F16.gguf", "m-BF16.gguf", "mmproj-m-F16.gguf"), b"GGUF")
    report = lint_repository(make(tmp_path, files))
    assert [(tag.tag, tag.llama_cpp, tag.ollama) for tag in report.tags] == [
        (None, "m-Q4_K_M.gguf", ("m-Q4_K_M.gguf",)),
        ("BF16", "m-BF16.gguf", ("m-BF16.gguf",)),
        ("F16", "m-BF16.gguf", ("m-F16.gguf",)),
        ("Q4_K_M", "m-Q4_K_M.gguf", ("m-Q4_K_M.gguf",)),
    ]
    assert {tag.mmproj for tag in report.tags} == {"mmproj-m-F16.gguf"}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.close()


def in_a_process(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GITHUB_"))}
    command = [sys.executable, "-m", "gguf3n", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=kept | {"PYTHONPATH": str(ROOT)} | env
    )


def test_a_repository_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """Through the real client: the same findings as of the directory, and only small files are fetched."""
    files = with_fault("other-file") | {"m-imatrix-Q8_0.gguf": b"GGUF"}
    hub.add("me/m-GGUF", files | card("(m-Q4_K_M.gguf)", "(https://huggingface.co/me/m-GGUF/blob/main/no.gguf)"))
    env = {"HF_ENDPOINT": hub.url(), "HF_HOME": str(tmp_path)}
    answer = in_a_process("lint", "me/m-GGUF", "--json", cwd=tmp_path, **env)
    assert answer.returncode == 12, answer.stderr
    result = json.loads(answer.stdout)
    assert [found["id"] for found in result["findings"]] == ["hidden-model", "other-file", "dead-link"]
    assert result["path"] == "me/m-GGUF" and len(result["tags"]) == 4
    assert set(hub.fetched()) == {"README.md", "Notice", "template", "params", "system"}
    answer = in_a_process("lint", "me/nothing", "--json", cwd=tmp_path, **env)
    assert answer.returncode == 8 and json.loads(answer.stdout)["error"] == "HubError"


@pytest.fixture
def lint(run: Run) -> Callable[..., tuple[int, str]]:
    """`lint(path, "--json")`: exit code and stdout."""
    return lambda *arguments: run("lint", *arguments)[:2]


def test_the_command_tells_tags_and_findings(lint: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, out = lint(make(tmp_path, with_fault("other-file")))
    assert code == 0 and all(len(line) <= 80 for line in out.splitlines()[1:])
    text = " ".join(out.split())
    assert "no tag m-Q4_K_M.gguf :BF16 m-BF16.gguf :F16 m-BF16.gguf (llama.cpp), m-F16.gguf (Ollama)" in text
    assert "warning other-file" in text and f"{len(REPOSITORY_CHECKS)} checks: 0 errors, 1 warning, 0 notes" in text
    assert lint(tmp_path, "--strict")[0] == 12


def test_several_at_once(lint: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    sound, pointer = make(tmp_path / "sound", SOUND), make(tmp_path / "pointer", with_fault("lfs-pointer"))
    code, out = lint(sound, pointer / "m-Q4_K_M.gguf", sound, "--json")
    result = json.loads(out)
    assert code == 12 and not result["ok"] and [each["ok"] for each in result["reports"]] == [True, False, True]
    (found,) = result["reports"][1]["findings"]
    assert found["id"] == "unreadable" and "Git LFS pointer" in found["found"] and "git lfs pull" in found["found"]
    assert set(json.loads(lint(sound, "--json")[1])) == {
        "schema", "path", "ok", "n_checks", "skipped", "counts", "findings", "tags",
    }  # fmt: skip


def test_no_more_annotations_than_github_shows(lint: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    files = {f"m-{i:02d}-mine.gguf": b"GGUF" for i in range(15)} | {f"m-{i:02d}-Q4_K_M.gguf": b"GGUF" for i in range(2)}
    _, out = lint(make(tmp_path, SOUND | files), tmp_path, "--github")
    lines = out.splitlines()
    warnings = [line for line in lines if line.startswith("::warning ")]
    assert len(warnings) == 10 and "23 more" in warnings[-1] and "title=more" in warnings[-1]
    assert sum(line.startswith("warning ") for line in lines) == 23


def test_the_jobs_summary(
    lint: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "repository", with_fault("same-label"))
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert lint(folder, "--summary", "--github")[0] == 0
    text = summary.read_text("utf-8")
    assert text.startswith("before\n### gguf3n lint") and "| warning | same-label |" in text
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "folder"))
    assert lint(folder, "--summary")[0] == 10
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert lint(folder, "--summary")[0] == 2


def test_a_summary_of_very_much_is_cut(
    lint: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    folder = make(tmp_path / "repository", SOUND | {f"{'m' * 200}-{i}.gguf": b"" for i in range(900)})
    lint(folder, "--summary", "--json")
    text = (tmp_path / "summary.md").read_text("utf-8")
    assert "and 700 more" in text and len(text) < 1_000_000


def test_the_table_of_checks(lint: Callable[..., tuple[int, str]]) -> None:
    assert all(check.id in lint("--checks")[1] for check in REPOSITORY_CHECKS)
    rows = json.loads(lint("--checks", "--json")[1])["repository_checks"]
    assert [(row["id"], row["group"]) for row in rows] == [(check.id, "repository") for check in REPOSITORY_CHECKS]


@pytest.mark.parametrize("arguments", [(), ("a.gguf", "b.gguf", "--mmproj", "c.gguf"), (".", "--mmproj", "c.gguf")])
def test_what_can_not_be_asked(arguments: tuple[str, ...], lint: Callable[..., tuple[int, str]]) -> None:
    assert lint(*arguments)[0] == 2


def test_a_file_that_is_not_there_is_no_repository(lint: Callable[..., tuple[int, str]]) -> None:
    assert lint("no/file.gguf")[0] == 11


def test_a_directory_that_can_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UsageError, match="cannot be listed"):
        lint_repository(tmp_path)


def test_a_directory_of_very_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf3n.publishing.repository.MAX_FILES", len(SOUND) - 1)
    with pytest.raises(UsageError, match="too many files"):
        lint_repository(make(tmp_path, SOUND))


def test_a_link_in_percents(tmp_path: Path) -> None:
    files = SOUND | {"a b.txt": b""} | card("(m-Q4_K_M.gguf)", "(a%20b.txt)")
    assert lint_repository(make(tmp_path, files)).findings == ()


def test_a_card_that_is_no_small_file(tmp_path: Path) -> None:
    make(tmp_path, SOUND)
    with open(tmp_path / "README.md", "ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(UsageError, match="too large"):
        lint_repository(tmp_path)
