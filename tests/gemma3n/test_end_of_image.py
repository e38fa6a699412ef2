"""<end_of_image> in the text file: the rows that the model has, where the checkpoint has pictures, and only there."""

from __future__ import annotations

import dataclasses
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
from gguf3n.gemma3n.encoders import read_image_tokens
from gguf3n.gemma3n.end_of_image import with_end_of_image
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.text import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from workshop import comparison
from workshop.checkpoints import CONFIGS

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


def changed(seeing: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> gguf3n.Part:
    shutil.copytree(seeing, folder / "x")
    config = json.loads((folder / "x" / "config.json").read_text("utf-8"))
    change(config)
    (folder / "x" / "config.json").write_text(json.dumps(config), "utf-8")
    return text_part(gguf3n.read_source(folder / "x"))


def no_vision(config: dict[str, Any]) -> None:
    del config["vision_config"]


def no_mark(config: dict[str, Any]) -> None:
    """The published id is past the tiny vocabulary."""
    del config["eoi_token_id"]


def a_mark_among_the_text(config: dict[str, Any]) -> None:
    config["eoi_token_id"] = 7


def a_mark_past_the_table(config: dict[str, Any]) -> None:
    config["eoi_token_id"] = VOCAB - 1


def an_offset_that_is_none(config: dict[str, Any]) -> None:
    config["vision_config"]["vocab_offset"] = "1024"


def no_offset(config: dict[str, Any]) -> None:
    del config["vision_config"]["vocab_offset"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_vision, "config.json: vision_config is no object; expected: that of a Gemma 3n; found: null"),
        (no_mark, "an id from 1,024 on, below vocab_size, 1,088; found: 262,144"),
        (a_mark_among_the_text, "eoi_token_id is not past the text's own vocabulary"),
        (a_mark_past_the_table, "no row of embed_vision.embedding; expected: 0 to 31; found: 1,087 - 1,024"),
        (an_offset_that_is_none, "vocab_offset is impossible"),
        (no_offset, "eoi_token_id less vocab_offset is no row"),
    ],
)
def test_without_a_known_mark_there_is_padding_and_a_notice(
    seeing: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    part = changed(seeing, tmp_path, change)
    assert not any(tensor.plain_rows for tensor in part.tensors)
    (notice,) = [notice for notice in part.notices if "<end_of_image>" in notice]
    assert "are padding" in notice and reason in notice


def no_epsilon(config: dict[str, Any]) -> None:
    del config["vision_config"]["rms_norm_eps"]


def a_whole_epsilon(config: dict[str, Any]) -> None:
    config["vision_config"]["rms_norm_eps"] = 1


@pytest.mark.parametrize("change", [no_epsilon, a_whole_epsilon])
def test_the_epsilon_may_be_missing_or_whole(
    seeing: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    part = changed(seeing, tmp_path, change)
    assert [tensor.name for tensor in part.tensors if tensor.plain_rows] == [TOKEN_EMBD, PER_LAYER_TOKEN_EMBD]
    assert not any("<end_of_image>" in notice for notice in part.notices)


def test_an_embedder_that_lacks_a_tensor_or_fits_nothing(seeing: Path) -> None:
    source = gguf3n.read_source(seeing)
    name, other = (f"model.embed_vision.{part}.weight" for part in ("hard_embedding_norm", "embedding"))
    for tensors, reason in (
        ({key: each for key, each in source.tensors.items() if key != name}, f"{name[6:]!r} is missing"),
        ({**source.tensors, name: source.tensors[other]}, "do not fit each other"),
        ({**source.tensors, other: dataclasses.replace(source.tensors[other], shape=())}, "do not fit each other"),
    ):
        found, (notice,) = with_end_of_image((), dataclasses.replace(source, tensors=tensors))
        assert found == () and reason in notice


def test_keys_that_are_missing_are_the_published_ones() -> None:
    published = json.loads((CONFIGS / "gemma-3n-e2b.json").read_text("utf-8"))
    path = Path("config.json")
    assert read_image_tokens({"vision_config": {}}, path) == read_image_tokens(published, path)


def test_a_text_only_checkpoint_is_written_as_ever(tiny_checkpoint: Path) -> None:
    part = text_part(gguf3n.read_source(tiny_checkpoint))
    assert not any(tensor.plain_rows for tensor in part.tensors)
    assert not any("<end_of_image>" in notice for notice in part.notices)


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
