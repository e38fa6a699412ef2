"""The one writer: what stands under a name after success, failure, a kill and a change by somebody else."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.errors import CheckpointError, GGUFError, OutputError
from gguf3n.formats import gguf_draft, gguf_writer, whole_file
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_writer import GGUFWriter, lay_out
from gguf3n.formats.imatrix import Entry
from gguf3n.formats.rows import RowReader
from gguf3n.formats.whole_file import MAX_NAME_BYTES, WholeFile, check_not_input, check_output, write_whole
from tests import micro

POSIX = pytest.mark.skipif(os.name == "nt", reason="rights and locks of POSIX")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_disk_has_file_and_name_before_success_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        kind = "directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"sync {kind}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_whole(tmp_path / "x", "text", force=False)
    assert events == (["sync file", "rename"] if os.name == "nt" else ["sync file", "rename", "sync directory"])


def test_every_writer_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_files = 0
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        nonlocal n_files
        n_files += stat.S_ISREG(os.fstat(descriptor).st_mode)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    source = micro.make(tmp_path / "source")
    gguf3n.convert(source, ["F16", "Q8_0"], tmp_path / "out")
    assert n_files == 2
    gguf3n.edit(
        tmp_path / "out" / "source-F16.gguf",
        [{"op": "set", "key": "x", "type": "string", "value": "y"}],
        output=tmp_path / "edited.gguf",
    )
    assert n_files == 3
    gguf3n.write_imatrix(gguf3n.ImportanceMatrix(Path("x"), {}, chunk_size=512), tmp_path / "imatrix.gguf")
    assert n_files == 4


def test_the_disk_takes_a_long_file_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, write_at = os.fsync, gguf_writer.OffsetFiles.write_at
    monkeypatch.setattr(gguf_writer, "SYNC_BYTES", 1 << 14)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor))[1])
    monkeypatch.setattr(gguf_writer.OffsetFiles, "write_at", lambda *args: (events.append("write"), write_at(*args))[1])
    gguf3n.convert(micro.make(tmp_path / "source"), "F16", tmp_path / "out", threads=1)
    last = len(events) - events[::-1].index("write")
    assert events[:last].count("sync") > 1
    assert "sync" in events[last:]


def test_a_disk_that_fails_while_it_takes_the_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(gguf_writer, "SYNC_BYTES", 1 << 14)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        gguf3n.convert(micro.make(tmp_path / "source"), "F16", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@POSIX
def test_a_replaced_file_keeps_its_rights(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, "old", force=False)
    umask = os.umask(0)
    os.umask(umask)
    assert mode(path) == 0o666 & ~umask
    for rights in (0o600, 0o640, 0o755):
        path.chmod(rights)
        write_whole(path, "new", force=True)
        assert mode(path) == rights


@POSIX
def test_nobody_else_reads_the_new_content_of_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o600)
    with WholeFile(path, force=True) as file:
        file.write(b"secret")
        assert mode(file.temporary) == 0o600


@POSIX
def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(OutputError, match="read-only"):
        write_whole(path, "new", force=True)
    assert path.read_text() == "old"


@POSIX
def test_a_read_only_file_is_not_edited(tmp_path: Path) -> None:
    (done,) = gguf3n.convert(micro.make(tmp_path / "source"), "F16", tmp_path)
    before = done.path.read_bytes()
    done.path.chmod(0o444)
    with pytest.raises(OutputError, match="read-only"):
        gguf3n.edit(done.path, [{"op": "set", "key": "general.name", "type": "string", "value": "source"[::-1]}])
    assert done.path.read_bytes() == before


def test_a_name_of_full_length(tmp_path: Path) -> None:
    for name in ("x" * MAX_NAME_BYTES, "é" * (MAX_NAME_BYTES // 2)):
        write_whole(tmp_path / name, "text", force=False)
        assert (tmp_path / name).read_text() == "text"
    assert len(os.listdir(tmp_path)) == 2


KILLED = """
import sys, time
from pathlib import Path
from gguf3n.formats.whole_file import WholeFile
file = WholeFile(Path(sys.argv[1]))
file.write(b"half")
print("writing", flush=True)
time.sleep(60)
"""


@POSIX
def test_what_a_killed_run_left_is_removed_and_a_running_one_is_let_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.gguf"
    running = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    try:
        assert running.stdout is not None and running.stdout.readline() == b"writing\n"
        (partial,) = (name for name in os.listdir(tmp_path) if name.endswith(".partial"))
        write_whole(path, "mine", force=True)
        assert partial in os.listdir(tmp_path)
    finally:
        running.send_signal(signal.SIGKILL)
        running.communicate()
    with caplog.at_level(logging.WARNING):
        write_whole(path, "mine again", force=True)
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert partial in caplog.text


def test_files_of_other_names_are_not_taken_for_stale_ones(tmp_path: Path) -> None:
    for name in (".y.gguf.0123abcd.partial", ".x.gguf.backup.partial", "x.gguf.0123abcd.partial"):
        (tmp_path / name).write_text("somebody's")
    write_whole(tmp_path / "x.gguf", "mine", force=False)
    assert len(os.listdir(tmp_path)) == 4


def test_a_file_is_held_against_its_own_header(tmp_path: Path) -> None:
    layout = lay_out([], [("a", (2, 32), QType.F32), ("b", (32,), QType.F32)])
    with pytest.raises(GGUFError, match="where its tensors are"), GGUFWriter(tmp_path / "x.gguf", layout) as writer:
        object.__setattr__(writer, "layout", lay_out([], [("a", (2, 32), QType.F32), ("c", (32,), QType.F32)]))
        writer.commit()
    assert not os.listdir(tmp_path)


def test_another_alignment_of_the_source_is_not_taken_over(tmp_path: Path) -> None:
    (done,) = gguf3n.convert(micro.make(tmp_path / "source"), "F16", tmp_path)
    key = {"op": "set", "key": "general.alignment", "type": "uint32", "value": 64}
    gguf3n.edit(done.path, [key], output=tmp_path / "aligned.gguf")
    assert gguf3n.open_gguf(tmp_path / "aligned.gguf").alignment == 64
    (quantized,) = gguf3n.convert(tmp_path / "aligned.gguf", "Q8_0", tmp_path / "q.gguf")
    (expected,) = gguf3n.convert(done.path, "Q8_0", tmp_path / "e.gguf")
    assert quantized.path.read_bytes() == expected.path.read_bytes()


def rewritten(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data)
    later = path.stat().st_mtime_ns + 1_000_000
    os.utime(path, ns=(later, later))


def replaced(path: Path) -> None:
    path.with_name("copy").write_bytes(path.read_bytes())
    os.replace(path.with_name("copy"), path)


@pytest.mark.parametrize("change", [rewritten, replaced, Path.unlink])
@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], kind: str
) -> None:
    source = micro.make(tmp_path / "source")
    weights, error = source / "model.safetensors", CheckpointError
    if kind == "gguf":
        (done,) = gguf3n.convert(source, "BF16", tmp_path)
        source = weights = done.path
        error = GGUFError  # type: ignore[assignment]
    check = RowReader.check_unchanged

    def changed_before(reader: RowReader) -> None:
        change(weights)
        check(reader)

    monkeypatch.setattr(RowReader, "check_unchanged", changed_before)
    with pytest.raises(error, match="changed while it was read"):
        gguf3n.convert(source, "Q8_0", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@POSIX
@pytest.mark.parametrize("value", ["same length", "of another length than before"])
def test_two_edits_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The second finds that the file is another one than it read, and says so."""
    (done,) = gguf3n.convert(micro.make(tmp_path / "source"), "F16", tmp_path)
    name = str(gguf3n.open_gguf(done.path).value("general.name"))
    save = gguf_draft.Draft.save

    def save_after_another(draft: gguf_draft.Draft, output: Path | None = None) -> str:
        monkeypatch.setattr(gguf_draft.Draft, "save", save)
        time.sleep(0.01)
        gguf3n.edit(done.path, [{"op": "set", "key": "general.name", "type": "string", "value": name[::-1]}])
        return save(draft, output)

    monkeypatch.setattr(gguf_draft.Draft, "save", save_after_another)
    with pytest.raises(OutputError, match="changed by another program"):
        gguf3n.edit(done.path, [{"op": "set", "key": "general.description", "type": "string", "value": value}])
    assert gguf3n.open_gguf(done.path).value("general.name") == name[::-1]


@POSIX
def test_a_directory_that_can_not_be_opened_gets_no_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open

    def refuse(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if Path(path) == tmp_path:
            raise PermissionError(13, "Permission denied")
        return really_open(path, flags, mode)

    monkeypatch.setattr(whole_file.os, "open", refuse)
    with pytest.raises(OutputError, match="no permission"):
        write_whole(tmp_path / "x", "text", force=False)
    assert not os.listdir(tmp_path)


@POSIX
def test_a_directory_that_can_not_be_read_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what rights of 0300 are to any but root
    monkeypatch.setattr(whole_file.os, "access", lambda _, mode: not mode & os.R_OK)
    with pytest.raises(OutputError, match="no permission to read"):
        check_output(tmp_path / "x", force=False)


@POSIX
def test_a_link_to_nothing_is_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / "x"
    link.symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already"):
        write_whole(link, "text", force=False)
    assert os.readlink(link) == "nowhere"
    write_whole(link, "text", force=True)
    assert not link.is_symlink() and link.read_text() == "text"


@POSIX
def test_an_output_that_is_read_is_refused_by_any_name(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("text")
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link", tmp_path / "." / "x"):
        with pytest.raises(OutputError, match="is what is read"):
            check_not_input(name, None, "https://example.org/x", "org/name:Q8_0", "a\0b", tmp_path, str(path))
    check_not_input(tmp_path / "y", path, tmp_path / "z")


def test_a_model_is_not_replaced_by_what_is_made_of_it(tmp_path: Path) -> None:
    (done,) = gguf3n.convert(micro.make(tmp_path / "source"), "F16", tmp_path / "f16.gguf")
    matrix = tmp_path / "m.gguf"
    entry = Entry(np.ones((1, 64), np.float32), np.ones(1, np.float32))
    gguf3n.write_imatrix(gguf3n.ImportanceMatrix(matrix, {"blk.0.attn_q.weight": entry}, chunk_size=512), matrix)
    before = {path: path.read_bytes() for path in (done.path, matrix)}
    with pytest.raises(OutputError, match="is what is read"):
        gguf3n.convert(done.path, "Q8_0", done.path, force=True)
    with pytest.raises(OutputError, match="is what is read"):
        gguf3n.convert(done.path, "Q8_0", matrix, imatrix=matrix, force=True)
    assert {path: path.read_bytes() for path in before} == before


@POSIX
def test_a_file_is_edited_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (done,) = gguf3n.convert(micro.make(tmp_path / "source"), "F16", tmp_path)
    gguf3n.edit(done.path, [{"op": "set", "key": "general.name", "type": "string", "value": "source"[::-1]}])
    assert gguf3n.open_gguf(done.path).value("general.name") == "source"[::-1]


def test_a_directory_that_can_not_be_synced_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(whole_file.os, "fsync", refuse)
    write_whole(tmp_path / "x", "text", force=False)
    assert (tmp_path / "x").read_text() == "text"
