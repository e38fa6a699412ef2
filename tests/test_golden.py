"""Our files against those of llama.cpp's converter, recorded in fixtures/llama_cpp by scripts/compare_llama_cpp.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gguf3n
from workshop.comparison import GOLDEN, MEANT, OURS, TYPES, describe, differences, meant

every_type = pytest.mark.parametrize("quant", TYPES)


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    recorded: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))
    assert recorded["provenance"].startswith("convert_hf_to_gguf.py of llama-cpp-python ")
    types: dict[str, dict[str, Any]] = recorded["types"]
    return types


@pytest.fixture(scope="module")
def named_like_the_recorded_one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A checkpoint under the name "tiny", which stands in general.name."""

    def link(checkpoint: Path) -> Path:
        path = tmp_path_factory.mktemp("named") / "tiny"
        path.symlink_to(checkpoint, target_is_directory=True)
        return path

    return link


@pytest.fixture(scope="module")
def ours(
    tiny_checkpoint: Path,
    named_like_the_recorded_one: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, dict[str, Any]]:
    """What our files of the same types are, from one read."""
    quants = [OURS.get(quant, quant) for quant in TYPES]
    written = gguf3n.convert(named_like_the_recorded_one(tiny_checkpoint), quants, tmp_path_factory.mktemp("ours"))
    return {quant: describe(each.path) for quant, each in zip(TYPES, written, strict=True)}


def test_the_record_is_of_whole_files(golden: dict[str, dict[str, Any]]) -> None:
    assert tuple(golden) == TYPES
    for facts in golden.values():
        assert sum(name.startswith("tensor ") and name.endswith("/bytes") for name in facts) == 535
        assert sum(name.startswith("key ") and name.endswith("/value") for name in facts) > 40


@every_type
def test_no_difference_that_is_not_meant(
    golden: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]], quant: str
) -> None:
    found = differences(ours[quant], golden[quant])
    assert [difference for difference in found if meant(quant, difference[0]) is None] == []


@every_type
def test_the_differences_that_are_meant_are_there(
    golden: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]], quant: str
) -> None:
    """Otherwise llama.cpp has changed, or we have, and the list says what is no longer so."""
    found = Counter((mine, theirs) for _, mine, theirs in differences(ours[quant], golden[quant]))
    n_half = 3 + 3 * 22  # altup_proj, altup_unembd_proj, per_layer_model_proj; laurel_l, laurel_r, altup_router a layer
    assert found == ({("BF16", "Q8_0"): n_half} if quant == "Q8_0" else {})


def test_every_meant_difference_has_a_reason_and_happens(
    golden: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]
) -> None:
    for quant, pattern, why in MEANT:
        assert len(why) > 20
        assert any(meant(quant, name) == why for name, *_ in differences(ours[quant], golden[quant])), pattern


SEP = "key tokenizer.ggml.add_sep_token/"  # false, and read from tokenizer.json alone


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"layout": "nested", "shards": 3}, []),
        ({"tokenizer": "model"}, [(f"{SEP}type", None, "bool"), (f"{SEP}value", None, "false")]),
        ({"tokenizer": "json"}, []),
        ({"multimodal": True}, []),  # tests/gemma3n/test_end_of_image.py has what is other without @llama.cpp
    ],
    ids=["nested-sharded", "tokenizer.model", "tokenizer.json", "multimodal"],
)
def test_the_same_file_from_every_form_of_the_checkpoint(
    golden: dict[str, dict[str, Any]],
    make_checkpoint: Callable[..., Path],
    named_like_the_recorded_one: Callable[[Path], Path],
    tmp_path: Path,
    options: dict[str, Any],
    missing: list[tuple[str, Any, Any]],
) -> None:
    source = named_like_the_recorded_one(make_checkpoint(**options))
    (written,) = gguf3n.convert(source, "BF16@llama.cpp", tmp_path / "x.gguf")
    assert differences(describe(written.path), golden["BF16"]) == missing


def test_a_change_would_be_noticed(golden: dict[str, dict[str, Any]]) -> None:
    facts = golden["F32"]
    assert differences(facts, facts) == []
    names = ["key general.name/value", "tensor blk.3.attn_q.weight/bytes", "tensor blk.3.attn_q.weight/shape"]
    for name in names:
        assert [difference[0] for difference in differences({**facts, name: "?"}, facts)] == [name]
        assert [difference[0] for difference in differences(facts, {**facts, f"{name}?": 1})] == [f"{name}?"]
    without = {name: value for name, value in facts.items() if not name.startswith("tensor output_norm")}
    assert [name for name, *_ in differences(without, facts)] == [
        "tensor output_norm.weight/shape",
        "tensor output_norm.weight/type",
    ]
