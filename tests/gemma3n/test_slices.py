"""Slices against Google's notebook, written down here on whole arrays; padding against a network in NumPy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gguf3n
from gguf3n.errors import Gguf3nError, MappingError, UsageError
from gguf3n.formats.rows import LowRank, RowReader, SourceTensor, Stored, View, Zeros
from gguf3n.gemma3n.named_slices import NAMED_SLICES, NamedSlice, find_slice, parse_slice
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.gemma3n.slices import Slice, effective_parameters, padded, slice_config, take_slice
from gguf3n.gemma3n.source import Checkpoint, open_checkpoint
from gguf3n.gemma3n.text import table
from tests import micro
from workshop import checkpoints

RAW = json.loads(json.dumps(micro.e4b_config()))
ARRAYS = micro.tensors(RAW)
every_named = pytest.mark.parametrize("named", NAMED_SLICES, ids=lambda named: named.name)

Arrays = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(micro.make(tmp_path_factory.mktemp("slices") / "e4b", raw=RAW, arrays=ARRAYS))


def notebook(arrays: Arrays, text: Mapping[str, Any], skip: Sequence[int], widths: Sequence[int]) -> Arrays:
    """The algorithm of the MatFormer Lab, on whole arrays."""
    n_layers, size = text["num_hidden_layers"], text["hidden_size_per_layer_input"]
    keep = [layer for layer in range(n_layers) if layer not in skip]
    made: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if ".layers." in name:
            head, _, tail = name.partition(".layers.")
            number, _, part = tail.partition(".")
            if int(number) in skip:
                continue
            new = keep.index(int(number))
            if part in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
                array = array[: widths[new], :]
            elif part == "mlp.down_proj.weight":
                array = array[:, : widths[new]]
            name = f"{head}.layers.{new}.{part}"
        elif name.endswith("per_layer_model_projection.weight"):
            array = array.reshape(n_layers, size, -1)[keep].reshape(len(keep) * size, -1)
        elif name.endswith("embed_tokens_per_layer.weight"):
            array = array.reshape(-1, n_layers, size)[:, keep].reshape(-1, len(keep) * size)
        made[name] = array
    return made


def notebook_config(text: Mapping[str, Any], skip: Sequence[int], widths: Sequence[int]) -> dict[str, Any]:
    """What the notebook writes; layer_types, which it forgets, as the published E2B has them."""
    n_layers = text["num_hidden_layers"]
    n_sparse = 10 - sum(layer <= 9 for layer in skip)
    n_left = n_layers - len(skip)
    return dict(text) | {
        "num_kv_shared_layers": text["num_kv_shared_layers"] - sum(layer >= 20 for layer in skip),
        "activation_sparsity_pattern": [0.95] * n_sparse + [0.0] * (n_left - n_sparse),
        "num_hidden_layers": n_left,
        "intermediate_size": list(widths),
        "layer_types": [kind for layer, kind in enumerate(text["layer_types"]) if layer not in skip],
    }


def bits(tensor: SourceTensor, reader: RowReader) -> NDArray[np.uint16]:
    parts = []
    for rows in tensor.rows:
        raw = reader.read_raw(rows, 0, rows.n_rows)
        assert raw is not None
        parts.append(raw.copy().view(np.uint16))
    return np.concatenate(parts).reshape(tensor.shape)


def same_as_notebook(made: Checkpoint, wanted: Slice) -> None:
    expected = notebook(ARRAYS, RAW["text_config"], wanted.skip, wanted.widths)
    assert set(made.tensors) == set(expected)
    with closing(RowReader()) as reader:
        for name, array in expected.items():
            assert made.tensors[name].name == name
            assert np.array_equal(bits(made.tensors[name], reader), array), name
    assert made.raw_config == RAW | {"text_config": notebook_config(RAW["text_config"], wanted.skip, wanted.widths)}


@every_named
def test_every_named_slice_is_the_notebooks(named: NamedSlice, whole: Checkpoint) -> None:
    wanted = named.of(whole.config)
    made = take_slice(whole, wanted, pad=False)
    same_as_notebook(made, wanted)
    assert made.config == made.true_config
    assert made.name == f"e4b-{named.name}"


@pytest.mark.parametrize("skip", [(0,), (3, 9, 12), (17, 20, 34), tuple(range(20, 35)), (2, 5, 10, 19 - 2, 21, 33)])
def test_any_layers_may_be_left_out_but_the_two(skip: tuple[int, ...], whole: Checkpoint) -> None:
    widths = tuple(range(20, 20 + 35 - len(skip)))
    wanted = Slice("mine", skip, widths)
    made = take_slice(whole, wanted, pad=False)
    same_as_notebook(made, wanted)
    assert "no model was trained" in made.notices[-1]


@every_named
def test_effective_parameters_are_those_published(named: NamedSlice) -> None:
    e4b = PUBLISHED["E4B"]
    wanted = named.of(e4b)
    billions = effective_parameters(slice_config(e4b, wanted, wanted.widths)) / 1e9
    assert billions == pytest.approx(named.billions, abs=1e-3)
    assert float(named.name[1:].partition("B")[0]) == pytest.approx(billions, abs=0.1)


def test_the_table_is_in_order_and_ends_with_the_published_e2b() -> None:
    assert [named.billions for named in NAMED_SLICES] == sorted((n.billions for n in NAMED_SLICES), reverse=True)
    assert len({named.name for named in NAMED_SLICES}) == 16
    e4b, e2b = PUBLISHED["E4B"], PUBLISHED["E2B"]
    assert [slice_config(e4b, (s := named.of(e4b)), s.widths) for named in (NAMED_SLICES[0], NAMED_SLICES[-1])] == [
        e4b,
        e2b,
    ]


def test_all_of_a_model_is_what_it_was(whole: Checkpoint) -> None:
    """And so are the tensors that a slice does not touch: bytes are read where they are."""
    assert take_slice(whole, find_slice("e4b").of(whole.config)).tensors == whole.tensors
    made = take_slice(whole, find_slice("E2B").of(whole.config))
    for tensor in made.tensors.values():
        for rows in tensor.rows:
            assert isinstance(rows, Stored) or ("down_proj" in tensor.name or "per_layer.weight" in tensor.name)


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_every_layout(layout: str, tmp_path: Path) -> None:
    raw = dict(RAW) if layout != "text-only" else RAW["text_config"] | {"architectures": ["Gemma3nForCausalLM"]}
    arrays = {checkpoints.rename(name, layout): array for name, array in ARRAYS.items()}
    made = take_slice(
        micro.make(tmp_path / "e4b", raw=raw, arrays=arrays), find_slice("E1.96B-layer").of(PUBLISHED_SMALL)
    )
    expected = notebook(ARRAYS, RAW["text_config"], range(20, 25), made.slice.widths)
    assert set(made.tensors) == {checkpoints.rename(name, layout) for name in expected}
    assert made.config.num_hidden_layers == 30
    assert [tensor.name for tensor in gguf3n.text_part(made).tensors] == [
        rule.name(bid) for rule, bid in table(made.config).order
    ]


def test_a_model_without_shared_keys_and_values(tmp_path: Path) -> None:
    """As transformers 5 saves it."""
    shared = re.compile(r".*\.layers\.(2\d|3\d)\.self_attn\.(k_proj|v_proj|k_norm)\..*")
    arrays = {name: array for name, array in ARRAYS.items() if not shared.fullmatch(name)}
    assert len(ARRAYS) - len(arrays) == 3 * 15
    made = take_slice(micro.make(tmp_path / "e4b", raw=RAW, arrays=arrays), find_slice("E2B").of(PUBLISHED_SMALL))
    assert sum(tensor.missing for tensor in gguf3n.text_part(made).tensors) == 3 * 10


PUBLISHED_SMALL = replace(PUBLISHED["E4B"], intermediate_size=(64,) * 35)


def test_what_is_no_file_is_sliced_too(whole: Checkpoint) -> None:
    """Zeros and merged adapters, as other functions from a source to a source leave them."""
    tensors = dict(whole.tensors)
    ple = "model.language_model.embed_tokens_per_layer.weight"
    gate = "model.language_model.layers.1.mlp.gate_proj.weight"
    up = gate.replace("gate", "up")
    (stored,) = tensors[gate].rows
    assert isinstance(stored, Stored)
    low = replace(stored, shape=(64, 1)), replace(stored, shape=(1, 64))
    tensors[gate] = replace(tensors[gate], rows=(LowRank(stored, low[1], low[0], 0.5),))
    tensors[up] = replace(tensors[up], rows=(Zeros(64, 64),))
    made = take_slice(replace(whole, tensors=tensors), find_slice("E2B").of(whole.config))
    assert [type(rows) for name in (gate, up, ple) for rows in made.tensors[name].rows] == [View, Zeros, View]
    assert made.tensors[up].rows == (Zeros(32, 64),)


# padding


def network(gate: NDArray[Any], up: NDArray[Any], down: NDArray[Any], x: NDArray[Any], sparsity: float) -> NDArray[Any]:
    """A feed-forward network of Gemma 3n, as transformers computes it, in float64."""
    gated = x @ gate.T
    if sparsity:
        cut = gated.mean(-1, keepdims=True) + 1.6448536269514722 * gated.std(-1, keepdims=True)
        gated = np.maximum(gated - cut, 0)
    gelu = 0.5 * gated * (1 + np.tanh(np.sqrt(2 / np.pi) * (gated + 0.044715 * gated**3)))
    result: NDArray[Any] = (gelu * (x @ up.T)) @ down.T
    return result


def floats(tensor: SourceTensor, reader: RowReader) -> NDArray[np.float64]:
    found = []
    for rows in tensor.rows:
        out = np.empty((rows.n_rows, rows.n_per_row), np.float32)
        reader.fill(rows, 0, out)
        found.append(out)
    return np.vstack(found).astype(np.float64)


@every_named
def test_padding_changes_nothing_that_a_layer_computes(named: NamedSlice, whole: Checkpoint) -> None:
    made = take_slice(whole, named.of(whole.config))
    true = made.unpadded
    assert len(set(made.config.intermediate_size)) == 1
    assert made.is_padded == (len(set(made.slice.widths)) > 1)
    x = np.random.default_rng(0).standard_normal((3, 64))
    with closing(RowReader()) as reader:
        for bid, share in enumerate(made.config.activation_sparsity_pattern):
            names = [f"model.language_model.layers.{bid}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
            one, other = (
                network(*(floats(source.tensors[name], reader) for name in names), x, share) for source in (made, true)
            )
            assert np.abs(other).max() > 1
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
            for name in names:
                assert made.tensors[name].shape == floats(made.tensors[name], reader).shape
    assert {name: t for name, t in made.tensors.items() if ".mlp." not in name} == {
        name: t for name, t in true.tensors.items() if ".mlp." not in name
    }


def test_a_quarter_is_repeated_four_times(whole: Checkpoint) -> None:
    made = take_slice(whole, Slice("mine", (), (16,) * 5 + (64,) * 30))
    gate = made.tensors["model.language_model.layers.0.mlp.gate_proj.weight"]
    assert len(gate.rows) == 4 and len(set(gate.rows)) == 1


def test_padding_a_slice_of_one_width_does_nothing(whole: Checkpoint) -> None:
    made = take_slice(whole, find_slice("E2B").of(whole.config), pad=False)
    assert padded(made) is made and made.unpadded is made


def test_the_copy_is_the_slice(whole: Checkpoint, tmp_path: Path) -> None:
    """What `slice` writes converts to the bytes of the slice itself, and has its vocabulary."""
    made = take_slice(whole, find_slice("E2.69B-layer").of(whole.config), pad=False)
    written = gguf3n.write_slice(made, tmp_path / "copy")
    assert {path.name for path in written} == {path.name for path in whole.path.iterdir()}
    same_as_notebook(open_checkpoint(tmp_path / "copy"), made.slice)
    for source, name in ((made, "slice.gguf"), (tmp_path / "copy", "copy.gguf")):
        gguf3n.convert(source, "Q8_0", tmp_path / name)
    found = gguf3n.diff(tmp_path / "slice.gguf", tmp_path / "copy.gguf", with_data=True)
    said = ("general.name", "general.finetune", "general.base_model.", "gguf3n.slice.")
    assert not found.tensors and found.keys and all(change.name.startswith(said) for change in found.keys)


def test_the_copy_has_every_small_file(whole: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole.path, source)
    (source / "preprocessor_config.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("x")
    (source / "notes.txt").write_text("of no use")
    made = take_slice(source, find_slice("E2B").of(whole.config), pad=False)
    gguf3n.write_slice(made, tmp_path / "copy")
    copied = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*")}
    assert {"preprocessor_config.json", "generation_config.json", "additional_chat_templates/tool.jinja"} <= copied
    assert "notes.txt" not in copied


# bad input


@pytest.mark.parametrize(
    ("skip", "widths", "what"),
    [
        ((18,), (64,) * 34, "layer 18 can't be skipped"),
        ((20, 19), (64,) * 33, "layer 19 can't be skipped"),
        ((35,), (64,) * 35, "no layer 35 to skip"),
        ((-1,), (64,) * 35, "no layer -1 to skip"),
        ((20, 20), (64,) * 33, "skipped twice"),
        ((), (64,) * 34, "34 widths for 35 layers"),
        ((20,), (64,) * 35, "35 widths for 34 layers"),
        ((), (*((64,) * 34), 65), "layer 34 has no part of width 65"),
        ((0,), (0, *((64,) * 33)), "layer 1 has no part of width 0"),
    ],
)
def test_slices_that_a_model_does_not_have(
    skip: tuple[int, ...], widths: tuple[int, ...], what: str, whole: Checkpoint
) -> None:
    with pytest.raises(UsageError, match=what):
        take_slice(whole, Slice("mine", skip, widths), pad=False)


@pytest.mark.parametrize(
    ("skip", "widths", "what"),
    [
        ((4,), (64,) * 34, "llama.cpp runs no Gemma 3n without layer 4"),
        ((), (24, *((64,) * 34)), "layer 0 is sparse, and can't be padded from 24 to 64"),
    ],
)
def test_slices_that_llama_cpp_can_not_run(
    skip: tuple[int, ...], widths: tuple[int, ...], what: str, whole: Checkpoint
) -> None:
    wanted = Slice("mine", skip, widths)
    with pytest.raises(UsageError, match=what) as caught:
        take_slice(whole, wanted)
    assert "--no-pad" in (caught.value.fix or "")
    assert take_slice(whole, wanted, pad=False).config.intermediate_size == widths


def test_another_models_slices(tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="a slice of E4B, not of this model"):
        find_slice("E2B").of(open_checkpoint(tiny_checkpoint).config)


def test_tensors_that_do_not_fit_are_no_slice(tmp_path: Path) -> None:
    short = {name: a for name, a in ARRAYS.items() if ".layers.34.mlp" not in name}
    source = micro.make(tmp_path / "e4b", raw=RAW, arrays=short)
    with pytest.raises(MappingError, match="is missing"):
        take_slice(source, Slice("mine", (34,), (64,) * 34))


@pytest.mark.parametrize("named", ["E5B", "e2.98", "auto", "", "E2B.tom"])
def test_an_unknown_name(named: str) -> None:
    with pytest.raises(UsageError, match="unknown slice") as caught:
        find_slice(named)
    assert "E2.98B-block" in (caught.value.expected or "") and caught.value.fix


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("skip = [20, 21]\nwidths = 32  # of each\n")
    config = replace(PUBLISHED["E4B"], intermediate_size=(64,) * 35)
    assert find_slice(str(path)).of(config) == Slice("mine", (20, 21), (32,) * 33)
    path.write_text(f"widths = {[16] * 35}\n")
    assert find_slice(str(path)).of(config) == Slice("mine", (), (16,) * 35)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("skip = [20", "not TOML"),
        ("skip = [20]", "widths is missing"),
        ("widths = 8192\nlayers = 3", "unknown key 'layers'"),
        ("widths = 8192\nskip = 20", "skip is impossible"),
        ("widths = 8192\nskip = [-1]", "skip is impossible"),
        ("widths = 8192\nskip = [true]", "skip is impossible"),
        ("widths = '8192'", "widths is impossible"),
        ("widths = [8192, 0]", "widths is impossible"),
        ("widths = 8192.0", "widths is impossible"),
        (f"a{'.a' * 70} = 1", "too many parts"),
    ],
)
def test_files_that_say_nothing_sensible(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        parse_slice(text, "mine.toml", "mine")
    assert str(caught.value).startswith("mine.toml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Gguf3nError, match="cannot be read"):
        find_slice(str(tmp_path / "none.toml"))
