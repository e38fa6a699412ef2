"""The command line as it is used: a process of its own, its output, its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n import cli
from gguf3n.cli import application
from gguf3n.cli.overview import EXAMPLES
from tests import micro

ROOT = Path(gguf3n.__file__).parents[1]
UNIX = pytest.mark.skipif(os.name != "posix", reason="signals, terminals and pipes of Unix")


@dataclass
class Result:
    """What a command left."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    @property
    def json(self) -> Any:
        """All of stdout as one value."""
        return json.loads(self.stdout)


def environment(home: Path, **more: str) -> dict[str, str]:
    """No network, no colour, no settings of the person who runs the tests."""
    kept = {
        name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "TMPDIR", "NUMBA_CACHE_DIR") if name in os.environ
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "HOME": str(home)}
    return {**kept, **offline, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "PYTHONUTF8": "1", **more}


def gguf3n_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "gguf3n", *map(os.fspath, arguments)]


def run(directory: Path, *arguments: str | Path, **variables: str) -> Result:
    """Run a command in a directory."""
    process = subprocess.run(
        gguf3n_command(*arguments),
        cwd=directory,
        env=environment(directory, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Result(process.returncode, process.stdout.decode("utf-8", "surrogateescape"), process.stderr.decode())


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The same without the start of an interpreter: for the many cases that differ in a message only."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def call(directory: Path, *arguments: str | Path) -> Result:
        monkeypatch.chdir(directory)
        monkeypatch.setattr(sys, "argv", ["gguf3n", *map(os.fspath, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.make(tmp_path_factory.mktemp("cli") / "micro")


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (written,) = gguf3n.convert(source, "Q8_0", tmp_path_factory.mktemp("converted"))
    return written.path


# bad input: one message, the documented exit code, nothing written


def changed(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    """A checkpoint with something wrong."""

    def make(directory: Path) -> Path:
        source = micro.make(directory / "source")
        change(source)
        return source

    return make


def not_finite(directory: Path) -> Path:
    arrays = micro.tensors(micro.config())
    arrays["model.language_model.norm.weight"][3] = 0x7FC0
    return micro.make(directory / "source", arrays=arrays)


def good(directory: Path) -> Path:
    return micro.make(directory / "source")


def wide(directory: Path) -> Path:
    """Rows long enough for types with super-blocks of 256 weights."""
    return micro.make(
        directory / "source", raw=micro.config(hidden_size=256, intermediate_size=[256] * 3, head_dim=128)
    )


def named(name: str) -> Callable[[Path], Path]:
    """A source that is not there."""
    return lambda directory: Path(name)


def existing(directory: Path) -> Path:
    (directory / "out").mkdir()
    (directory / "out" / "source-Q8_0.gguf").write_text("mine")
    return good(directory)


def a_pipe(directory: Path) -> Path:
    os.mkfifo(directory / "source")
    return directory / "source"


def below_a_file(directory: Path) -> Path:
    (directory / "file").write_text("mine")
    return good(directory)


Q8 = ("-q", "Q8_0", "-o", "out")

BAD: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], int, str, tuple[str, ...]]] = {
    # source, options, exit code, class, what the message must say
    "unknown type": (good, ("-q", "Q9_9", "-o", "out"), 2, "UsageError", ("unknown quantization 'Q9_9'", "Q8_0")),
    "unknown type, no source": (named("nowhere"), ("-q", "nope"), 2, "UsageError", ("unknown quantization",)),
    "no type": (good, ("-o", "out"), 2, "UsageError", ("no quantization named", "--quant")),
    "type twice": (good, ("-q", "q8_0", *Q8), 2, "UsageError", ("the same quantization twice",)),
    "one file for two": (
        good,
        ("-q", "Q8_0", "-q", "F16", "-o", "x.gguf"),
        2,
        "UsageError",
        ("one file name for 2 quantizations", "x.gguf"),
    ),
    "type of the per-layer table": (good, (*Q8, "--ple", "Q7"), 2, "UsageError", ("'Q7'", "--ple")),
    "type of the token table": (good, (*Q8, "--token-embd", "Q7"), 2, "UsageError", ("'Q7'", "--token-embd")),
    "revision of a directory": (good, (*Q8, "--revision", "main"), 2, "UsageError", ("--revision", "local path")),
    "no such directory": (named("nowhere"), Q8, 3, "SourceError", ("nowhere: no such directory",)),
    "a pipe": (a_pipe, Q8, 3, "SourceError", ("source: not a directory",)),
    "name too long": (named("x" * 5000), Q8, 3, "SourceError", ("no such directory",)),
    "file for a source": (
        lambda directory: good(directory) / "config.json",
        Q8,
        2,
        "UsageError",
        ("config.json", "gguf3n quantize"),
    ),
    "no checkpoint": (lambda directory: directory, Q8, 3, "SourceError", ("no checkpoint here",)),
    "no config": (changed(lambda d: (d / "config.json").unlink()), Q8, 3, "SourceError", ("config.json: missing",)),
    "another model": (
        changed(lambda d: micro.write_json(d / "config.json", {"model_type": "gemma3"})),
        Q8,
        4,
        "ConfigError",
        ("not a Gemma 3n", "gemma3"),
    ),
    "model card": (
        changed(lambda d: (d / "README.md").write_text("---\na: [\n---\n") and None),
        Q8,
        4,
        "ConfigError",
        ("README.md: the model card can't be read",),
    ),
    "truncated": (
        changed(lambda d: os.truncate(d / "model.safetensors", 100_000)),
        Q8,
        5,
        "CheckpointError",
        ("model.safetensors: truncated", "download the file again"),
    ),
    "foreign tensor": (
        lambda directory: micro.make(
            directory / "source", arrays=micro.tensors(micro.config()) | {"x": np.zeros(1, np.float32)}
        ),
        Q8,
        6,
        "MappingError",
        ("1 tensor(s) that no rule knows", "x"),
    ),
    "no tokenizer": (
        changed(lambda d: [(d / f"tokenizer.{kind}").unlink() for kind in ("model", "json")] and None),
        Q8,
        7,
        "TokenizerError",
        ("no tokenizer", "copy the tokenizer files"),
    ),
    "offline": (named("org/gemma-3n"), Q8, 8, "HubError", ("org/gemma-3n", "HF_HUB_OFFLINE")),
    "long name of a repository": (named("x" * 300 + "/b"), Q8, 8, "HubError", ("x" * 300,)),
    "not finite": (not_finite, Q8, 9, "QuantizationError", ("'model.language_model.norm.weight'", "column 3")),
    "imatrix needed": (
        wide,
        ("-q", "IQ2_XXS", "-o", "out"),
        9,
        "QuantizationError",
        ("importance matrix", "--imatrix"),
    ),
    "output exists": (existing, Q8, 10, "OutputError", ("source-Q8_0.gguf exists already", "--force")),
    "output below a file": (below_a_file, ("-q", "Q8_0", "-o", "file/x.gguf"), 10, "OutputError", ("file",)),
    "output is a file": (below_a_file, ("-q", "Q8_0", "-o", "file"), 10, "OutputError", ("file",)),
    "output name too long": (good, ("-q", "Q8_0", "-o", "x" * 300 + ".gguf"), 10, "OutputError", ("xxx",)),
    "no such imatrix": (good, (*Q8, "--imatrix", "no.dat"), 11, "GGUFError", ("no.dat",)),
}


def check_bad_input(directory: Path, case: str, command: Callable[..., Result]) -> None:
    """Run a case of BAD and compare what it leaves with what it must leave."""
    make, options, code, error, said = BAD[case]
    source = make(directory)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    result = command(directory, "convert", source, *options, "--json")
    assert result.code == code, result.stderr
    assert len(result.errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for text in said:
        assert text in result.stderr
    found = result.json
    assert (found["error"], found["exit_code"]) == (error, code)
    assert result.errors == [f"error: {found['what'].splitlines()[0]}"]
    after = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and "hf" not in path.parts}
    assert after == before


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path: Path, in_process: Callable[..., Result], case: str) -> None:
    check_bad_input(tmp_path, case, in_process)


@pytest.mark.parametrize("case", ["unknown type", "truncated", "offline", "not finite", "output exists"])
def test_bad_input_in_a_process_of_its_own(tmp_path: Path, case: str) -> None:
    check_bad_input(tmp_path, case, run)


def test_an_error_in_full(tmp_path: Path) -> None:
    """Without --json there is nothing on stdout."""
    result = run(tmp_path, "convert", "nowhere", "-q", "Q8_0")
    assert (result.code, result.stdout) == (3, "")
    assert result.stderr.splitlines() == [
        "error: nowhere: no such directory",
        "  expected: a directory with a Hugging Face checkpoint, or a Hub id like google/gemma-3n-E4B-it",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "Usage"),
        (("convert",), "source"),
        (("convert", "x", "--nonsense"), "--nonsense"),
        (("convert", "x", "-q", "Q8_0", "--threads", "0"), "threads"),
        (("convert", "x", "-q", "Q8_0", "--threads", "many"), "threads"),
        (("convert", "x", "y", "-q", "Q8_0"), "y"),
        (("inspect",), "file"),
        (("nonsense",), "nonsense"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, tuple) else "",
)
def test_a_command_line_that_cannot_be_parsed(
    tmp_path: Path, in_process: Callable[..., Result], arguments: tuple[str, ...], said: str
) -> None:
    result = in_process(tmp_path, *arguments)
    assert result.code == 2
    assert said in result.stderr + (result.stdout if not arguments else "")
    assert "Traceback" not in result.stderr
    assert not arguments or not result.stdout
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("option", ["--version", "--help", "-h"])
def test_what_the_program_says_of_itself(tmp_path: Path, option: str) -> None:
    result = run(tmp_path, option)
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout == f"gguf3n {gguf3n.__version__}\n" if option == "--version" else "convert" in result.stdout


def test_help_in_words(tmp_path: Path, in_process: Callable[..., Result]) -> None:
    result = run(tmp_path, "help")
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout == run(tmp_path, "--help").stdout
    assert all(f"\n  {name} " in result.stdout for name in cli.COMMANDS)
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in (("recipes", "list"), ("diff",)):
        assert in_process(tmp_path, "help", *words).stdout == in_process(tmp_path, *words, "--help").stdout
    result = in_process(tmp_path, "help", "nonsense")
    assert result.code == 2 and "No such command 'nonsense'" in result.stderr


def test_examples_of_the_help(tmp_path: Path) -> None:
    """Their commands and options are there."""
    for example in EXAMPLES:
        words = example.split()[1:]
        loaded = application._loaded("convert" if words[0] == "help" else words[0])
        loaded = loaded.commands[words[1]] if hasattr(loaded, "commands") else loaded
        known = {option for parameter in loaded.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known


# converting


def test_converting(source: Path, converted: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "convert", source, "-q", "Q8_0", "-q", "f16", "-o", "new/out")
    assert result.code == 0
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == ["micro-F16.gguf", "micro-Q8_0.gguf"]
    assert (tmp_path / "new/out/micro-Q8_0.gguf").read_bytes() == converted.read_bytes()
    lines = result.stdout.splitlines()
    assert [lines[0], lines[2]] == [os.path.join("new", "out", f"micro-{quant}.gguf") for quant in ("Q8_0", "F16")]
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert any("n_kv_layers is 3, and 20 in llama.cpp" in warning for warning in warnings)
    (progress,) = [line for line in result.stderr.splitlines() if line not in warnings][-1:]
    assert progress.startswith("writing  100%")
    assert not result.errors


def test_progress_lines_where_nobody_watches(tmp_path: Path) -> None:
    """At most one each tenth, whatever the number of reports, and one at the end."""
    code = (
        "from gguf3n.cli.progress import progress_bar\n"
        "from gguf3n.progress import Progress\n"
        "with progress_bar(quiet=False) as update:\n"
        "    for i in range(1001): update(Progress('writing', i << 20, 1000 << 20, 'bytes', i / 100))\n"
        "    update(Progress('writing', 1000 << 20, 1000 << 20, 'bytes', 10.0))\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert process.stdout == ""
    lines = process.stderr.splitlines()
    assert len(lines) == 10
    assert lines[0] == "writing   10%  100.00 MiB of 1000.00 MiB, 100.00 MiB/s  9 s left"
    assert lines[-1] == "writing  100%  1000.00 MiB of 1000.00 MiB, 100.00 MiB/s  10 s"


def test_json_is_all_there_is_on_stdout(source: Path, converted: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "convert", source, "-q", "Q8_0", "-o", "x.gguf", "--json")
    assert result.code == 0
    found = result.json
    assert found["source"] == str(source)
    assert found["seconds"] >= 0
    assert found["notices"] == []
    (output,) = found["outputs"]
    assert output["path"] == "x.gguf"
    assert output["quant"] == "Q8_0"
    assert output["bytes"] == (tmp_path / "x.gguf").stat().st_size == converted.stat().st_size
    assert sum(output["types"].values()) == len(gguf3n.open_gguf(converted).tensors)


def test_quiet_says_nothing_but_the_result(source: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "convert", source, "-q", "Q8_0", "--quiet")
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.startswith("micro-Q8_0.gguf\n")


def test_force_replaces_a_file(source: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("old")
    refused = run(tmp_path, "convert", source, "-q", "Q8_0", "-o", "x.gguf", "--quiet")
    assert refused.code == 10
    assert (tmp_path / "x.gguf").read_text() == "old"
    replaced = run(tmp_path, "convert", source, "-q", "Q8_0", "-o", "x.gguf", "--quiet", "--force")
    assert replaced.code == 0
    assert (tmp_path / "x.gguf").read_bytes() == converted.read_bytes()


@pytest.mark.parametrize("threads", ["1", "3"])
def test_threads_change_nothing(source: Path, converted: Path, tmp_path: Path, threads: str) -> None:
    assert run(tmp_path, "convert", source, "-q", "Q8_0", "-o", "x.gguf", "--threads", threads).code == 0
    assert (tmp_path / "x.gguf").read_bytes() == converted.read_bytes()


def test_the_checkpoint_of_the_current_directory(source: Path, converted: Path, tmp_path: Path) -> None:
    result = run(source, "convert", ".", "-q", "Q8_0", "-o", tmp_path, "--quiet")
    assert result.code == 0
    assert (tmp_path / "micro-Q8_0.gguf").read_bytes() == converted.read_bytes()


@UNIX
def test_a_directory_whose_name_is_no_text(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        micro.make(directory)
    except OSError:
        pytest.skip("a file system of Unicode names")
    for more in ((), ("--json",)):
        result = run(tmp_path, "convert", directory, "-q", "BF16", "--force", *more)
        assert result.code == 0, result.stderr
        assert "Traceback" not in result.stderr
    assert (tmp_path / os.fsdecode(b"caf\xe9-BF16.gguf")).is_file()
    assert os.fsencode(result.json["outputs"][0]["path"]) == b"caf\xe9-BF16.gguf"


# dry runs


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(source: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    result = run(tmp_path / "out", "convert", source, "-q", "Q8_0", "-q", "F32", "--dry-run", "--json", "--quiet")
    assert (result.code, result.stderr) == (0, "")
    assert list((tmp_path / "out").iterdir()) == []
    first, second = result.json["outputs"]
    assert (first["path"], second["path"]) == ("micro-Q8_0.gguf", "micro-F32.gguf")
    assert first["bytes"] == converted.stat().st_size
    file = gguf3n.open_gguf(converted)
    assert [(t["name"], tuple(t["shape"]), t["type"], t["offset"], t["bytes"]) for t in first["tensors"]] == [
        (t.name, t.shape, t.qtype.name, t.offset, t.n_bytes) for t in file.tensors.values()
    ]
    assert all(tensor["reason"] for tensor in first["tensors"])
    assert first["n_weights"] == file.n_weights
    assert first["bits_per_weight"] == pytest.approx(file.bits_per_weight, abs=1e-4)


def test_a_dry_run_as_text(source: Path, converted: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "convert", source, "-q", "Q8_0", "--dry-run")
    assert result.code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "micro-Q8_0.gguf: Q8_0"
    names = [line.split()[0] for line in lines]
    for tensor in gguf3n.open_gguf(converted).tensors.values():
        assert names.count(tensor.name) == 1
    assert f"{converted.stat().st_size:,} bytes" in lines[-1]
    assert list(tmp_path.iterdir()) == []


# inspecting


def test_inspecting_a_converted_file(converted: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "inspect", converted)
    assert (result.code, result.stderr) == (0, "")
    tensors = gguf3n.open_gguf(converted).tensors.values()
    assert str(converted) in result.stdout.splitlines()[0]
    assert f"{len(tensors)} tensors" in result.stdout
    for qtype in {tensor.qtype for tensor in tensors}:
        assert qtype.name in result.stdout


def test_inspecting_as_json(converted: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "inspect", converted, "--json")
    assert (result.code, result.stderr) == (0, "")
    found, file = result.json, gguf3n.open_gguf(converted)
    assert found["file_bytes"] == converted.stat().st_size
    assert list(found["keys"]) == list(file.keys)
    tokens = found["keys"]["tokenizer.ggml.tokens"]
    assert tokens == {"type": "array of string", "value": file.value("tokenizer.ggml.tokens")}
    scales = found["keys"]["gemma3n.activation_sparsity_scale"]["value"]
    assert scales[1:] == ["-inf", "-inf"]
    assert [(t["name"], t["type"], t["bytes"]) for t in found["tensors"]] == [
        (t.name, t.qtype.name, t.n_bytes) for t in file.tensors.values()
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"", "truncated"),
        (b"GGUF" + b"\xff" * 40, "not supported"),
        (b"\x80\x02" + bytes(100), "not a GGUF file"),
    ],
    ids=["missing", "empty", "damaged", "pickle"],
)
def test_inspecting_what_is_no_gguf(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "x.gguf").write_bytes(content)
    result = run(tmp_path, "inspect", "x.gguf", "--json")
    assert result.code == 11
    assert result.json["error"] == "GGUFError"
    assert len(result.errors) == 1
    assert said in result.errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_an_encoding_that_lacks_characters(converted: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    result = run(tmp_path, "inspect", converted, *more, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout.isascii()
    if more:
        assert result.json["keys"]["tokenizer.ggml.tokens"]["value"] == gguf3n.open_gguf(converted).value(
            "tokenizer.ggml.tokens"
        )


@UNIX
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_a_reader_that_goes_away(converted: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    """As in `gguf3n inspect FILE | head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        gguf3n_command("inspect", converted, *more),
        env=environment(tmp_path),
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert process.stderr == ""
    assert process.returncode in (0, 1)


# terminals


@UNIX
@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        (("convert", "SOURCE", "-q", "Q8_0"), "40"),
        (("convert", "SOURCE", "-q", "Q8_0"), "200"),
        (("inspect", "FILE"), "40"),
        (("convert", "nowhere", "-q", "Q8_0"), "40"),
        (("convert", "-h"), "40"),
    ],
    ids=["convert", "convert-wide", "inspect", "error", "help"],
)
def test_a_terminal(source: Path, converted: Path, tmp_path: Path, arguments: tuple[str, ...], columns: str) -> None:
    import pty

    places = {"SOURCE": source, "FILE": converted}
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        gguf3n_command(*(places.get(argument, argument) for argument in arguments)),
        cwd=tmp_path,
        env=environment(tmp_path, COLUMNS=columns, TERM="xterm-256color"),
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    output = b""
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not data:
            break
        output += data
    os.close(leader)
    assert process.wait(60) == (3 if "nowhere" in arguments else 0)
    assert b"Traceback" not in output
    assert output


# signals

SLOW = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
from gguf3n import pipeline
from gguf3n.cli import main

convert = pipeline._Work.convert

def slow(self, *arguments):
    time.sleep(0.2)
    return convert(self, *arguments)

pipeline._Work.convert = slow
main()
"""

AT_ONCE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from gguf3n.gemma3n import source
from gguf3n.cli import main

def stop(*_):
    os.kill(os.getpid(), signal.SIG)

source.load_config = stop
main()
"""


@UNIX
@pytest.mark.parametrize(("name", "threads"), [("SIGINT", "1"), ("SIGTERM", "2")])
def test_a_signal_during_a_conversion(source: Path, tmp_path: Path, name: str, threads: str) -> None:
    """Workers that are slow: the whole would take half a minute."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "convert", source, "-q", "Q8_0", "-q", "F32", "--threads", threads, "-o", "out"],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").glob(".*.partial"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(getattr(signal, name))
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    result = Result(process.returncode, stdout, stderr)
    assert result.code == 130
    assert result.errors == ["error: interrupted; nothing was written"]
    assert "Traceback" not in stderr
    assert list((tmp_path / "out").iterdir()) == []


@UNIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_at_any_other_time(source: Path, tmp_path: Path, name: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", AT_ONCE.replace("SIG)", f"{name})"), "convert", source, "-q", "Q8_0", "--json"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    result = Result(process.returncode, process.stdout, process.stderr)
    assert result.code == 130
    assert result.errors == ["error: interrupted"]
    assert result.json["error"] == "Interrupted"
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
