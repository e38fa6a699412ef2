"""What nobody has foreseen: one line that names the command and asks for a report, never a bare traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gguf3n import cli

COMMAND = [sys.executable, "-m", "gguf3n"]


def run(error: BaseException, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
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
    assert "Traceback" not in err or "gguf3n" not in err, err
    assert process.returncode in (0, 1, 130, -signal.SIGINT)


def test_few_file_handles(tmp_path: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))

    (tmp_path / "x").mkdir()
    done = subprocess.run(
        [*COMMAND, "inspect", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=dict(os.environ),
    )
    assert done.returncode == 11 and "Traceback" not in done.stderr
