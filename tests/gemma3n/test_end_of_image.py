"""<end_of_image> in the text file: the rows that the model has, where the checkpoint has pictures, and only there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gguf3n
from gguf3n.formats.rows import RowReader
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.text import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from workshop import comparison

END_OF_IMAGE, VOCAB = 1024, 1088  # of the tiny checkpoint


def values(path: Path, name: str) -> NDArray[np.float32]:
    gguf = gguf3n.open_gguf(path)
    tensor = gguf.tensors[name]
    out = np.empty(tensor.shape, np.float32)
    with closing(RowReader()) as reader:
        reader.fill(gguf.stored(tensor), 0, out)
    return out


def source_values(checkpoint: Path, name: str) -> NDArray[np.float64]:
    tensor = gguf3n.read_source(checkpoint).tensors[name]
    out = np.empty((tensor.rows[0].n_rows, tensor.shape[-1]), np.float32)
    with closing(RowReader()) as reader:
        reader.fill(tensor.rows[0], 0, out)
    return out.astype(np.float64)


def rms_normed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.sqrt((x * x).mean() + 1e-6)


@pytest.fixture(scope="module")
def seeing(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(multimodal=True)


@pytest.fixture(scope="module")
def written(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both kinds, from one read."""
    quants = ["F32", "BF16", "BF16@llama.cpp", "Q8_0"]
    conversions = gguf3n.convert(seeing, quants, tmp_path_factory.mktemp("end"))
    return {quant: each.path for quant, each in zip(quants, conversions, strict=True)}


def test_only_these_rows_are_others_than_those_of_the_converter(written: dict[str, Path]) -> None:
    ours, theirs = (comparison.describe(written[quant]) for quant in ("BF16", "BF16@llama.cpp"))
    names = [name for name, *_ in comparison.differences(ours, theirs)]
    assert sorted(names) == [f"tensor {PER_LAYER_TOKEN_EMBD}/bytes", f"tensor {TOKEN_EMBD}/bytes"]
    for name, rows in ((TOKEN_EMBD, [END_OF_IMAGE]), (PER_LAYER_TOKEN_EMBD, range(END_OF_IMAGE, VOCAB))):
        different = (values(written["BF16"], name) != values(written["BF16@llama.cpp"], name)).any(axis=1)
        assert np.flatnonzero(different).tolist() == list(rows)
    assert not values(written["BF16@llama.cpp"], PER_LAYER_TOKEN_EMBD)[END_OF_IMAGE:].any()


def test_the_embedding_is_the_vision_embedders(seeing: Path, written: dict[str, Path]) -> None:
    table, norm, projection = (
        source_values(seeing, f"model.embed_vision.{name}.weight")
        for name in ("embedding", "hard_embedding_norm", "embedding_projection")
    )
    expected = rms_normed(projection @ (rms_normed(table[0]) * norm[0])) / np.sqrt(256)
    np.testing.assert_array_equal(values(written["F32"], TOKEN_EMBD)[END_OF_IMAGE], expected.astype(np.float32))
    found = values(written["Q8_0"], TOKEN_EMBD)[END_OF_IMAGE]
    np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 127)


def test_the_per_layer_rows_are_the_pad_tokens(written: dict[str, Path]) -> None:
    table = values(written["F32"], PER_LAYER_TOKEN_EMBD)
    assert (table[END_OF_IMAGE:] == table[0]).all() and table[0].any()


def test_what_both_kinds_want_is_read_once(seeing: Path) -> None:
    part = text_part(gguf3n.read_source(seeing))
    (table,) = [tensor for tensor in part.tensors if tensor.name == TOKEN_EMBD]
    assert [rows.n_rows for rows in table.rows] == [rows.n_rows for rows in table.plain_rows] == [1024, 1, 63]
    assert [own == plain for own, plain in zip(table.rows, table.plain_rows, strict=True)] == [True, False, True]


def test_the_plan_says_it_where_it_is_so(seeing: Path) -> None:
    assert any("<end_of_image>" in notice for notice in gguf3n.plan(seeing, "Q4_0").notices)
    for quant in ("Q4_0@llama.cpp", "Q4_0@2025"):
        assert not any("<end_of_image>" in notice for notice in gguf3n.plan(seeing, quant).notices)


@pytest.mark.parametrize("layout", ["nested", "peft-prefix"])
def test_every_layout(make_checkpoint: Callable[..., Path], layout: str) -> None:
    part = text_part(gguf3n.read_source(make_checkpoint(layout=layout, multimodal=True)))
    assert [tensor.name for tensor in part.tensors if tensor.plain_rows] == [TOKEN_EMBD, PER_LAYER_TOKEN_EMBD]


def no_vision(config: dict[str, Any]) -> None:
    del config["vision_config"]


def no_mark(config: dict[str, Any]) -> None:
    del config["eoi_token_id"]


def a_mark_among_the_text(config: dict[str, Any]) -> None:
    config["eoi_token_id"] = 7


def a_mark_past_the_table(config: dict[str, Any]) -> None:
    config["eoi_token_id"] = VOCAB - 1


def an_offset_that_is_none(config: dict[str, Any]) -> None:
    config["vision_config"]["vocab_offset"] = "1024"


@pytest.mark.parametrize(
    "change", [no_vision, no_mark, a_mark_among_the_text, a_mark_past_the_table, an_offset_that_is_none]
)
def test_without_a_known_mark_there_is_padding(
    seeing: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    shutil.copytree(seeing, tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text("utf-8"))
    change(config)
    (tmp_path / "x" / "config.json").write_text(json.dumps(config), "utf-8")
    part = text_part(gguf3n.read_source(tmp_path / "x"))
    assert not any(tensor.plain_rows for tensor in part.tensors)


def test_a_text_only_checkpoint_is_written_as_ever(tiny_checkpoint: Path) -> None:
    part = text_part(gguf3n.read_source(tiny_checkpoint))
    assert not any(tensor.plain_rows for tensor in part.tensors)


def test_validation_takes_both_kinds_and_no_third(seeing: Path, written: dict[str, Path], tmp_path: Path) -> None:
    for quant in ("BF16", "BF16@llama.cpp", "Q8_0"):
        found = gguf3n.validate(written[quant], seeing, stages="structure,tensors")
        assert found.verdict is gguf3n.Verdict.PASS, quant
        result = found.stages[gguf3n.Stage.TENSORS]
        assert isinstance(result, gguf3n.TensorsResult)
        assert any("padding in the row of <end_of_image>" in note for note in result.notes) == ("@" in quant)
    path = tmp_path / "other.gguf"
    shutil.copy(written["F32"], path)
    table = gguf3n.open_gguf(path).tensors[TOKEN_EMBD]
    with path.open("r+b") as file:
        file.seek(table.offset + END_OF_IMAGE * 4 * 256)
        file.write(np.random.default_rng(0).standard_normal(256, np.float32).tobytes())
    found = gguf3n.validate(path, seeing, stages="tensors")
    assert found.verdict is gguf3n.Verdict.FAIL
    assert [problem.where for problem in found.stages[gguf3n.Stage.TENSORS].problems] == [TOKEN_EMBD]
