"""What diff says of two files that differ in one thing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.formats.gguf_draft import DraftTensor
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import KeyValue, QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.inspection.diff import Difference, diff
from tests.inspection.faults import drafted, set_array, set_key, values, write


def compare(a: Path, b: Path, *, with_data: bool = False) -> Difference:
    return diff(open_gguf(a), open_gguf(b), with_data=with_data)


def test_a_file_and_itself(sound: Path, copy: Path) -> None:
    difference = compare(sound, copy, with_data=True)
    assert difference.equal and difference.same_content


def test_keys(sound: Path, copy: Path) -> None:
    set_key(copy, "general.name", VT.STRING, "Other")
    set_key(copy, "general.file_type", VT.INT32, 7)
    set_key(copy, "new", VT.UINT8, 1)
    with drafted(copy) as draft:
        draft.unset("general.type")
    changes = {change.name: change for change in compare(sound, copy).keys}
    assert set(changes) == {"general.name", "general.file_type", "new", "general.type"}
    assert changes["general.file_type"].types == ("uint32", "int32")
    assert changes["new"].types == (None, "uint8")
    assert changes["general.type"].values == ("model", None)


def test_the_vocabulary(sound: Path, copy: Path) -> None:
    tokens = values(copy, "tokenizer.ggml.tokens")
    tokens[7], tokens[9] = "seven", "nine"
    set_array(copy, "tokenizer.ggml.tokens", VT.STRING, tokens)
    difference = compare(sound, copy)
    assert [(change.name, change.n_items) for change in difference.keys] == [("tokenizer.ggml.tokens", 2)]
    assert [(token.id, token.after[0]) for token in difference.tokens] == [(7, "seven"), (9, "nine")]


def test_tensors(sound: Path, copy: Path) -> None:
    with drafted(copy) as draft:
        draft.tensors = [tensor for tensor in draft.tensors if tensor.name != "blk.1.attn_q.weight"]
        draft.tensors.append(DraftTensor("extra.weight", (4,), QType.F32))
    changes = {change.name: change for change in compare(sound, copy).tensors}
    assert changes["blk.1.attn_q.weight"].types == ("Q8_0", None)
    assert changes["extra.weight"].shapes == (None, (4,))
    assert len(changes) == 2


def test_values_worst_first(sound: Path, copy: Path) -> None:
    write(copy, "blk.0.attn_norm.weight", np.zeros(256, "<f4").tobytes())
    write(copy, "blk.1.attn_norm.weight", np.float32(0.5).tobytes())
    assert compare(sound, copy).same_content
    changes = compare(sound, copy, with_data=True).tensors
    assert [change.name for change in changes] == ["blk.0.attn_norm.weight", "blk.1.attn_norm.weight"]
    assert changes[0].error == pytest.approx(1)
    assert changes[1].error is not None and 0 < changes[1].error < 0.2


@pytest.mark.parametrize(("quant", "bound"), [("F16", 1e-3), ("Q8_0", 1e-2), ("Q4_K_M", 0.12), ("IQ4_NL", 0.15)])
def test_two_quantizations(tiny_checkpoint: Path, tmp_path: Path, quant: str, bound: float) -> None:
    for name in ("F32", quant):
        gguf3n.convert(tiny_checkpoint, name, tmp_path / f"{name}.gguf")
    difference = compare(tmp_path / "F32.gguf", tmp_path / f"{quant}.gguf", with_data=True)
    assert {change.name for change in difference.keys} == {"general.file_type"}
    errors = {change.name: change.error for change in difference.tensors}
    assert None not in errors.values()
    evaluated = [error or 0 for name, error in errors.items() if not re.match(r"blk\.2\d\.attn_[kv]\.", name)]
    assert 0 < max(evaluated) < bound
    assert all(change.types[0] == "F32" for change in difference.tensors)


def test_order_and_alignment_only(sound: Path, copy: Path) -> None:
    with drafted(copy) as draft:
        draft.packed[1:3] = draft.packed[2:0:-1]
        draft.set(KeyValue("general.alignment", VT.UINT32, 64))
    difference = compare(sound, copy, with_data=True)
    assert difference.same_content and not difference.equal
    assert difference.layout == ("alignment: 32 and 64", "the order of the keys")
    with drafted(copy) as draft:
        draft.tensors = draft.tensors[::-1]
    assert "the order of the tensors" in compare(sound, copy).layout
