"""What a terminal and a CI log get of a hostile file, argument or error: lines of ours, and nothing that acts."""

from __future__ import annotations

import ast
import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n.cli
from gguf3n.cli import console, paint
from gguf3n.cli.progress import progress_bar
from gguf3n.errors import UsageError
from gguf3n.formats import hub
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.progress import Progress
from tests.command_line import Run

EVIL = "\n::error::evil\x1b[31m\x1b]0;title\x07\u202egnp\r##[error]evil\u2028##vso[task.x]\x9b2J"
CLI = Path(gguf3n.cli.__file__).parent
STRING, ARRAY, U32 = GGUFValueType.STRING, GGUFValueType.ARRAY, GGUFValueType.UINT32


def hostile_file(path: Path, template: str = f"::error::first{EVIL}", name: str = f"::error::t{EVIL}") -> Path:
    keys = [
        KeyValue("general.architecture", STRING, f"gemma3n{EVIL}"),
        KeyValue("general.name", STRING, f"::error::name{EVIL}"),
        KeyValue(f"::error::key{EVIL}", STRING, f"value{EVIL}"),
        KeyValue("tokenizer.ggml.model", STRING, f"llama{EVIL}"),
        KeyValue("tokenizer.ggml.tokens", ARRAY, [f"::error::token{EVIL}", "b"], STRING),
        KeyValue("tokenizer.chat_template", STRING, template),
    ]
    layout = lay_out(keys, [(name, (4, 32), QType.F32), (f"blk.0.attn_q{EVIL}", (32,), QType.F32)])
    path.write_bytes(layout.header + np.full(5 * 32, np.nan, dtype="<f4").tobytes())
    return path


def hostile_folder(path: Path) -> Path:
    """A repository whose files are called as nobody calls them."""
    path.mkdir()
    hostile_file(path / f"::error::x{EVIL}-Q4_K_M.gguf")
    (path / "README.md").write_text(f"---\nlicense: '::error::{EVIL!r}'\n---\n[x](::error::x\x1b[2J)\n", "utf-8")
    (path / "params").write_text(json.dumps({f"::error::x{EVIL}": 1}))
    return path


def harmless(text: str) -> bool:
    """Whether lines only say something."""
    lines = text.split("\n")
    return not any(
        line.lstrip().startswith("::")
        or "##[" in line
        or "##vso[" in line
        or any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in line)
        for line in lines
    )


COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "FILE"),
    "keys": ("inspect", "FILE", "--keys"),
    "tensors": ("inspect", "FILE", "--tensors"),
    "layers": ("inspect", "FILE", "--layers"),
    "tokens": ("inspect", "FILE", "--tokens", "0:1"),
    "lint": ("lint", "FILE"),
    "lint deep": ("lint", "FILE", "--deep"),
    "lint of a directory": ("lint", "FOLDER"),
    "card": ("card", "FOLDER"),
    "card of nothing": ("card", f"::error::x{EVIL}"),
    "card for nobody": ("card", "FOLDER", "--repo", f"::error::x{EVIL}"),
    "ollama": ("ollama", "FILE", "-o", "FOLDER"),
    "ollama's system": ("ollama", "FILE", "--system", f"::error::x{EVIL}"),
    "repair": ("repair", "FILE", "--dry-run"),
    "edit": ("edit", "FILE", "--set", f"general.name=a{EVIL}", "--dry-run"),
    "edit with an unknown key": ("edit", "FILE", "--unset", f"::error::x{EVIL}"),
    "edit with no pair": ("edit", "FILE", "--set", f"::error::x{EVIL}"),
    "diff": ("diff", "FILE", "OTHER"),
    "stats": ("stats", "FILE"),
    "recipe of a file": ("recipes", "extract", "FILE"),
    "unknown recipe": ("recipes", "show", f"::error::x{EVIL}"),
    "no such file": ("inspect", f"::error::x{EVIL}"),
    "no such command": (f"::error::x{EVIL}",),
    "no such option": ("inspect", f"--x{EVIL}"),
    "not a number": ("validate", "FILE", "--reference", "x", "--tokens", f"::error::x{EVIL}"),
    "one argument too many": ("validate", "FILE", f"::error::x{EVIL}", "--reference", "x"),
    "no such checkpoint": ("convert", f"::error::x{EVIL}"),
    "no address": ("inspect", f"http://[{EVIL}"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_nothing_that_a_command_prints_acts(case: str, run: Run, tmp_path: Path) -> None:
    paths = {"FILE": hostile_file(tmp_path / "a.gguf"), "OTHER": hostile_file(tmp_path / "b.gguf", name="::error::u")}
    paths["FOLDER"] = hostile_folder(tmp_path / "folder")
    _, out, err = run(*(paths.get(word, word) for word in COMMANDS[case]))
    assert out or err
    assert harmless(out), out
    assert harmless(err), err


@pytest.mark.parametrize("case", ["inspect", "keys", "lint", "diff", "stats", "tensors", "no such checkpoint"])
def test_a_terminal_gets_no_escapes_but_ours(
    case: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paint, "_in_colour", lambda **_: True)
    paths = {"FILE": hostile_file(tmp_path / "a.gguf"), "OTHER": hostile_file(tmp_path / "b.gguf", name="u")}
    _, *said = run(*(paths.get(word, word) for word in COMMANDS[case]))
    for text in said:
        rest = paint._PAINTED.sub("", text)
        assert harmless(rest), rest


@pytest.mark.parametrize("case", ["inspect", "lint", "diff", "stats", "repair"])
def test_json_is_whole_and_does_not_act(case: str, run: Run, tmp_path: Path) -> None:
    paths = {"FILE": hostile_file(tmp_path / "a.gguf"), "OTHER": hostile_file(tmp_path / "b.gguf", name="u")}
    _, out, _ = run(*(paths.get(word, word) for word in COMMANDS[case]), "--json")
    assert out.isascii() and harmless(out)
    assert isinstance(json.loads(out), dict)
    if case == "inspect":
        assert json.loads(out)["keys"]["general.name"]["value"] == f"::error::name{EVIL}"


def test_annotations_are_one_line_each(run: Run, tmp_path: Path) -> None:
    file = hostile_file(tmp_path / "a,b:c.gguf")
    _, out, _ = run("lint", file, "--github")
    lines = out.splitlines()
    assert lines and all(line.startswith(("::error file=", "::warning file=", "::notice file=")) for line in lines)
    assert all(line.count(" file=") == 1 for line in lines)
    assert not {c for line in lines for c in line if unicodedata.category(c) in ("Cc", "Cf", "Zl")}
    assert all("a%2Cb%3Ac.gguf,title=" in line for line in lines)


def test_a_template_is_exact_for_a_program_and_harmless_for_a_log(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = f"{{% if a %}}\n\tb::c\n{EVIL}\n"
    file = hostile_file(tmp_path / "a.gguf", template)
    monkeypatch.delenv("CI", raising=False)
    assert run("inspect", file, "--chat-template").out == template
    monkeypatch.setenv("CI", "true")
    _, out, _ = run("inspect", file, "--chat-template")
    assert harmless(out) and out.startswith("{% if a %}\n        b::c\n")


def test_lines_of_errors_and_notes_stay(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_error(UsageError(f"a\nb{EVIL}", found="c", fix="d"), as_json=True)
    console.print_note("note", f"e\n::error::f{EVIL} https://u:secret-word@host?token=secret-word", quiet=False)
    out, err = capsys.readouterr()
    assert harmless(err) and harmless(out) and "secret-word" not in err
    lines = err.splitlines()
    assert lines[:2] == ["error: a", "            b"] and "  found:    c" in lines and "  to do:    d" in lines
    assert "note: e" in lines


def test_progress_does_not_act(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(quiet=False) as show:
        assert show is not None
        show(Progress(f"::error::{EVIL}", 1, 2, "tensors", 1.0))
    assert harmless(capsys.readouterr().err)


def test_what_huggingface_hub_logs_does_not_act() -> None:
    record = logging.LogRecord(
        "x", logging.WARNING, "", 0, "%s of %s", (f"::error::{EVIL}", "https://h?sig=abcd"), None
    )
    assert hub._plain_record(record)
    assert harmless(record.getMessage()) and "abcd" not in record.getMessage()


LAST_RESORTS = {CLI / "__init__.py": 1, CLI.parent / "__main__.py": 3}
"""Where nothing that prints can be loaded, or is to be, as for the version; an error's own text is harmless."""


def printers(tree: ast.AST) -> list[int]:
    """Lines that print, or that write to a stream of the process."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write", "console.print"):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(Path(gguf3n.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_only_one_place_prints(path: Path) -> None:
    """Why: what is printed elsewhere is not made harmless. JSON, in console, is ASCII."""
    allowed: dict[Any, int] = {CLI / "paint.py": 4, CLI / "console.py": 1} | LAST_RESORTS
    assert len(printers(ast.parse(path.read_text("utf-8")))) == allowed.get(path, 0)
