"""Publications against a Hub on the loopback interface, with the real client."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import gguf3n
from gguf3n import cli
from gguf3n.errors import HubError, OutputError
from gguf3n.formats import hub_upload
from gguf3n.formats.hub_upload import Repository
from gguf3n.publishing import publish as publishing
from gguf3n.publishing.publish import RESERVE_BYTES, batches
from tests import micro
from tests.formats.hub_server import Refusal
from tests.formats.hub_uploads import UploadHub
from tests.publishing.publishing import NAMES, QUANTS, REPO, publish_and_die

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own

BUSY = Refusal(429, None, "Too many requests")
FORBIDDEN = Refusal(403, None, "You don't have the rights")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return micro.make(tmp_path / "micro")


def publish(*quants: str, **options: Any) -> gguf3n.Publication:
    return gguf3n.publish("micro", REPO, quants or QUANTS, despite_findings=True, threads=1, **options)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_everything_arrives(hub: UploadHub, source: Path, tmp_path: Path) -> None:
    found = publish(validate="tensors", private=True)
    assert found.ok and found.directory == Path("micro-GGUF") and REPO in hub.private
    there = hub.files(REPO)
    for file, name in zip(found.files, NAMES, strict=True):
        assert (file.name, file.sha256, file.state) == (name, sha256(there[name]), "made")
        assert there[name] == (tmp_path / "micro-GGUF" / name).read_bytes()
        assert file.validation is not None and file.validation["verdict"] == "pass"
        assert json.loads(there[name.replace(".gguf", ".manifest.json")])["file"]["sha256"] == file.sha256
    sums = dict(line.split("  ")[::-1] for line in there["SHA256SUMS"].decode().splitlines())
    assert sums == {file.name: file.sha256 for file in found.files}
    assert not any(name.startswith(".") for name in there)
    assert NAMES[0] in there["README.md"].decode() and "Gemma Terms of Use" in there["Notice"].decode()
    assert set(hub.operations) == {"header", "file", "lfsFile"}  # nothing is deleted
    writes = [request for request in hub.requests if request.method == "POST"]
    assert {request.token for request in writes} == {"Bearer hf_a_token_of_the_tests"}


def test_the_same_bytes_as_convert(hub: UploadHub, source: Path, tmp_path: Path) -> None:
    publish("Q4_0", local=True, directory="out")
    gguf3n.convert("micro", "Q4_0", "other.gguf", threads=1)
    assert (tmp_path / "out/micro-Q4_0.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
    assert hub.requests == []
    assert gguf3n.verify("out/micro-Q4_0.gguf", "micro").ok


def test_again_does_nothing(hub: UploadHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(validate="tensors")
    n_puts, n_commits = sum(hub.puts.values()), len(hub.messages)
    for name in ("run", "lint", "run_all"):
        monkeypatch.setattr(publishing, name, None if name != "run_all" else lambda files, *_, **__: iter(()))
    again = publish(validate="tensors")
    assert [file.state for file in again.files] == ["kept"] * 3 and again.sent == ()
    assert all(file.validation is not None for file in again.files)
    assert (sum(hub.puts.values()), len(hub.messages)) == (n_puts, n_commits)


def test_what_people_wrote_on_the_card_stays(hub: UploadHub, source: Path) -> None:
    hub.add(REPO, {"README.md": b"# Mine\n\nWritten by hand.\n", "kept.txt": b"x"})
    publish("Q8_0")
    there = hub.files(REPO)
    assert "Written by hand." in there["README.md"].decode() and f"{NAMES[0]}" in there["README.md"].decode()
    assert there["kept.txt"] == b"x"


def test_one_more_file(hub: UploadHub, source: Path) -> None:
    publish("Q8_0")
    before = hub.files(REPO)[NAMES[0]]
    found = publish("Q8_0", "Q4_0")
    assert [file.state for file in found.files] == ["kept", "made"]
    assert hub.files(REPO)[NAMES[0]] == before and set(hub.puts.values()) == {1}
    assert len(hub.files(REPO)["SHA256SUMS"].splitlines()) == 2


def test_another_source_makes_other_files(hub: UploadHub, source: Path) -> None:
    first = publish("Q8_0")
    micro.make(source, arrays=micro.tensors(micro.config(), seed=1))
    second = publish("Q8_0")
    assert second.files[0].state == "made" and second.files[0].sha256 != first.files[0].sha256
    assert sha256(hub.files(REPO)[NAMES[0]]) == second.files[0].sha256


def test_the_hub_has_lost_it(hub: UploadHub, source: Path) -> None:
    publish("Q8_0")
    del hub.files(REPO)[NAMES[0]]
    assert NAMES[0] in publish("Q8_0").sent and NAMES[0] in hub.files(REPO)


def test_a_pull_request_is_taken_up_again(hub: UploadHub, source: Path, tmp_path: Path) -> None:
    found = publish("Q8_0", create_pr=True)
    assert found.revision == "refs/pr/1" and NAMES[0] not in hub.files(REPO)
    assert publish("Q8_0", "Q4_0", create_pr=True).revision == "refs/pr/1"
    (tmp_path / "micro-GGUF/.gguf3n/ledger.json").unlink()
    assert publish("Q8_0", "Q4_0", create_pr=True, force=True).revision == "refs/pr/1"
    assert hub.pulls == [publishing.TITLE] and set(NAMES[:2]) < set(hub.files(REPO, "refs/pr/1"))


def test_a_branch(hub: UploadHub, source: Path) -> None:
    for _ in range(2):
        publish("Q8_0", revision="next/one")
    assert NAMES[0] in hub.files(REPO, "next/one") and NAMES[0] not in hub.files(REPO)


@pytest.mark.parametrize("route", ["create", "paths-info", "preupload", "batch", "put", "commit"])
def test_too_many_requests(route: str, hub: UploadHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.answers[route] = [(BUSY, "1"), (Refusal(503, None, "busy"), None)]
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    assert publish("Q8_0").ok and NAMES[0] in hub.files(REPO)
    assert max(waits) >= 1
    assert len(hub.messages) == 2  # the files, the card


def test_a_hub_that_stays_busy(hub: UploadHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.answers["commit"] = [(BUSY, "3600")]
    with pytest.raises(HubError, match="too many requests to the Hub"):
        publish("Q8_0")
    monkeypatch.setattr(hub_upload.time, "sleep", lambda seconds: None)
    hub.answers["commit"] = [(BUSY, "1")] * hub_upload.TRIES
    with pytest.raises(HubError, match="too many requests to the Hub"):
        publish("Q8_0")
    assert publish("Q8_0").files[0].state == "kept" and set(hub.puts.values()) == {1}


def test_a_connection_that_breaks_off(hub: UploadHub, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.broken, hub.seconds = 2, 0.01
    assert publish().ok and set(NAMES) < set(hub.files(REPO))


def test_another_checksum(hub: UploadHub, source: Path) -> None:
    hub.swapped[NAMES[0]] = b"GGUF, but another"
    with pytest.raises(HubError, match=f"{NAMES[0]} on the Hub is not the file that was sent") as told:
        publish("Q8_0")
    assert sha256(b"GGUF, but another") in str(told.value.found)
    hub.swapped.clear()
    assert publish("Q8_0").ok and sha256(hub.files(REPO)[NAMES[0]]) == publish("Q8_0").files[0].sha256


@pytest.mark.parametrize(
    "status, words", [(401, "does not accept the token"), (403, "does not let this token write"), (404, "no such")]
)
def test_a_token_that_may_not_write(status: int, words: str, hub: UploadHub, source: Path, tmp_path: Path) -> None:
    hub.answers["create"] = [(Refusal(status, None, "no"), None)]
    with pytest.raises(HubError, match=words):
        publish("Q8_0")
    assert not list(tmp_path.rglob("*.gguf"))  # told before the work


def test_batches_that_fit_the_disk(
    hub: UploadHub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {plan.recipe.name: plan.total_bytes for plan in (gguf3n.plan("micro", quant) for quant in QUANTS)}
    room = sizes["Q8_0"] + 1
    monkeypatch.setattr(publishing, "free_bytes", lambda directory: room)
    notes: list[str] = []
    found = publish(notice=notes.append)
    assert set(NAMES) < set(hub.files(REPO))
    assert [file.name for file in found.files if (tmp_path / "micro-GGUF" / file.name).exists()] == [NAMES[2]]
    assert sum("was removed here to make room" in note for note in notes) == 2
    card, sums = (hub.files(REPO)[name].decode() for name in ("README.md", "SHA256SUMS"))
    assert all(name in card and name in sums for name in NAMES)
    again = publish()
    assert [file.state for file in again.files] == ["on the Hub", "on the Hub", "kept"] and again.sent == ()
    with pytest.raises(OutputError, match="not enough space on the disk for all files"):
        publish(local=True, directory="elsewhere")
    assert not list((tmp_path / "elsewhere").glob("*.gguf"))


def test_how_files_are_put_together() -> None:
    assert batches({"a": 4, "b": 4, "c": 3, "d": 8, "e": 1}, 10) == [["a", "b"], ["c"], ["d", "e"]]
    assert batches({}, 10) == []
    with pytest.raises(OutputError, match="b: not enough space") as told:
        batches({"a": 4, "b": 40}, 10)
    assert f"{40 + RESERVE_BYTES:,}" in str(told.value.expected)


def test_what_is_there_and_not_ours(hub: UploadHub, source: Path, tmp_path: Path) -> None:
    (tmp_path / "micro-GGUF").mkdir()
    for name in (NAMES[0], "micro-Q8_0.manifest.json"):
        (tmp_path / "micro-GGUF" / name).write_text("mine")
        with pytest.raises(OutputError, match=f"{name} exists already"):
            publish("Q8_0")
        assert (tmp_path / "micro-GGUF" / name).read_text() == "mine"
        (tmp_path / "micro-GGUF" / name).unlink()
    publish("Q8_0")
    (tmp_path / "micro-GGUF" / NAMES[0]).write_text("changed")
    with pytest.raises(OutputError, match="was changed since it was made"):
        publish("Q8_0")
    assert publish("Q8_0", force=True).files[0].state == "made"


def test_a_damaged_file_of_ours_is_told(hub: UploadHub, source: Path, tmp_path: Path) -> None:
    publish("Q8_0", local=True, directory="out")
    path = tmp_path / "out" / NAMES[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(OutputError, match="was changed since it was made"):
        publish("Q8_0", local=True, directory="out")


def test_one_run_at_a_time(hub: UploadHub, source: Path, tmp_path: Path) -> None:
    from gguf3n.publishing import ledger

    with ledger.opened(tmp_path / "micro-GGUF"), pytest.raises(OutputError, match="another gguf3n publish is at work"):
        publish("Q8_0")


@pytest.mark.parametrize("text", ["[]", "{", '{"schema": "gguf3n.ledger/2"}', '{"schema": "gguf3n.ledger/1"}'])
def test_a_ledger_that_is_none(text: str, hub: UploadHub, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "micro-GGUF/.gguf3n"
    folder.mkdir(parents=True)
    (folder / "ledger.json").write_text(text)
    with pytest.raises(OutputError, match=r"ledger\.json"):
        publish("Q8_0")


def test_lint_and_validation_stop_it(hub: UploadHub, source: Path) -> None:
    found = gguf3n.publish("micro", REPO, "Q8_0", validate="structure", threads=1)
    assert not found.ok and found.sent == () and hub.messages == []
    assert f"{NAMES[0]}: lint: n_kv_layers is 3" in found.stopped[0]
    assert found.stopped[-1] == f"{NAMES[0]}: validation fails: structure"
    assert not publish("Q8_0", validate="structure").ok  # what validation says is no finding
    assert publish("Q8_0").ok


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["gguf3n", "publish", *words])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command(
    hub: UploadHub, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("micro", REPO, "-q", "Q8_0,Q4_0", "-q", QUANTS[2], "--despite-findings", "--quiet")
    assert command(monkeypatch, *words, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [file["name"] for file in plan["files"]] == list(NAMES) and plan["batches"] == 1
    assert hub.requests == [] and not Path("micro-GGUF").exists()
    assert command(monkeypatch, *words, "--dry-run") == 0
    assert "3 files, " in (said := capsys.readouterr().out) and "from one read of micro" in said
    assert command(monkeypatch, *words, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["schema"], result["ok"], result["repo"]) == ("gguf3n.publish/1", True, REPO)
    assert command(monkeypatch, *words) == 0
    assert f"{REPO}@main: 0 files sent" in capsys.readouterr().out
    manifest = json.loads(hub.files(REPO)["micro-Q8_0.manifest.json"])
    assert manifest["command"] == ["gguf3n", "publish", *words, "--json"]
    assert command(monkeypatch, "micro", REPO, "-q", "Q8_0", "--local", "out", "--quiet") == 12


BAD: dict[str, tuple[str, ...]] = {
    "no quantization named": ("micro", REPO, "--mmproj", "F16"),
    "not the name of a repository": ("micro", "no-org", "-q", "Q8_0"),
    "--create-pr with --revision": ("micro", REPO, "-q", "Q8_0", "--create-pr", "--revision", "x"),
    "--private with --local": ("micro", REPO, "-q", "Q8_0", "--local", "out", "--private"),
    "--local with --output": ("micro", REPO, "-q", "Q8_0", "--local", "out", "-o", "x"),
    "no stage 'x'": ("micro", REPO, "-q", "Q8_0", "--validate", "x"),
    "unknown quantization 'Q9'": ("micro", REPO, "-q", "Q8_0,Q9"),
    "the same quantization twice": ("micro", REPO, "-q", "Q8_0,q8_0"),
    "none: no such directory": ("none", REPO, "-q", "Q8_0"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input(
    words: str, hub: UploadHub, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *BAD[words]) in (2, 3, 8)
    assert words in capsys.readouterr().err
    assert hub.requests == [] and not Path("micro-GGUF").exists()


def test_files_of_a_repository(hub: UploadHub) -> None:
    hub.add("me/there", {"README.md": b"# x\n"})
    there = Repository("me/there")
    assert there.fetch("README.md") == b"# x\n"
    assert there.files(["README.md", "none"])["README.md"].sha256 is None


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills processes")
def test_killed_in_ten_places(hub: UploadHub, source: Path, tmp_path: Path) -> None:
    """Killed at a rename, before or after it, and again at another in the run that goes on, and in requests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gguf3n.publishing.publish", "gguf3n.quants.api"])

    def start(kill_at: int | None) -> Any:
        process = context.Process(target=publish_and_die, args=(str(tmp_path), hub.url(), kill_at))
        process.start()
        return process

    running: list[Any] = []
    for place in (1, 2, 3, 5, "put", "commit", "paths-info", 1, 2, 3):

        def kill(route: str, place: int | str = place) -> None:
            if route == place:
                os.kill(running[-1].pid, signal.SIGKILL)

        hub.before = kill
        running.append(start(place if isinstance(place, int) else None))
        running[-1].join()
        assert running[-1].exitcode == -signal.SIGKILL, (len(running), place)
    hub.before = lambda route: None
    process = start(None)
    process.join()
    assert process.exitcode == 0 and len(running) == 10
    there = hub.files(REPO)
    for quant, name in zip(QUANTS, NAMES, strict=True):
        gguf3n.convert("micro", quant, "whole.gguf", threads=1, force=True)
        assert there[name] == (tmp_path / "whole.gguf").read_bytes(), name
    left = {path.name for path in (tmp_path / "micro-GGUF").iterdir()}
    assert left == {
        ".gguf3n",
        "README.md",
        "Notice",
        "SHA256SUMS",
        *NAMES,
        *(name.replace(".gguf", ".manifest.json") for name in NAMES),
    }
    assert set(there) == left - {".gguf3n"} and set(hub.puts.values()) == {1}
    assert set(hub.operations) == {"header", "file", "lfsFile"}
