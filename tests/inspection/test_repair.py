"""How repair and edit write: what they change, what they leave, what undoes it."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from gguf3n.errors import GGUFError, OutputError, UsageError
from gguf3n.formats import gguf_draft
from gguf3n.formats.gguf_draft import Draft, DraftTensor
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import KeyValue, QType
from gguf3n.formats.gguf_reader import open_gguf, open_part
from gguf3n.formats.gguf_writer import pack_string
from gguf3n.gemma3n.config import MAX_LAYERS
from gguf3n.inspection import edit as edit_module
from gguf3n.inspection.edit import edit
from gguf3n.inspection.lint import lint
from gguf3n.inspection.repair import repair
from gguf3n.inspection.subject import Subject
from tests.inspection.faults import PLANTS, change_tensor, drafted

SHARED_KV = "gemma3n.attention.shared_kv_layers"
TEMPLATE = "tokenizer.chat_template"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_dry_run_writes_nothing(copy: Path) -> None:
    shift_to(copy, SHARED_KV, 0)
    PLANTS["shared-kv-type"](copy)
    before, stat = digest(copy), copy.stat()
    result = repair(copy, dry_run=True)
    assert result.how == "in place"
    assert [fix.check_id for fix in result.fixes] == ["shared-kv-type"]
    assert digest(copy) == before
    assert copy.stat().st_mtime_ns == stat.st_mtime_ns


def test_in_place_changes_a_few_bytes_of_the_same_file(copy: Path) -> None:
    shift_to(copy, SHARED_KV, 0)
    before, inode = copy.read_bytes(), copy.stat().st_ino
    PLANTS["shared-kv-type"](copy)
    assert repair(copy).how == "in place"
    assert copy.stat().st_ino == inode
    assert copy.read_bytes() == before


def test_another_file(copy: Path, tmp_path: Path) -> None:
    PLANTS["shared-kv-type"](copy)
    before = digest(copy)
    assert repair(copy, output=tmp_path / "mended.gguf").how == "copied"
    assert digest(copy) == before
    assert lint(tmp_path / "mended.gguf").findings == ()
    with pytest.raises(OutputError, match="exists"):
        repair(copy, output=tmp_path / "mended.gguf")
    assert repair(str(copy), output=str(tmp_path / "again.gguf")).how == "copied"
    assert edit(str(copy), [OPERATIONS[0]], output=str(tmp_path / "edited.gguf")).how == "copied"
    assert digest(copy) == before


def test_a_fix_is_named_for_the_fault_that_it_mends(copy: Path) -> None:
    for check_id in ("missing-key", "assumed-key"):
        PLANTS[check_id](copy)
    assert {fix.check_id: fix.what.split()[1] for fix in repair(copy, dry_run=True).fixes} == {
        "missing-key": "gemma3n.embedding_length",
        "assumed-key": "gemma3n.rope.freq_base",
    }
    result = repair(copy, only=("assumed-key",))
    assert [fix.check_id for fix in result.fixes] == ["assumed-key"]
    assert {finding.check.id for finding in result.left} == {"missing-key"}


@pytest.mark.parametrize("make", [os.symlink, os.link], ids=["symlink", "hard-link"])
def test_what_has_another_name_is_copied(copy: Path, tmp_path: Path, make: Any) -> None:
    """As in the Hub's cache, where a file's name is its digest."""
    PLANTS["shared-kv-type"](copy)
    before, link = digest(copy), tmp_path / "link.gguf"
    make(copy, link)
    assert repair(link).how == "copied"
    assert digest(copy) == before
    assert not link.is_symlink()
    assert lint(link).findings == ()


def test_several_faults_at_once(copy: Path) -> None:
    planted = ("size-key", "missing-shared-kv", "token-scores", "file-type", "table-rows", "gaps", "duplicate-key")
    for check_id in planted:
        PLANTS[check_id](copy)
    result = repair(copy)
    assert {fix.check_id for fix in result.fixes} >= set(planted) - {"gaps"}  # rows were added, so all is placed anew
    assert result.left == ()


def test_only_what_is_named(copy: Path) -> None:
    for check_id in ("size-key", "file-type"):
        PLANTS[check_id](copy)
    result = repair(copy, only=("file-type",))
    assert {finding.check.id for finding in result.left} == {"size-key"}
    with pytest.raises(UsageError, match="no fix"):
        repair(copy, only=("truncated",))


def test_what_cannot_be_mended_is_left_alone(copy: Path) -> None:
    PLANTS["truncated"](copy)
    before = digest(copy)
    result = repair(copy)
    assert result.how == "unchanged"
    assert {finding.check.id for finding in result.left} == {"truncated"}
    assert digest(copy) == before


# what a file claims, held against what it has


@pytest.mark.parametrize("rows", [4_000_000, 1 << 40])
def test_an_empty_table_makes_no_tokens(copy: Path, rows: int) -> None:
    change_tensor(copy, "per_layer_token_embd.weight", shape=(rows, 0), n_source=0)
    before = digest(copy)
    result = repair(copy)
    assert "table-rows" not in {fix.check_id for fix in result.fixes}
    assert "table-rows" in {finding.check.id for finding in result.left}
    assert digest(copy) == before


def test_a_table_grows_by_what_is_there_at_most(copy: Path) -> None:
    """With a row for each of 3 tokens of 1,088 it is another table, not one that is to be padded."""
    table = open_part(copy).tensors["per_layer_token_embd.weight"]
    change_tensor(copy, table.name, shape=(3, table.shape[1]), n_source=3 * table.n_bytes // table.shape[0])
    assert [fix.check_id for fix in repair(copy).fixes] == []


def test_a_name_makes_no_layers(copy: Path) -> None:
    """One tensor of the last layer that can be makes hundreds with shared keys and values."""
    with drafted(copy) as draft:
        draft.tensors.append(DraftTensor(f"blk.{MAX_LAYERS - 1}.attn_norm.weight", (256,), QType.F32))
    n_tensors = len(open_part(copy).all_tensors)
    result = repair(copy)
    assert "missing-shared-kv" in {finding.check.id for finding in result.left}
    assert len(open_part(copy).all_tensors) == n_tensors


def test_an_array_of_more_than_there_can_be_is_not_converted(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_tokens = len(Subject(open_part(copy)).tokens)
    with drafted(copy) as draft:
        draft.set(KeyValue("tokenizer.ggml.token_type", VT.ARRAY, [1] * n_tokens, VT.INT16))
    assert "mistyped-key" in {fix.check_id for fix in repair(copy, dry_run=True).fixes}
    monkeypatch.setattr(importlib.import_module("gguf3n.inspection.repair"), "MAX_STRINGS", n_tokens - 1)
    assert "mistyped-key" in {finding.check.id for finding in repair(copy, dry_run=True).left}


def test_nothing_is_left_behind_where_the_disk_refuses(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTS["assumed-key"](copy)
    before = digest(copy)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gguf3n.formats.offset_files.OffsetFiles.write_at", fail)
    with pytest.raises(OutputError, match="full"):
        repair(copy)
    assert digest(copy) == before
    assert list(copy.parent.iterdir()) == [copy]


def shift_to(path: Path, name: str, place: int) -> None:
    """Put a filler before a key, so that its value's type stands at a place of its sector."""
    with drafted(path) as draft:
        draft.put("x", struct.pack("<Q1sIQ", 1, b"x", VT.STRING, 0), index=1)
    at = open_part(path).keys[name].offset + 8 + len(name)
    n = (place - at) % 512
    with drafted(path) as draft:
        draft.put("x", struct.pack("<Q1sIQ", 1, b"x", VT.STRING, n) + b"y" * n)
    assert (open_part(path).keys[name].offset + 8 + len(name)) % 512 == place


def test_a_patch_is_within_a_sector(copy: Path) -> None:
    """A change that crosses the end of a sector could be half written, so the file is copied."""
    shift_to(copy, SHARED_KV, 508)
    PLANTS["shared-kv-type"](copy)
    draft = Draft(open_part(copy))
    draft.set(KeyValue(SHARED_KV, VT.UINT32, 2))
    assert draft.patches() is None
    assert repair(copy).how == "copied"


def test_a_text_is_one_patch_and_numbers_are_many(copy: Path) -> None:
    draft = Draft(open_part(copy))
    types = open_part(copy).value("tokenizer.ggml.token_type")
    assert isinstance(types, list)
    types[5], types[900] = 9, 9
    draft.set(KeyValue("tokenizer.ggml.token_type", VT.ARRAY, types, VT.INT32))
    patches = draft.patches()
    assert patches is not None and len(patches) == 2
    draft = Draft(open_part(copy))
    text = str(open_part(copy).value(TEMPLATE))
    draft.set(KeyValue(TEMPLATE, VT.STRING, "#" + text[1:-1] + "#"))
    assert len(text) > 512 and draft.patches() is None


def test_a_big_endian_or_split_file_is_refused(copy: Path, tmp_path: Path) -> None:
    PLANTS["big-endian"](copy)
    with pytest.raises(GGUFError, match="big-endian"):
        repair(copy)


OPERATIONS: list[dict[str, Any]] = [
    {"op": "set", "key": "general.name", "type": "string", "value": "Another"},
    {"op": "set", "key": "general.name", "type": "uint64", "value": 2**63},
    {"op": "set", "key": TEMPLATE, "type": "string", "value": "{{ messages[0].content }}" * 100},
    {"op": "set", "key": "new.flag", "type": "bool", "value": True},
    {"op": "set", "key": "new.floats", "type": "float32[]", "value": [0.1, -2, 1e-40, float("inf")]},
    {"op": "set", "key": "new.words", "type": "string[]", "value": ["ä", "", "\0"]},
    {"op": "set", "key": "new.empty", "type": "string[]", "value": []},
    {"op": "set", "key": SHARED_KV, "type": "float32", "value": 2.0},
    {"op": "set", "key": "general.alignment", "type": "uint32", "value": 64},
    {"op": "unset", "key": "tokenizer.ggml.scores"},
    {"op": "unset", "key": "general.architecture"},
    {"op": "rename", "key": "tokenizer.ggml.tokens", "to": "x"},
    {"op": "rename", "key": "gemma3n.block_count", "to": "gemma3n.attention.a_much_longer_name"},
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: f"{operation['op']} {operation['key']}")
def test_edit_and_undo_give_the_same_bytes(copy: Path, operation: dict[str, Any]) -> None:
    before = copy.read_bytes()
    result = edit(copy, [operation])
    gguf = open_gguf(copy)
    if operation["op"] == "set":
        assert gguf.keys[operation["key"]].type_name in (operation["type"], f"array of {operation['type'][:-2]}")
        value = gguf.value(operation["key"])
        if operation["type"] != "float32[]":
            assert value == operation["value"]
    assert copy.read_bytes() != before
    back = edit(copy, json.loads(json.dumps(result.undo)))
    assert copy.read_bytes() == before
    assert edit(copy, json.loads(json.dumps(back.undo))).how in ("in place", "copied")
    edit(copy, result.undo)
    assert copy.read_bytes() == before


def test_many_edits_and_their_undo(copy: Path) -> None:
    before = copy.read_bytes()
    for seed in range(3):
        chosen = random.Random(seed).sample(OPERATIONS, 6)
        chosen = [o for i, o in enumerate(chosen) if o["key"] not in [p["key"] for p in chosen[:i]]]
        result = edit(copy, chosen)
        edit(copy, result.undo)
        assert copy.read_bytes() == before


def packed_key(name: str) -> str:
    """What an undo has of a key that is 1, in eight bits."""
    return base64.b64encode(pack_string(name) + struct.pack("<IB", VT.UINT8, 1)).decode()


def test_an_undo_that_was_not_needed_is_not_left(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undo, before = tmp_path / "undo.json", copy.read_bytes()

    def fail(*_: object) -> str:
        assert undo.exists()
        raise OutputError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Draft, "_save", fail)
        with pytest.raises(OutputError, match="full"):
            edit(copy, OPERATIONS[:1], undo_file=undo)
    assert not undo.exists() and copy.read_bytes() == before
    result = edit(copy, OPERATIONS[:1], undo_file=undo)
    assert json.loads(undo.read_text()) == list(result.undo)
    with pytest.raises(OutputError, match="exists already"):
        edit(copy, OPERATIONS[:1], undo_file=undo)


def test_an_undo_of_what_was_changed_in_part_is_kept(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo, before = tmp_path / "undo.json", copy.read_bytes()
    name = str(open_part(copy).value("general.name"))
    operation = {"op": "set", "key": "general.name", "type": "string", "value": "#" + name[1:]}

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    time.sleep(0.02)  # file systems count time in steps
    write = edit_module.write_whole

    def write_then_break(path: Path, data: str, *, force: bool) -> None:
        write(path, data, force=force)
        monkeypatch.setattr(os, "fsync", fail)

    monkeypatch.setattr(edit_module, "write_whole", write_then_break)
    with pytest.raises(OutputError, match="Input/output error"):
        edit(copy, [operation], undo_file=undo)
    monkeypatch.undo()
    assert copy.read_bytes() != before
    edit(copy, json.loads(undo.read_text()))
    assert copy.read_bytes() == before


def test_an_undo_in_place_of_the_output_is_refused(copy: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    with pytest.raises(OutputError, match="the output and what undoes it"):
        edit(copy, OPERATIONS[:1], output=output, undo_file=tmp_path / "." / "x.gguf")
    assert not output.exists()


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        ({"op": "set", "key": "a", "type": "uint8", "value": 256}, "not a uint8"),
        ({"op": "set", "key": "a", "type": "uint8", "value": True}, "not a uint8"),
        ({"op": "set", "key": "a", "type": "uint32", "value": "1"}, "not a uint32"),
        ({"op": "set", "key": "a", "type": "float32", "value": 1e39}, "not a float32"),
        ({"op": "set", "key": "a", "type": "bool", "value": 1}, "not a bool"),
        ({"op": "set", "key": "a", "type": "word", "value": 1}, "unknown type"),
        ({"op": "set", "key": "a", "type": "string[]", "value": "b"}, "not a list"),
        ({"op": "set", "key": "a", "type": "int8[]", "value": [1, 1000]}, "not a int8"),
        ({"op": "set", "key": "", "type": "int8", "value": 1}, "without 'key'"),
        ({"op": "unset", "key": "nothing"}, "no key"),
        ({"op": "rename", "key": "general.name", "to": "general.architecture"}, "can't rename"),
        ({"op": "rename", "key": "general.name", "to": ""}, "can't rename"),
        ({"op": "restore", "key": "a", "index": 0, "packed": "!"}, "not base64"),
        ({"op": "restore", "key": "a", "index": 0, "packed": "AAAA"}, "not what an undo has"),
        ({"op": "restore", "key": "a", "index": 0, "packed": packed_key("b")}, "not what an undo has"),
        ({"op": "restore", "key": "a", "index": 10**30, "packed": packed_key("a")}, "not what an undo has"),
        ({"op": "restore", "key": "a", "index": -1, "packed": packed_key("a")}, "not what an undo has"),
        ({"op": "set", "key": "a\udcff", "type": "int8", "value": 1}, "key: not a text"),
        ({"op": "set", "key": "a", "type": "string", "value": "n\udcff"}, "a: not a text"),
        ({"op": "set", "key": "a", "type": "string[]", "value": ["n", "\udcff"]}, "a: not a text"),
        ({"op": "rename", "key": "general.name", "to": "\udcff"}, "to: not a text"),
        ("abc", "not an operation"),
        ({"op": "fly", "key": "a"}, "unknown operation"),
        ({}, "without 'key'"),
    ],
)
def test_an_edit_that_cannot_be(copy: Path, operation: dict[str, Any], message: str) -> None:
    before = digest(copy)
    with pytest.raises((UsageError, GGUFError), match=message):
        edit(copy, [operation])
    assert digest(copy) == before


def test_an_alignment_that_cannot_be(copy: Path) -> None:
    before = digest(copy)
    with pytest.raises(GGUFError, match="power of two"):
        edit(copy, [{"op": "set", "key": "general.alignment", "type": "uint32", "value": 24}])
    assert digest(copy) == before


def test_memory_is_bounded(copy: Path) -> None:
    import tracemalloc

    os.truncate(copy, copy.stat().st_size + (256 << 20))  # sparse, trailing
    tracemalloc.start()
    try:
        edit(copy, [OPERATIONS[2]])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * gguf_draft.COPY_BYTES + (8 << 20)
