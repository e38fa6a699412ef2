"""Files of sensitivities: written and read, added, and what is no such file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gguf3n.errors import SourceError, UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.sensitivity import (
    Sensitivity,
    Sums,
    TensorSums,
    Text,
    as_json,
    merge_sensitivities,
    read_sensitivity,
    write_sensitivity,
)

TENSORS = {
    "token_embd.weight": TensorSums((8, 32), {QType.Q8_0: Sums(1.0, 2.0, 3.0, 4.0)}),
    "blk.0.attn_q.weight": TensorSums((4, 32), {QType.Q8_0: Sums(0.5, 0.25, 0.125), QType.Q4_0: Sums(5, 6, 7)}),
}
ONE = Sensitivity(
    path=Path("measured"),
    model="gemma",
    fingerprint="f00",
    imatrix=Text("imatrix.gguf", "ab" * 32),
    ctx=256,
    seed=3,
    texts=(Text("a.txt", "cd" * 32),),
    spans=((0, 4),),
    engines=("transformers",),
    tensors=TENSORS,
)


def test_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    for sensitivity in (ONE, replace(ONE, imatrix=None, spans=((0, 4), (9, 2)))):
        write_sensitivity(sensitivity, path, force=True)
        assert read_sensitivity(path) == replace(sensitivity, path=path)
    assert ONE.types == (QType.Q8_0, QType.Q4_0) and ONE.n_chunks == 4


def test_sums_add_up() -> None:
    """In any order; spans that follow each other become one."""
    parts = [replace(ONE, spans=((4 * number, 4),), engines=(f"engine {number}",)) for number in range(3)]
    merged = merge_sensitivities([parts[2], parts[0], parts[1]])
    assert merged.spans == ((0, 12),) and merged.n_chunks == 12
    assert merged.engines == ("engine 2", "engine 0", "engine 1")
    assert merged.tensors["token_embd.weight"].types[QType.Q8_0] == Sums(3.0, 6.0, 9.0, 12.0)
    assert merged.tensors["blk.0.attn_q.weight"].types[QType.Q4_0] == Sums(15, 18, 21)
    apart = merge_sensitivities([parts[0], parts[2]])
    assert apart.spans == ((0, 4), (8, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": "bad"}, "of another model"),
        ({"imatrix": None}, "with another importance matrix"),
        ({"imatrix": Text("imatrix.gguf", "ef" * 32)}, "with another importance matrix"),
        ({"texts": (Text("a.txt", "ef" * 32),)}, "of another text"),
        ({"ctx": 512}, "with another --ctx"),
        ({"seed": 4}, "with another --seed"),
        ({"tensors": {"token_embd.weight": TENSORS["token_embd.weight"]}}, "in other types"),
        ({"spans": ((3, 9),)}, "chunks that are in another file too"),
        ({"spans": ((0, 1),)}, "chunks that are in another file too"),
    ],
)
def test_what_does_not_add_up(change: dict[str, Any], message: str) -> None:
    other = replace(ONE, **({"spans": ((4, 4),)} | change))
    with pytest.raises(UsageError, match=message):
        merge_sensitivities([ONE, other])


def test_nothing_to_merge() -> None:
    with pytest.raises(UsageError, match="no sensitivities"):
        merge_sensitivities([])


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


def given(new: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = new

    return change


SUMS = ("tensors", "token_embd.weight", "types", "Q8_0")


@pytest.mark.parametrize(
    "change",
    [
        without("model"), without("model", "fingerprint"), without("ctx"), without("tensors"), without("spans"),
        without("texts"), without(*SUMS, "fisher"), given([], "tensors"), given({}, "tensors"), given([], "spans"),
        given([[0]], "spans"), given([[0, -1]], "spans"), given([[0, True]], "spans"), given("x", "ctx"),
        given(1.5, "seed"), given(-1.0, *SUMS, "fisher"), given("1", *SUMS, "fisher"), given(None, *SUMS, "fisher"),
        given(float("nan"), *SUMS, "diagonal"), given(1, *SUMS, "other"), given({}, "tensors", "x"),
        given({"Q9": {}}, "tensors", "token_embd.weight", "types"), given("ab", "imatrix"), given(7, "texts"),
    ],
)  # fmt: skip
def test_what_can_not_be_read(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    value = as_json(ONE)
    change(value)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(value), "utf-8")
    with pytest.raises(SourceError, match=r"s\.json: sensitivities that can't be read"):
        read_sensitivity(path)


@pytest.mark.parametrize("text", ["{}", "[]", "7", '{"schema": "gguf3n.sensitivity/2"}', '{"schema": ["x"]}'])
def test_another_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(text, "utf-8")
    with pytest.raises(SourceError, match="not sensitivities"):
        read_sensitivity(path)
    path.write_text("{", "utf-8")
    with pytest.raises(SourceError, match="not JSON"):
        read_sensitivity(path)
