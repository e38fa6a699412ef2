"""The fixtures and the scripts that make them: the same bytes again, Gemma's ids, every layout the same model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from safetensors import safe_open

from workshop import checkpoints, small_tokenizer
from workshop.checkpoints import CONFIGS, INVENTORIES, LAYOUTS, Options, read_inventory
from workshop.places import FIXTURES

TEXTS = [(FIXTURES / "text" / name).read_text("utf-8") for name in small_tokenizer.TEXTS]


def header_of(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__")
    return header


# inventories and configs


@pytest.mark.parametrize(
    ("size", "n_tensors", "n_text", "n_parameters"),
    [
        ("e2b", 1556, 727 + 4, 4_456_156_768),
        ("e4b", 1676, 847 + 4, 6_866_696_688),
    ],
)
def test_inventory_is_complete(size: str, n_tensors: int, n_text: int, n_parameters: int) -> None:
    """GGUF stacks 2 x 3 AltUp projections into two tensors, so the text model has four more here than there."""
    shapes = read_inventory(INVENTORIES / f"gemma-3n-{size}.json")
    text = {name: shape for name, shape in shapes.items() if name.startswith(checkpoints.PUBLISHED)}
    assert len(shapes) == n_tensors
    assert len(text) == n_text
    assert sum(int(np.prod(shape, dtype=np.int64)) for shape in text.values()) == n_parameters


def test_expand() -> None:
    assert list(checkpoints.expand("a.{0..2,7,9..13..2}.b")) == [f"a.{i}.b" for i in (0, 1, 2, 7, 9, 11, 13)]
    assert list(checkpoints.expand("a.b")) == ["a.b"]


@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_config_fits_inventory(size: str) -> None:
    text = json.loads((CONFIGS / f"gemma-3n-{size}.json").read_text("utf-8"))["text_config"]
    shapes = read_inventory(INVENTORIES / f"gemma-3n-{size}.json")
    for i, width in enumerate(text["intermediate_size"]):
        assert shapes[f"model.language_model.layers.{i}.mlp.up_proj.weight"] == (width, text["hidden_size"])
    assert shapes["model.language_model.embed_tokens_per_layer.weight"] == (
        text["vocab_size_per_layer_input"],
        text["num_hidden_layers"] * text["hidden_size_per_layer_input"],
    )
    assert len(text["layer_types"]) == len(text["activation_sparsity_pattern"]) == text["num_hidden_layers"]


# tokenizer


def test_tokenizer_is_reproducible() -> None:
    made = small_tokenizer.tokenizer_files(small_tokenizer.train(), small_tokenizer.BEYOND_PIECES)
    assert made == {path.name: path.read_bytes() for path in (FIXTURES / "tokenizer").iterdir()}


def test_tokenizer_has_gemmas_ids() -> None:
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(FIXTURES / "tokenizer" / "tokenizer.model"))
    ids = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 6: "<unused0>", 105: "<start_of_turn>"}
    ids |= {106: "<end_of_turn>", 107: "\n", 138: "▁▁", 168: "<table>", 237: "</footer>", 238: "<0x00>", 493: "<0xFF>"}
    assert {i: tokenizer.id_to_piece(i) for i in ids} == ids
    assert tokenizer.vocab_size() == 1024
    assert [tokenizer.get_score(i) for i in range(1024)] == [-float(i) for i in range(1024)]


@pytest.mark.parametrize("text", [*TEXTS, "   three  spaces\n\n\n\ttab", "<start_of_turn>user\nhi<end_of_turn>\n", ""])
def test_both_tokenizers_agree(text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    one = sentencepiece.SentencePieceProcessor(model_file=str(FIXTURES / "tokenizer" / "tokenizer.model"))
    other = tokenizers.Tokenizer.from_file(str(FIXTURES / "tokenizer" / "tokenizer.json"))
    assert other.encode(text).ids == [2, *one.encode(text)]
    assert other.decode(one.encode(text), skip_special_tokens=False) == text


def test_tokens_of_the_other_modalities() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FIXTURES / "tokenizer" / "tokenizer.json"))
    config = checkpoints.tiny_config()
    named = {"image": "image_soft_token", "audio": "audio_soft_token", "boi": "start_of_image", "boa": "start_of_audio"}
    named |= {"eoi": "end_of_image", "eoa": "end_of_audio"}
    for key, name in named.items():
        assert tokenizer.token_to_id(f"<{name}>") == config[f"{key}_token_id"]


def test_full_size_tokenizer() -> None:
    files = checkpoints.full_size_tokenizer()
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    ids = {1: "<eos>", 106: "<end_of_turn>", 493: "<0xFF>", 255999: "<start_of_image>", 256000: "<start_of_audio>"}
    assert tokenizer.vocab_size() == 262144
    assert {i: tokenizer.id_to_piece(i) for i in ids} == ids
    assert max(tokenizer.encode(TEXTS[0])) > 1024  # the long words' letters have moved to the end
    assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]


# checkpoints


def test_same_options_same_bytes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    checkpoints.make(tmp_path, Options())
    one, other = ({path.name: path.read_bytes() for path in d.iterdir()} for d in (tmp_path, tiny_checkpoint))
    assert one == other


def test_seed_changes_the_weights(make_checkpoint: Callable[..., Path], tiny_checkpoint: Path) -> None:
    one, other = (d / "model.safetensors" for d in (tiny_checkpoint, make_checkpoint(seed=1)))
    assert header_of(one) == header_of(other)
    assert one.read_bytes() != other.read_bytes()


def test_rows_differ_but_for_the_pad_rows(make_checkpoint: Callable[..., Path]) -> None:
    """In float32: rounded to BF16, two rows of the smallest matrices may meet."""
    with safe_open(make_checkpoint(dtype="f32") / "model.safetensors", "numpy") as file:
        for name in file.keys():  # noqa: SIM118 (the file is no mapping)
            values = file.get_tensor(name)
            assert np.isfinite(values).all()
            if name.endswith("embed_tokens.weight"):
                assert (values[1024:] == values[0]).all()
                values = values[:1024]
            assert len(np.unique(values, axis=0)) == len(values), name


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "published"])
def test_layouts_hold_the_same_tensors(layout: str, make_checkpoint: Callable[..., Path]) -> None:
    published = make_checkpoint(multimodal=True) / "model.safetensors"
    other = make_checkpoint(layout=layout, multimodal=True) / "model.safetensors"
    expected = {checkpoints.rename(name, layout): entry for name, entry in header_of(published).items()}
    assert header_of(other) == expected
    size = max(entry["data_offsets"][1] for entry in expected.values())
    assert other.read_bytes()[-size:] == published.read_bytes()[-size:]


def test_shards(make_checkpoint: Callable[..., Path], tiny_checkpoint: Path) -> None:
    directory = make_checkpoint(shards=3)
    index = json.loads((directory / "model.safetensors.index.json").read_text("utf-8"))
    entries = {}
    for i in (1, 2, 3):
        name = f"model-0000{i}-of-00003.safetensors"
        header = header_of(directory / name)
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == set(header)
        entries |= header
    whole = header_of(tiny_checkpoint / "model.safetensors")
    one, other = ({name: entry["shape"] for name, entry in header.items()} for header in (entries, whole))
    assert one == other
    assert index["metadata"]["total_size"] == max(entry["data_offsets"][1] for entry in whole.values())


def test_as_transformers_5_saves(make_checkpoint: Callable[..., Path], tiny_checkpoint: Path) -> None:
    directory = make_checkpoint(shared_kv=False, tokenizer="json")
    missing = set(header_of(tiny_checkpoint / "model.safetensors")) - set(header_of(directory / "model.safetensors"))
    parts = ("k_norm", "k_proj", "v_proj")
    assert missing == {f"model.language_model.layers.{i}.self_attn.{part}.weight" for i in (20, 21) for part in parts}
    text = json.loads((directory / "config.json").read_text("utf-8"))["text_config"]
    assert text["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert "rope_theta" not in text
    assert not (directory / "tokenizer.model").exists()
