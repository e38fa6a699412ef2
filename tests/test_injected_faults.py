"""Every command with a fault at every call of the system: one clear error, and never half a file.

A fault is injected at the n-th call of its kind, for every n up to what a run makes, or some of them where they are
many. The seam is where Python meets the system: files below the run's directory are opened in a form that counts its
calls. After each run every file is either as before or as a run without a fault leaves it, and there is no other.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n import cli
from gguf3n.errors import FindingsError
from gguf3n.formats import offset_files
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, write_imatrix
from tests import micro

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="how the files of a run are told")

SAMPLES = 6
"""Calls of a kind that are made to fail, the first and the last among them."""

FAULTS: dict[str, tuple[Exception, ...]] = {
    "open": (OSError(errno.EMFILE, "Too many open files"), OSError(errno.EACCES, "Permission denied")),
    "read": (OSError(errno.EIO, "Input/output error"),),
    "write": (OSError(errno.ENOSPC, "No space left on device"),),
    "truncate": (OSError(errno.ENOSPC, "No space left on device"),),
    "close": (OSError(errno.EIO, "Input/output error"),),
    "sync": (OSError(errno.EIO, "Input/output error"),),
    "rename": (OSError(errno.EIO, "Input/output error"),),
    "allocate": (MemoryError("Unable to allocate"),),
}
"""What can go wrong, by the kind of call."""

REPORT = "page.md"

COMMANDS: dict[str, tuple[str, ...]] = {
    "convert": ("convert", "source", "-q", "Q8_0", "-q", "F16", "-o", "out", "--force", "--threads", "1"),
    "quantize": ("quantize", "x.gguf", "-q", "Q4_0", "-o", "new.gguf", "--threads", "1"),
    "edit": ("edit", "x.gguf", "--set", "general.name=a longer name than before", "--undo-file", "undo.json"),
    "edit in place": ("edit", "x.gguf", "--set", "general.quantization_version=7"),
    "repair": ("repair", "broken.gguf"),
    "imatrix merge": ("imatrix", "merge", "a.gguf", "b.gguf", "-o", "merged.gguf"),
    "validate": (
        "validate", "x.gguf", "--reference", "source", "--stages", "structure,tensors", "--report", REPORT,
        "--threads", "1",
    ),
    "recipes": ("recipes", "extract", "x.gguf", "-o", "recipe.toml"),
    "ollama": ("ollama", "x.gguf", "-o", "out"),
    "card": ("card", "cards", "--repo", "me/x-GGUF"),
}  # fmt: skip

UNCLEAR = ("fault of gguf3n", "the system refused", "Traceback")
"""What no error says whose cause can be foreseen."""


class Faults:
    """Counts the calls of a run, and makes one of them fail.

    Args:
        root: of the files that are looked at.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.counts: Counter[str] = Counter()
        self.is_on = False
        self.kind, self.number, self.error = "", -1, Exception()
        self._lock = threading.Lock()

    def hit(self, kind: str) -> None:
        if not self.is_on:
            return
        with self._lock:
            number = self.counts[kind]
            self.counts[kind] += 1
        if (kind, number) == (self.kind, self.number):
            raise type(self.error)(*self.error.args)

    def concerns(self, file: Any) -> bool:
        try:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fspath(file))
        except (OSError, TypeError):
            return False
        return str(path).startswith(self.root)


class Counted(FileIO):
    """A file whose calls are counted."""

    faults: Faults

    def __init__(self, file: Any, mode: str = "r", closefd: bool = True, opener: Any = None) -> None:
        self.is_counted = self.faults.concerns(file)
        self.hit("open")
        super().__init__(file, mode, closefd, opener)

    def hit(self, kind: str) -> None:
        if self.is_counted:
            self.faults.hit(kind)

    def read(self, size: int | None = -1, /) -> Any:
        self.hit("read")
        return super().read(-1 if size is None else size)

    def readall(self) -> Any:
        self.hit("read")
        return super().readall()

    def readinto(self, buffer: Any, /) -> Any:
        self.hit("read")
        return super().readinto(buffer)

    def write(self, data: Any, /) -> Any:
        self.hit("write")
        return super().write(data)

    def truncate(self, size: int | None = None, /) -> int:
        self.hit("truncate")
        return super().truncate(size)

    def close(self) -> None:
        """Why only of what is written: closing says that earlier writes have failed."""
        if not self.closed:
            is_written = self.writable()
            super().close()
            if is_written:
                self.hit("close")


def opened(
    file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
    newline: str | None = None, closefd: bool = True, opener: Any = None,
) -> Any:  # fmt: skip
    """As `open`, on a file whose calls are counted."""
    raw = Counted(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if buffering == 0:
        return raw
    buffered: Any = io.BufferedReader(raw) if mode.strip("bt") == "r" else io.BufferedWriter(raw)
    if "+" in mode:
        buffered = io.BufferedRandom(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    """The seam."""
    faults = Faults(tmp_path / "run")
    monkeypatch.setattr(Counted, "faults", faults, raising=False)
    really_open, really_sync, really_replace, really_empty = open, os.fsync, os.replace, np.empty

    def open_(file: Any, *args: Any, **options: Any) -> Any:
        return (opened if faults.concerns(file) else really_open)(file, *args, **options)

    def sync(descriptor: int) -> None:
        faults.hit("sync")
        really_sync(descriptor)

    def replace(source: Any, target: Any) -> None:
        faults.hit("rename")
        really_replace(source, target)

    def empty(*args: Any, **options: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("gguf3n."):
            faults.hit("allocate")
        return really_empty(*args, **options)

    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr(io, "open", open_)
    monkeypatch.setattr(offset_files, "FileIO", Counted)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(np, "empty", empty)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return faults


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each run finds."""
    root = tmp_path_factory.mktemp("before") / "run"
    source = micro.make(root / "source")
    gguf3n.convert(source, "F16", root / "x.gguf")
    gguf3n.validate(root / "x.gguf", source, stages=["tensors"])  # numba compiles nothing while np.empty is replaced
    gguf3n.convert(source, "Q8_0", root / "broken.gguf")
    with open(root / "broken.gguf", "ab") as file:
        file.write(bytes(1 << 16))
    (root / "cards").mkdir()
    shutil.copy(root / "x.gguf", root / "cards" / "x-F16.gguf")
    (root / "cards" / "README.md").write_text("# mine\n")
    (root / "out").mkdir()
    (root / "out" / "source-Q8_0.gguf").write_text("an earlier file")
    rng = np.random.default_rng(0)
    for name in ("a.gguf", "b.gguf"):
        entries = {
            f"blk.{bid}.attn_q.weight": Entry(rng.random((1, 64), np.float32), np.full(1, 512, np.float32))
            for bid in range(3)
        }
        write_imatrix(ImportanceMatrix(root / name, entries, ("text",), 1, 512), root / name)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def run(
    before: Path, faults: Faults, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs a command in a fresh copy of what is there before: its exit code, what it prints on stderr."""
    root = Path(faults.root)

    def run(command: str) -> tuple[int, str]:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        monkeypatch.chdir(root)
        monkeypatch.setattr(sys, "argv", ["gguf3n", *COMMANDS[command]])
        faults.counts.clear()
        faults.is_on = True
        try:
            cli.main()
            code: Any = 0
        except SystemExit as exit:
            code = exit.code or 0
        finally:
            faults.is_on = False
        return int(code), capfd.readouterr().err

    return run


def spread(n: int) -> Iterator[int]:
    """All of few numbers, some of many."""
    yield from sorted({round(i * (n - 1) / max(SAMPLES - 1, 1)) for i in range(SAMPLES)}) if n > SAMPLES else range(n)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault(command: str, before: Path, faults: Faults, run: Callable[[str], tuple[int, str]]) -> None:
    old, root = contents(before), Path(faults.root)
    run(command)  # loads what is loaded once
    usual, said = run(command)
    assert usual in (0, FindingsError.exit_code), said
    new, counts = contents(root), dict(faults.counts)
    assert new != old and {"open", "read", "write", "close", "sync"} <= set(counts)
    wrong: list[str] = []
    for kind, errors in FAULTS.items():
        for number in spread(counts.get(kind, 0)):
            for error in errors:
                faults.kind, faults.number, faults.error = kind, number, error
                code, said = run(command)
                wrong += [
                    f"{kind} {number} of {counts[kind]}, {error}: {what}; exit code {code}: {said}"
                    for what in faulty(code, usual, said, old, new, contents(root))
                ]
    assert not wrong, "\n".join(wrong)


def faulty(
    code: int, usual: int, said: str, old: dict[str, bytes], new: dict[str, bytes], left: dict[str, bytes]
) -> Iterator[str]:
    """What is wrong with the end of a run: its exit code, what it said, the files that it left."""
    for name in sorted({*old, *left}):
        if not any(name in files and is_same(name, files[name], left.get(name)) for files in (old, new)):
            yield f"{name} is neither the old file nor the new"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code != usual and (len(errors) != 1 or any(words in said for words in UNCLEAR)):
        yield "not one clear error"
    if code == usual and any(name not in left or not is_same(name, new[name], left[name]) for name in new):
        yield "the usual end, but not the usual files"


def is_same(name: str, data: bytes, found: bytes | None) -> bool:
    """Byte for byte; of a report, which has the time, to its end."""
    if name != REPORT or found is None:
        return data == found
    return data.splitlines()[-3:] == found.splitlines()[-3:]
