"""The mapping machine with a table that is not Gemma 3n's text model: what a part with other rules may ask of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.errors import MappingError
from gguf3n.formats.checkpoint import read_header
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.rows import LowRank, SourceTensor, Stored, View, Zeros, stored_tensors
from gguf3n.gemma3n.mapping import MappedTensor, Missing, Rule, Storage, Table, TensorMap, map_tensors
from gguf3n.gemma3n.part import text_part
from gguf3n.pipeline import run
from gguf3n.planning import make_plan
from gguf3n.recipes import find_recipe
from tests import micro

N_LAYERS = 2

BIAS = Rule("conv.bias", "v.bias", ("C",), Storage.FLOAT32, written=("1", "C", "1", "1"))
RULES: tuple[Rule, ...] = (
    BIAS,
    Rule(
        "patches.weight",
        "v.patch.weight",
        ("C", "3", "W", "W"),
        Storage.HALF,
        aliases=("stem.conv.weight", "conv_stem.weight"),
    ),
    Rule("layers.{bid}.up.weight", "v.blk.{bid}.up.weight", ("F", "C"), Storage.QUANTIZABLE, aliases=("l{bid}.u",)),
    Rule("layers.{bid}.norm", "v.blk.{bid}.norm", ("C",), Storage.FLOAT32, missing=Missing.ZEROS_IF_KV_SHARED),
    Rule("mix.{k}.weight", "v.mix", ("N", "C", "C"), Storage.HALF, aliases=("blend{k}",), written=("C", "N", "C")),
    Rule("table", "v.table", ("R", "C"), Storage.QUANTIZABLE, pad_rows=True),
)
SIZES = {"C": 32, "W": 4, "N": 3, "R": 10}
WIDTHS = (64, 96)

TABLE = Table(
    model="a tower of two layers",
    order=tuple((rule, bid) for rule in RULES for bid in (range(N_LAYERS) if rule.is_repeated else (None,))),
    dropped=((r"position_ids", "computed"), (r"head\..+", "not of the tower")),
    n_stacked=3,
    sizes=lambda bid: SIZES | ({} if bid is None else {"F": WIDTHS[bid]}),
    evaluated=lambda rule, bid: rule.missing is Missing.ERROR or bid == 0,
    least_rows=8,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "conv.bias": (32,),
    "patches.weight": (32, 3, 4, 4),
    "layers.0.up.weight": (64, 32),
    "layers.1.up.weight": (96, 32),
    "layers.0.norm": (32,),
    "layers.1.norm": (32,),
    "mix.0.weight": (32, 32),
    "mix.1.weight": (32, 32),
    "mix.2.weight": (32, 32),
    "table": (8, 32),
}


def stored(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> SourceTensor:
    return SourceTensor(name, shape, (Stored(name, dtype, shape, Path("dir/x.safetensors"), 64 * len(name)),))


def source(*without: str) -> dict[str, SourceTensor]:
    return {name: stored(name, shape) for name, shape in SHAPES.items() if name not in without}


def mapped(tensors: Mapping[str, SourceTensor], table: Table = TABLE) -> TensorMap:
    return map_tensors(table, tensors, "dir")


def by_name(result: TensorMap) -> dict[str, MappedTensor]:
    return {tensor.name: tensor for tensor in result.tensors}


def test_names_and_shapes_in_the_order_of_the_table() -> None:
    result = mapped(dict(reversed(source().items())))
    assert [(tensor.name, tensor.shape, tensor.bid) for tensor in result.tensors] == [
        ("v.bias", (1, 32, 1, 1), None),
        ("v.patch.weight", (32, 3, 4, 4), None),
        ("v.blk.0.up.weight", (64, 32), 0),
        ("v.blk.1.up.weight", (96, 32), 1),
        ("v.blk.0.norm", (32,), 0),
        ("v.blk.1.norm", (32,), 1),
        ("v.mix", (32, 3, 32), None),
        ("v.table", (10, 32), None),
    ]
    assert [tensor.evaluated for tensor in result.tensors] == [True] * 5 + [False] + [True] * 2
    assert result.n_weights == sum(tensor.n_rows * tensor.n_per_row for tensor in result.tensors)
    assert by_name(result)["v.mix"].rows == tuple(source()[f"mix.{k}.weight"].rows[0] for k in range(3))
    assert by_name(result)["v.table"].rows == (*source()["table"].rows, Zeros(2, 32))


def test_a_rule_names_its_tensors() -> None:
    up, mix = RULES[2], RULES[4]
    assert (up.is_repeated, up.is_stack, mix.is_repeated, mix.is_stack) == (True, False, False, True)
    assert up.name(1) == "v.blk.1.up.weight"
    assert up.sources(1, 3) == [("layers.1.up.weight", "l1.u")]
    assert mix.name(None) == "v.mix"
    assert mix.sources(None, 3) == [(f"mix.{k}.weight", f"blend{k}") for k in range(3)]


# other names


@pytest.mark.parametrize(
    ("name", "alias"),
    [
        ("patches.weight", "stem.conv.weight"),
        ("patches.weight", "conv_stem.weight"),
        ("layers.1.up.weight", "l1.u"),
        ("mix.2.weight", "blend2"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.language_model.", "base_model.model.model."])
def test_aliases(name: str, alias: str, prefix: str) -> None:
    """Whatever stands before them; the rows are those of the tensor that is there."""
    tensors = source(name)
    tensors[prefix + alias] = replace(stored(name, SHAPES[name]), name=prefix + alias)
    assert mapped(tensors) == mapped(source())


def test_a_tensor_and_its_alias_are_the_same_weight() -> None:
    with pytest.raises(MappingError, match="the same weight") as caught:
        mapped(source() | {"conv_stem.weight": stored("conv_stem.weight", SHAPES["patches.weight"])})
    assert "'patches.weight'" in caught.value.what and "'conv_stem.weight'" in caught.value.what


def test_the_aliases_of_another_layer_are_unknown() -> None:
    with pytest.raises(MappingError, match="no rule knows"):
        mapped(source() | {"l2.u": stored("l2.u", (64, 32))})


def test_a_missing_tensor_is_called_by_its_first_name() -> None:
    for name in ("patches.weight", "layers.1.up.weight", "mix.1.weight", "layers.0.norm"):
        with pytest.raises(MappingError) as caught:
            mapped(source(name))
        assert caught.value.what == f"dir: tensor {name!r} is missing"
        assert "a tower of two layers" in str(caught.value.expected)
    (norm,) = [tensor for tensor in mapped(source("layers.1.norm")).tensors if tensor.missing]
    assert (norm.name, norm.shape, norm.rows) == ("v.blk.1.norm", (32,), (Zeros(1, 32),))
    assert mapped(source("layers.1.norm")).synthesized == ["v.blk.1.norm"]


def test_what_the_table_drops_is_counted() -> None:
    more = {name: stored(name, (4,)) for name in ("position_ids", "head.a", "head.b")}
    assert dict(mapped(source() | more).dropped) == {"computed": 1, "not of the tower": 2}
    with pytest.raises(MappingError, match="no rule knows"):
        mapped(source() | {"position_ids.x": stored("position_ids.x", (4,))})


# other shapes


def test_a_vector_that_is_written_in_four_dimensions() -> None:
    tensor = by_name(mapped(source()))["v.bias"]
    assert tensor.shape == (1, 32, 1, 1)
    assert (tensor.n_rows, tensor.n_per_row, tensor.n_weights) == (1, 32, 32)
    assert tensor.rows == source()["conv.bias"].rows


@pytest.mark.parametrize("shape", [(1, 32, 1, 1), (32, 1), (31,), (33,), ()])
def test_the_shape_of_the_source_is_that_of_the_rule(shape: tuple[int, ...]) -> None:
    with pytest.raises(MappingError, match=r"'conv\.bias' has the wrong shape") as caught:
        mapped(source() | {"conv.bias": stored("conv.bias", shape)})
    assert str(caught.value.expected).startswith("[32]")
    assert caught.value.found == str(list(shape))


def test_a_missing_tensor_has_the_shape_that_is_written() -> None:
    rule = replace(RULES[3], written=("C", "1"))
    order = tuple((rule, bid) if each is RULES[3] else (each, bid) for each, bid in TABLE.order)
    tensors = by_name(mapped(source("layers.1.norm"), replace(TABLE, order=order)))
    assert [tensors[f"v.blk.{bid}.norm"].shape for bid in range(2)] == [(32, 1)] * 2
    assert tensors["v.blk.1.norm"].rows == (Zeros(1, 32),)


@pytest.mark.parametrize(("n_rows", "fits"), [(7, False), (8, True), (9, True), (10, True), (11, False)])
def test_only_tables_may_be_padded_and_not_too_far(n_rows: int, fits: bool) -> None:
    tensors = source() | {"table": stored("table", (n_rows, 32))}
    if fits:
        tensor = by_name(mapped(tensors))["v.table"]
        assert (tensor.shape, sum(rows.n_rows for rows in tensor.rows)) == ((10, 32), 10)
    else:
        with pytest.raises(MappingError, match="'table' has the wrong shape"):
            mapped(tensors)
    with pytest.raises(MappingError, match="wrong shape"):
        mapped(source() | {"layers.0.up.weight": stored("layers.0.up.weight", (63, 32))})


def test_numbers_and_words_of_a_shape() -> None:
    assert TABLE.shape(("C", "3", "W", "1"), None) == (32, 3, 4, 1)
    assert TABLE.shape(("F", "C"), 1) == (96, 32)
    with pytest.raises(KeyError):
        TABLE.shape(("F", "C"), None)


# other rows


def test_a_source_may_have_rows_of_any_form() -> None:
    """A slice, a tensor with an adapter, a tensor of two pieces: they are taken over as they are."""
    whole = Stored("big", "F16", (96, 48), Path("x"), 0)
    a, b = Stored("a", "F32", (2, 32), Path("x"), 0), Stored("b", "F32", (96, 2), Path("x"), 0)
    view = View(whole, range(96), (range(16), range(32, 48)))
    merged = LowRank(view, a, b, 0.5)
    two = (View(view, range(40, 80), (range(32),)), View(view, range(24), (range(32),)))
    more = {
        "layers.1.up.weight": SourceTensor("layers.1.up.weight", (96, 32), (merged,)),
        "layers.0.up.weight": SourceTensor("layers.0.up.weight", (64, 32), two),
    }
    tensors = by_name(mapped(source() | more))
    assert tensors["v.blk.1.up.weight"].rows == (merged,)
    assert tensors["v.blk.1.up.weight"].source_dtypes == {"F32"}
    assert tensors["v.blk.0.up.weight"].rows == two
    assert tensors["v.blk.0.up.weight"].source_dtypes == {"F16"}
    with pytest.raises(MappingError, match=r"x: tensor 'big' has a dtype") as caught:
        wrong = View(replace(whole, dtype="I8"), range(96), (range(32),))
        mapped(source() | {"layers.1.up.weight": SourceTensor("layers.1.up.weight", (96, 32), (wrong,))})
    assert (caught.value.expected, caught.value.found) == ("BF16, F16, F32", "I8")


# types


def test_what_a_storage_says() -> None:
    assert {storage: storage.forced for storage in Storage} == {
        Storage.FLOAT32: QType.F32,
        Storage.HALF: None,
        Storage.QUANTIZABLE: None,
        Storage.NORM: QType.F32,
        Storage.STEM: QType.F32,
        Storage.AUDIO_CONVOLUTION: QType.F32,
        Storage.CONVOLUTION: None,
        Storage.DEPTHWISE: None,
    }
    by_recipe = {storage for storage in Storage if storage.by_recipe}
    assert by_recipe == {Storage.QUANTIZABLE, Storage.CONVOLUTION, Storage.DEPTHWISE}
    assert len({storage.reason for storage in Storage}) == len(Storage)


@pytest.mark.parametrize("quant", ["BF16", "Q8_0", "F16"])
def test_a_part_of_other_rules_is_planned_and_written(tmp_path: Path, quant: str) -> None:
    """Forced types and written shapes stand in the file, whatever the recipe; values are the source's."""
    rng = np.random.default_rng(0)
    arrays = {name: micro.bf16_bits(rng.standard_normal(shape, np.float32)) for name, shape in SHAPES.items()}
    checkpoint = gguf3n.read_source(micro.make(tmp_path / "text"))
    micro.write_safetensors(tmp_path / "tower.safetensors", arrays)
    result = mapped(stored_tensors(read_header(tmp_path / "tower.safetensors")))
    part = replace(text_part(checkpoint), tensors=result.tensors)
    plan = make_plan(part, find_recipe(quant))
    for planned in plan.tensors:
        if planned.source.storage is Storage.FLOAT32:
            assert (planned.slot.qtype, planned.reason) == (QType.F32, Storage.FLOAT32.reason)
    run([(plan, tmp_path / "x.gguf")])
    file = gguf3n.open_gguf(tmp_path / "x.gguf")
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {
        tensor.name: tensor.shape for tensor in result.tensors
    }
    bias = np.frombuffer(file.read(file.tensors["v.bias"]), np.float32)
    assert np.array_equal(bias, (arrays["conv.bias"].astype(np.uint32) << 16).view(np.float32))
    assert file.tensors["v.bias"].shape == (1, 32, 1, 1)
    if quant == "BF16":
        mix = np.frombuffer(file.read(file.tensors["v.mix"]), np.uint16)
        assert np.array_equal(mix, np.concatenate([arrays[f"mix.{k}.weight"].reshape(-1) for k in range(3)]))
        patch = np.frombuffer(file.read(file.tensors["v.patch.weight"]), np.uint16)
        assert np.array_equal(patch, arrays["patches.weight"].reshape(-1))
    assert re.fullmatch(r"[\w-]+\.gguf", part.file_name(quant))
