"""What nobody has foreseen: one line that names the command and asks for a report, never a bare traceback."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gguf3n
from gguf3n import cli
from gguf3n.cli import application
from gguf3n.errors import OutputError
from tests import micro

COMMAND = [sys.executable, "-m", "gguf3n"]


def run(error: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    def fail() -> None:
        raise error

    monkeypatch.setattr(application, "app", fail)
    monkeypatch.setattr(sys, "argv", ["gguf3n", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize(
    "error, said",
    [
        (KeyError("x"), "please report it"),
        (ZeroDivisionError("division by zero"), "please report it"),
        (RecursionError("deep"), "please report it"),
        (MemoryError(), "out of memory"),
        (OSError(5, "Input/output error"), "the system refused"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "please report it"),
    ],
)
def test_an_unexpected_error(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert run(error, monkeypatch, "inspect", "secret.gguf") == 1
    err = capsys.readouterr().err
    assert err.startswith("error: gguf3n inspect") and said in err and type(error).__name__ in err
    assert "Traceback" not in err and "secret.gguf" not in err


def test_the_same_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(KeyError("x"), monkeypatch, "lint", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == 1 and result["what"].startswith("gguf3n lint")


def test_with_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(cli.DEBUG, "1")
    assert run(KeyError("x"), monkeypatch) == 1
    assert "Traceback" in capsys.readouterr().err


def test_nothing_to_print_with(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(cli, "print_error", fail)
    assert run(KeyError("x"), monkeypatch, "diff") == 1
    assert capsys.readouterr().err.startswith("error: gguf3n diff")


def test_an_interrupt_outside_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(KeyboardInterrupt(), monkeypatch) == 130
    assert "error: interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("milliseconds", [150, 250, 400, 600])
def test_an_interrupt_in_the_first_second(milliseconds: int, tmp_path: Path) -> None:
    """Before Python runs a line of ours there is nothing to be done about a traceback; from then on there is none."""
    process = subprocess.Popen([*COMMAND, "recipes", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(milliseconds / 1000)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err or f"{os.sep}gguf3n{os.sep}" not in err, err
    assert process.returncode in (0, 1, 130, -signal.SIGINT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("words", [["--help"], ["slices"], ["recipes", "list", "--json"]], ids=lambda words: words[0])
def test_a_disk_that_is_full(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode in (1, 10)
    assert (
        done.stderr.count("error: ") == 1 and "No space left" in done.stderr and "Exception ignored" not in done.stderr
    )


@pytest.mark.parametrize("n_handles", [6, 10])
def test_few_file_handles(n_handles: int, tmp_path: Path) -> None:
    """Wherever they run out: while modules are loaded, at a source's weights, at the output."""
    resource = pytest.importorskip("resource")
    micro.make(tmp_path / "source")
    done = subprocess.run(
        [*COMMAND, "convert", "source", "-q", "Q8_0", "-o", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (n_handles, n_handles)),
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )
    assert done.returncode in (1, 5, 10), done.stderr
    assert done.stderr.count("error: ") == 1 and "ulimit -n" in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "source"]


# a directory that may not be looked into


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As an ordinary user meets it; the tests may run as root, who meets none."""
    directory = tmp_path / "locked"
    directory.mkdir()
    really = os.stat

    def look(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if os.path.abspath(os.fspath(path) if not isinstance(path, int) else "").startswith(f"{directory}{os.sep}"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, *args, **options)

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.chdir(tmp_path)
    return directory


@pytest.mark.parametrize("path", ["locked/model", "{}/model", "locked/x.gguf"])
@pytest.mark.parametrize(
    "command",
    [
        ("convert", "PATH", "-q", "Q8_0"),
        ("convert", "source", "-q", "Q8_0", "-o", "PATH"),
        ("stats", "PATH"),
        ("validate", "x.gguf", "--reference", "PATH"),
        ("validate", "x.gguf", "--reference", "source", "--report", "PATH.md"),
        ("lint", "PATH"),
        ("edit", "x.gguf", "--set", "general.name=y", "-o", "PATH"),
    ],
    ids=" ".join,
)
def test_a_directory_that_may_not_be_looked_into(
    path: str,
    command: tuple[str, ...],
    locked: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is not said that there is nothing, and the Hub is not asked for it."""
    micro.make(locked.parent / "source")
    gguf3n.convert(locked.parent / "source", "F16", locked.parent / "x.gguf")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gguf3n", *(word.replace("PATH", path.format(locked)) for word in command)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code in (3, 10, 11), said
    assert said.count("error: ") == 1 and "permission" in said.lower(), said
    assert "no such" not in said and "there is no" not in said


@pytest.mark.parametrize("report", ["x" * 300 + ".md", "directory.md", "nowhere/x.md", "x.gguf/x.md"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    report: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "directory.md").mkdir()
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.import_module("gguf3n.cli.validate"), "check_file", lambda _: pytest.fail("work"))
    command = ("validate", "x.gguf", "--reference", "source", "--report", report)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gguf3n", *command])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == OutputError.exit_code
    assert capsys.readouterr().err.startswith("error: ")
