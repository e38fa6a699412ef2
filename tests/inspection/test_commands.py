"""The commands as a person or a script sees them: exit codes, JSON, eighty plain columns."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import KeyValue, QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.inspection.lint import CHECKS
from tests.command_line import Run, plain
from tests.inspection.faults import PLANTS, change_tensor, set_key

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments", [(), ("--keys",), ("--tensors",), ("--layers",), ("--tokens", "0:300"), ("--keys", "--layers")]
)
def test_inspect_fits_eighty_columns(run: Run, sound: Path, arguments: tuple[str, ...]) -> None:
    code, out, _ = run("inspect", sound, *arguments)
    assert code == 0 and plain(out) and out


def test_inspect_views(run: Run, sound: Path) -> None:
    _, out, _ = run("inspect", sound)
    assert "gemma3n" in out and "Q8_0" in out and "1,088" in out
    _, out, _ = run("inspect", sound, "--keys", "tokenizer.*_id", "general.file_type")
    assert len(out.splitlines()) == 6
    assert "tokenizer.ggml.bos_token_id" in out and "uint32" in out
    _, out, _ = run("inspect", sound, "--tensors", "blk.3.attn_?.weight")
    assert [line.split()[0] for line in out.splitlines()[1:]] == [f"blk.3.attn_{x}.weight" for x in "qkv"]
    _, out, _ = run("inspect", sound, "--tokens", "2")
    assert "<bos>" in out and "control" in out
    _, out, _ = run("inspect", sound, "--chat-template")
    assert out == open_gguf(sound).value("tokenizer.chat_template")
    assert run("inspect", sound, "glob")[0] == 2
    assert run("inspect", sound, "--tokens", "5:2")[0] == 2
    assert run("inspect", sound.with_name("nothing.gguf"))[0] == 11


def test_inspect_layers_show_a_recipe(run: Run, copy: Path) -> None:
    for bid in (3, 4):
        change_tensor(copy, f"blk.{bid}.ffn_down.weight", qtype=QType.Q6_K, n_source=0)
    _, out, _ = run("inspect", copy, "--layers")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:4] == ["layer", "q", "k", "v"]
    (row,) = [row for row in rows if row[0] == "3-4"]
    assert row[rows[0].index("down")] == "Q6_K" and row[rows[0].index("up")] == "Q8_0"


INSPECT_KEYS = {
    "schema", "path", "parts", "version", "byte_order", "alignment", "file_bytes", "header_bytes", "architecture",
    "encoders", "adapter", "n_weights", "bits_per_weight", "types", "keys", "tensors", "layers", "chat_template",
}  # fmt: skip


def test_inspect_json(run: Run, sound: Path) -> None:
    """The schema that docs/json.md documents."""
    _, out, _ = run("inspect", sound, "--json")
    result = json.loads(out)
    assert set(result) == INSPECT_KEYS
    assert result["schema"] == "gguf3n.inspect/1"
    assert len(result["keys"]["tokenizer.ggml.tokens"]["value"]) == 1088
    assert result["keys"]["gemma3n.activation_sparsity_scale"]["value"][-1] == "-inf"
    assert set(result["tensors"][0]) == {"name", "shape", "type", "part", "offset", "bytes"}
    assert sum(count["bytes"] for count in result["types"].values()) == sum(t["bytes"] for t in result["tensors"])
    _, out, _ = run("inspect", sound, "--json", "--tokens", "2:3", "--keys", "*.file_type")
    result = json.loads(out)
    assert list(result["keys"]) == ["general.file_type"] and "tensors" not in result
    assert [set(token) for token in result["tokens"]] == [{"id", "text", "type", "score"}] * 2


def test_text_of_a_file_cannot_steer_a_terminal(run: Run, copy: Path) -> None:
    set_key(copy, "general.name", VT.STRING, "a\x1b[2Jb\u202ec")
    for arguments in ((), ("--keys",)):
        _, out, _ = run("inspect", copy, *arguments)
        assert "\x1b" not in out and "\u202e" not in out


def full_size(path: Path) -> Path:
    """A file with a vocabulary of 262,144 tokens, scores and types."""
    n = 262_144
    keys = [
        KeyValue("general.architecture", VT.STRING, "gemma3n"),
        KeyValue("tokenizer.ggml.tokens", VT.ARRAY, [f"▁piece{i}" for i in range(n)], VT.STRING),
        KeyValue("tokenizer.ggml.scores", VT.ARRAY, [-float(i) for i in range(n)], VT.FLOAT32),
        KeyValue("tokenizer.ggml.token_type", VT.ARRAY, [1] * n, VT.INT32),
    ]
    tensors = [(f"blk.{i // 24}.t{i % 24}.weight", (32,), QType.F32) for i in range(840)]
    layout = lay_out(keys, tensors)
    path.write_bytes(layout.header + bytes(layout.total_bytes - len(layout.header)))
    return path


@pytest.mark.parametrize("arguments", [(), ("--keys",), ("--layers",)])
def test_inspect_starts_at_once(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """What takes long to import stays out."""
    path = full_size(tmp_path / "x.gguf")
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        "from gguf3n.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(path), *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    loaded = set(done.stderr.split())
    assert "gguf3n.inspection.summary" in loaded
    assert not loaded & {"numba", "torch", "transformers", "huggingface_hub", "matplotlib", "jinja2"}


def test_lint(run: Run, copy: Path) -> None:
    assert run("lint", copy)[0] == 0
    PLANTS["chat-template"](copy)
    code, out, _ = run("lint", copy)
    assert code == 0 and "warning chat-template" in out and plain(out)
    assert run("lint", copy, "--strict")[0] == 12
    PLANTS["missing-tensor"](copy)
    code, out, _ = run("lint", copy, "--deep", "--quiet")
    assert code == 12 and "error missing-tensor" in out and "blk.3.attn_q.weight" in out and plain(out)
    code, out, _ = run("lint", copy, "--json")
    result = json.loads(out)
    assert code == 12 and result["ok"] is False and result["counts"] == {"error": 1, "warning": 1, "note": 0}
    assert set(result["findings"][0]) == {"id", "severity", "meaning", "fix", "where", "what", "found"}
    code, out, _ = run("lint", copy, "--github")
    assert code == 12 and out.startswith("::error file=") and "title=missing-tensor::" in out


def test_lint_prints_its_table(run: Run) -> None:
    code, out, _ = run("lint", "--checks")
    assert code == 0 and plain(out) and all(check.id in out for check in CHECKS)
    _, out, _ = run("lint", "--checks", "--json")
    assert [row["id"] for row in json.loads(out)["checks"]] == [check.id for check in CHECKS]
    assert run("lint")[0] == 2


def test_repair(run: Run, copy: Path) -> None:
    PLANTS["missing-shared-kv"](copy)
    code, out, _ = run("repair", copy, "--dry-run")
    assert code == 0 and "add blk.20.attn_k.weight" in out and "would be copied" in out and plain(out)
    assert run("lint", copy)[0] == 12
    code, out, _ = run("repair", copy)
    assert code == 0 and "copied to a new file" in out and plain(out)
    assert run("lint", copy)[0] == 0
    PLANTS["missing-tensor"](copy)
    code, out, _ = run("repair", copy, "--json")
    result = json.loads(out)
    assert code == 12 and [finding["id"] for finding in result["left"]] == ["missing-tensor"]
    assert result["how"] == "unchanged" and result["fixes"] == []
    assert run("repair", copy, "--fix", "nonsense")[0] == 2


def test_edit(run: Run, copy: Path, tmp_path: Path) -> None:
    before = copy.read_bytes()
    template, undo = tmp_path / "new.jinja", tmp_path / "undo.json"
    template.write_text("{{ bos_token }}häh")
    (tmp_path / "words.json").write_text('["a", "b"]')
    code, out, _ = run(
        "edit", copy, "--chat-template", template, "--set", "general.name=Name = x", "--set", "new.one:uint8=1",
        "--set", "new.two=2.5", "--set-file", f"new.words:string[]={tmp_path / 'words.json'}",
        "--unset", "general.type", "--rename", "general.size_label=general.other", "--undo-file", undo,
    )  # fmt: skip
    assert code == 0 and plain(out)
    gguf = open_gguf(copy)
    assert gguf.value("tokenizer.chat_template") == "{{ bos_token }}häh"
    assert gguf.value("general.name") == "Name = x"
    assert gguf.keys["new.one"].type_name == "uint8" and gguf.keys["new.two"].type_name == "float32"
    assert gguf.value("new.words") == ["a", "b"]
    assert "general.type" not in gguf.keys and "general.other" in gguf.keys
    assert run("edit", copy, "--apply", undo)[0] == 0
    assert copy.read_bytes() == before
    assert run("edit", copy, "--set", "gemma3n.block_count=many")[0] == 2
    assert run("edit", copy)[0] == 2
    code, out, _ = run("edit", copy, "--set", "gemma3n.block_count=30", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["how"] in ("in place", "copied")
    assert copy.read_bytes() == before


def test_diff(run: Run, sound: Path, copy: Path) -> None:
    code, out, _ = run("diff", sound, copy, "--data", "--quiet")
    assert code == 0 and out.startswith("the same")
    set_key(copy, "general.alignment", VT.UINT32, 64)
    code, out, _ = run("diff", sound, copy)
    assert code == 0 and "alignment: 32 and 64" in out and "laid out in another way" in out
    set_key(copy, "general.name", VT.STRING, "Other" * 40)
    PLANTS["all-zero"](copy)
    code, out, _ = run("diff", sound, copy, "--data", "--quiet")
    assert code == 12 and "general.name" in out and "blk.4.ffn_up.weight" in out and plain(out)
    code, out, _ = run("diff", sound, copy, "--json")
    result = json.loads(out)
    assert code == 12 and result["equal"] is False and result["keys"][0]["name"] == "general.name"


def test_lint_of_a_full_vocabulary_is_quick(tmp_path: Path) -> None:
    from gguf3n.inspection.lint import lint

    path = full_size(tmp_path / "x.gguf")
    started = time.process_time()
    lint(path)
    assert time.process_time() - started < 2
