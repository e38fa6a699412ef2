"""Each fault of lint's table that an adapter can have, whether it fits a model, what inspect says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.gemma3n.lora import ALPHA_KEY, EFFECTS, rule_of_tensor, rule_of_weight
from gguf3n.gemma3n.text import RULES, written_order
from gguf3n.inspection import summary
from gguf3n.inspection.lint import CHECKS, Group, lint
from tests.command_line import Run
from tests.inspection.faults import Plant, change_tensor, drafted, drop_tensors, set_key, unset_key, write
from tests.lora_files import pair, write_lora

UP, DOWN, Q = "blk.1.ffn_up.weight", "blk.1.ffn_down.weight", "blk.0.attn_q.weight"


def add_pair(path: Path, name: str, n_outputs: int = 256, n_inputs: int = 256) -> None:
    """The file again, with one more."""
    gguf = open_gguf(path)
    tensors = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in gguf.tensors.values()}
    path.unlink()
    write_lora(path, tensors | pair(name, n_outputs, n_inputs))


def rename(path: Path, old: str, new: str) -> None:
    with drafted(path) as draft:
        draft.tensors = [replace(each, name=new) if each.name == old else each for each in draft.tensors]


def too_large(path: Path) -> None:
    change_tensor(path, f"{Q}.lora_b", qtype=QType.F16)
    write(path, f"{Q}.lora_b", b"\xff\x7b" * 512)


PLANTS: dict[str, tuple[Plant, set[str]]] = {
    "adapter-kind": (lambda path: set_key(path, "general.type", VT.STRING, "model"), set()),
    "adapter-alpha-type": (lambda path: set_key(path, ALPHA_KEY, VT.UINT32, 4), set()),
    "adapter-alpha": (lambda path: set_key(path, ALPHA_KEY, VT.FLOAT32, 0.0), set()),
    "adapter-empty": (lambda path: drop_tensors(path, *open_gguf(path).tensors), set()),
    "adapter-half": (lambda path: drop_tensors(path, f"{Q}.lora_b"), set()),
    "adapter-name": (lambda path: add_pair(path, "blk.0.attn_qkv.weight"), {"all-zero"}),
    "adapter-rank": (lambda path: change_tensor(path, f"{Q}.lora_a", shape=(1, 256)), set()),
    "adapter-shape": (lambda path: change_tensor(path, f"{UP}.lora_a", shape=(3, 128)), set()),
    "adapter-aborts": (lambda path: add_pair(path, "token_embd.weight"), {"all-zero"}),
    "adapter-ignored": (lambda path: add_pair(path, "blk.3.altup_router.weight", 4), {"all-zero"}),
    "adapter-idle": (lambda path: add_pair(path, "blk.20.attn_v.weight"), {"all-zero"}),
    "bad-value": (lambda path: write(path, f"{Q}.lora_a", b"\x00\x00\x80\x7f"), set()),
    "f16-range": (too_large, set()),
    "all-zero": (lambda path: write(path, f"{Q}.lora_a", bytes(2 * 256 * 4)), set()),
}
"""Check -> its fault, and what else that brings with it."""


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Of the small checkpoint's sizes."""
    pairs = {**pair(Q, 256, 256), **pair(UP, 512, 256, rank=3), **pair(DOWN, 256, 512)}
    return write_lora(tmp_path / "lora.gguf", pairs)


def ids(path: Path, base: Path | None = None) -> set[str]:
    model = None if base is None else open_gguf(base)
    return {finding.check.id for finding in lint(path, with_data=True, base=model).findings}


def test_a_sound_file(lora: Path) -> None:
    report = lint(lora, with_data=True)
    assert report.findings == () and report.skipped is None
    assert report.n_checks == sum(check.group in (Group.LAYOUT, Group.ADAPTER, Group.VALUES) for check in CHECKS)


def test_every_check_has_a_fault() -> None:
    assert set(PLANTS) == {check.id for check in CHECKS if check.group in (Group.ADAPTER, Group.VALUES)}


@pytest.mark.parametrize("check_id", PLANTS)
def test_a_fault_is_named(check_id: str, lora: Path) -> None:
    plant, more = PLANTS[check_id]
    plant(lora)
    assert ids(lora) == {check_id} | more


@pytest.mark.parametrize(
    ("plant", "check_id", "words"),
    [
        (lambda path: unset_key(path, "general.type"), "adapter-kind", "there is no general.type"),
        (lambda path: set_key(path, "adapter.type", VT.STRING, "x"), "adapter-kind", "adapter.type is 'x', not 'lora'"),
        (lambda path: unset_key(path, "general.architecture"), "adapter-kind", "there is no general.architecture"),
        (lambda path: unset_key(path, ALPHA_KEY), "adapter-alpha", f"there is no {ALPHA_KEY}"),
        (lambda path: drop_tensors(path, f"{UP}.lora_a"), "adapter-half", f"there is no {UP}.lora_a"),
        (
            lambda path: rename(path, f"{UP}.lora_b", f"{UP}.lora_c"),
            "adapter-name",
            f"{UP}.lora_c ends with neither .lora_a nor .lora_b",
        ),
        (
            lambda path: change_tensor(path, f"{UP}.lora_b", shape=(1536,)),
            "adapter-shape",
            f"{UP}.lora_b is [1536], and no matrix",
        ),
        (
            lambda path: change_tensor(path, f"{Q}.lora_a", shape=(2, 128)),
            "adapter-shape",
            f"{Q}.lora_a is [2, 128], and the size of the tensor is 256",
        ),
        (
            lambda path: change_tensor(path, f"{Q}.lora_b", shape=(512,)),
            "adapter-rank",
            f"{Q} has an adapter of [2, 256] and [512], whose ranks differ",
        ),
    ],
)
def test_words_of_a_fault(plant: Plant, check_id: str, words: str, lora: Path) -> None:
    plant(lora)
    assert (check_id, words) in [(each.check.id, each.found) for each in lint(lora).findings]


def test_a_norm_is_passed_over(lora: Path) -> None:
    rename(lora, f"{UP}.lora_b", "blk.0.attn_norm.weight")
    assert ids(lora) == {"adapter-half"}


def test_published_sizes(tmp_path: Path) -> None:
    """A width that only the published models have says what all other sizes are; the FFN's may be any."""
    sound = {**pair("blk.0.attn_k.weight", 512, 2048), **pair(UP, 8192, 2048), **pair("blk.9.ffn_up.weight", 9, 2048)}
    assert ids(write_lora(tmp_path / "a.gguf", sound)) == set()
    assert ids(write_lora(tmp_path / "b.gguf", sound | pair("blk.0.attn_v.weight", 2048, 2048))) == {"adapter-shape"}


def test_blocks_that_no_row_holds(lora: Path) -> None:
    """A rank of 2 in Q8_0, whose blocks have 32."""
    raw = lora.read_bytes()
    name = f"{Q}.lora_b".encode()
    at = raw.index(name) + len(name) + 4 + 2 * 8
    assert raw[at : at + 4] == bytes(4)
    lora.write_bytes(raw[:at] + bytes([QType.Q8_0, 0, 0, 0]) + raw[at + 4 :])
    assert ids(lora) == {"unreadable"}


def test_an_adapter_of_another_model(lora: Path, sound: Path) -> None:
    set_key(lora, "general.architecture", VT.STRING, "llama")
    report = lint(lora)
    assert report.findings == ()
    assert report.skipped == "general.architecture says llama, an adapter: only the layout was checked"
    with pytest.raises(UsageError, match="not an adapter of a Gemma 3n"):
        lint(lora, base=open_gguf(sound))


def test_a_base(lora: Path, sound: Path) -> None:
    assert ids(lora, sound) == set()
    add_pair(lora, "blk.30.ffn_up.weight", 512, 256)
    assert ids(lora, sound) - {"all-zero"} == {"fit-tensor"}


def test_a_base_of_other_sizes(sound: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora.gguf", {**pair(UP, 1024, 256), **pair(DOWN, 256, 1024)})
    assert ids(lora) == set()
    report = lint(lora, base=open_gguf(sound))
    assert [finding.found for finding in report.findings] == [
        f"{UP}.lora_b is [1024, 2], for [512, 256] in {sound}",
        f"{DOWN}.lora_a is [2, 1024], for [256, 512] in {sound}",
    ]


@pytest.mark.parametrize("swapped", [False, True])
def test_no_pair(lora: Path, sound: Path, *, swapped: bool) -> None:
    adapter, model = (sound, sound) if swapped else (lora, lora)
    with pytest.raises(UsageError, match="not an adapter" if swapped else "not the text model") as caught:
        lint(adapter, base=open_gguf(model))
    assert caught.value.found == ("gemma3n" if swapped else "gemma3n, an adapter")
    with pytest.raises(UsageError, match="not the text model"):
        lint(lora, beside=open_gguf(sound))


def test_inspect(lora: Path, sound: Path, run: Run) -> None:
    facts = dict(summary.facts(open_gguf(lora)))
    assert facts == {
        "architecture": "gemma3n",
        "adapter": "lora",
        "alpha": "4.0",
        "rank": "2 to 3",
        "attn_q": "1, scale 2",
        "ffn_up": "1, scale 1.33333",
        "ffn_down": "1, scale 2",
    }
    assert summary.adapter_facts(open_gguf(sound)) == []
    add_pair(lora, "of.another.model", 9, 9)
    assert dict(summary.adapter_facts(open_gguf(lora)))["others"] == "1, scale 2"
    drop_tensors(lora, "of.another.model.lora_a", "of.another.model.lora_b")
    for arguments in (["inspect", lora, "--json"], ["lint", lora, "--base", sound, "--json"]):
        found = json.loads(run(*arguments).out)
        assert found.get("ok", True) and found.get("adapter", {"rank": "2 to 3"})["rank"] == "2 to 3"


def test_every_matrix_has_an_effect() -> None:
    assert set(EFFECTS) == {rule.target for rule in RULES if len(rule.shape) > 1}


def test_every_tensor_has_its_rule() -> None:
    for rule, bid in written_order(3):
        assert rule_of_tensor(rule.name(bid)) == (rule, bid)
        for (name,) in rule.sources(bid, 3):
            assert rule_of_weight(name) == (rule, bid)
    for name in ("layers.01.mlp.up_proj.weight", "layers.x.mlp.up_proj.weight", "layers.0.up_proj.weight", "x", ""):
        assert rule_of_weight(name) == rule_of_tensor(name) == (None, None)
    assert rule_of_tensor("blk.00.ffn_up.weight") == (None, None)
