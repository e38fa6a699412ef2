"""GGUF keys: names, value types and values, written down here a second time."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import LlamaFileType, TokenType

from gguf3n.errors import ConfigError
from gguf3n.formats.gguf_layout import KeyValue
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.gguf_writer import GGUFWriter, lay_out
from gguf3n.gemma3n.metadata import file_keys, general_keys, tokenizer_keys
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.gemma3n.source import open_source
from gguf3n.gemma3n.text import ARCH, KEYS, model_keys, sparsity_scales
from gguf3n.gemma3n.tokenizer import Vocabulary
from tests import micro

SLIDING = [True, True, True, True, False] * 6
SCALE = 1.6448535919189453  # icdf(0.95) as float32

E2B_KEYS: dict[str, tuple[str, Any]] = {
    "gemma3n.block_count": ("uint32", 30),
    "gemma3n.context_length": ("uint32", 32768),
    "gemma3n.embedding_length": ("uint32", 2048),
    "gemma3n.feed_forward_length": ("array of int32", [8192] * 30),
    "gemma3n.attention.head_count": ("uint32", 8),
    "gemma3n.attention.head_count_kv": ("uint32", 2),
    "gemma3n.rope.freq_base": ("float32", 1e6),
    "gemma3n.rope.freq_base_swa": ("float32", 1e4),
    "gemma3n.attention.layer_norm_rms_epsilon": ("float32", float(np.float32(1e-6))),
    "gemma3n.attention.key_length": ("uint32", 256),
    "gemma3n.attention.value_length": ("uint32", 256),
    "gemma3n.final_logit_softcapping": ("float32", 30.0),
    "gemma3n.attention.sliding_window": ("uint32", 512),
    "gemma3n.altup.active_idx": ("uint32", 0),
    "gemma3n.altup.num_inputs": ("uint32", 4),
    "gemma3n.embedding_length_per_layer_input": ("uint32", 256),
    "gemma3n.attention.shared_kv_layers": ("uint32", 10),
    "gemma3n.activation_sparsity_scale": ("array of float32", [SCALE] * 10 + [float("-inf")] * 20),
    "gemma3n.attention.sliding_window_pattern": ("array of bool", SLIDING),
}

VOCABULARY = Vocabulary(
    tokens=["<pad>", "é", "▁a"],
    scores=[-1000.0, 0.5, -2.0],
    types=[TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.NORMAL],
    special_ids={"bos": 2, "eos": 1, "unk": 0, "pad": 0, "eot": 1},
    add_tokens={"bos": True, "eos": False},
    chat_templates={"default": "{{ messages }}", "tool_use": "two", "rag": "three"},
    origin="tokenizer.model",
)

TOKENIZER_KEYS: dict[str, tuple[str, Any]] = {
    "tokenizer.ggml.model": ("string", "llama"),
    "tokenizer.ggml.pre": ("string", "default"),
    "tokenizer.ggml.tokens": ("array of string", ["<pad>", "é", "▁a"]),
    "tokenizer.ggml.scores": ("array of float32", [-1000.0, 0.5, -2.0]),
    "tokenizer.ggml.token_type": ("array of int32", [3, 4, 1]),
    "tokenizer.ggml.bos_token_id": ("uint32", 2),
    "tokenizer.ggml.eos_token_id": ("uint32", 1),
    "tokenizer.ggml.unknown_token_id": ("uint32", 0),
    "tokenizer.ggml.padding_token_id": ("uint32", 0),
    "tokenizer.ggml.eot_token_id": ("uint32", 1),
    "tokenizer.ggml.add_bos_token": ("bool", True),
    "tokenizer.ggml.add_eos_token": ("bool", False),
    "tokenizer.ggml.add_space_prefix": ("bool", False),
    "tokenizer.chat_template": ("string", "{{ messages }}"),
    "tokenizer.chat_templates": ("array of string", ["rag", "tool_use"]),
    "tokenizer.chat_template.rag": ("string", "three"),
    "tokenizer.chat_template.tool_use": ("string", "two"),
}


def part_of(directory: Path) -> Part:
    """The text model of a checkpoint."""
    return text_part(open_source(directory))


def written(keys: list[KeyValue], directory: Path) -> dict[str, tuple[str, Any]]:
    """Keys as a reader finds them: type and value by name."""
    path = directory / "keys.gguf"
    with GGUFWriter(path, lay_out(keys, []), force=True) as writer:
        writer.commit()
    file = open_gguf(path)
    return {name: (key.type_name, file.value(name)) for name, key in file.keys.items()}


def test_the_keys_of_the_model(tmp_path: Path) -> None:
    assert written(model_keys(PUBLISHED["E2B"]), tmp_path) == E2B_KEYS


def test_every_key_is_in_the_table_once() -> None:
    assert len({key.name for key in KEYS}) == len(KEYS) == len(E2B_KEYS)


def test_the_keys_of_e4b_differ_in_size_only(tmp_path: Path) -> None:
    keys = written(model_keys(PUBLISHED["E4B"]), tmp_path)
    changed = {name: value for name, (_, value) in keys.items() if value != E2B_KEYS[name][1]}
    assert changed == {
        "gemma3n.block_count": 35,
        "gemma3n.feed_forward_length": [16384] * 35,
        "gemma3n.attention.shared_kv_layers": 15,
        "gemma3n.activation_sparsity_scale": [SCALE] * 10 + [float("-inf")] * 25,
        "gemma3n.attention.sliding_window_pattern": [*SLIDING, True, True, True, True, False],
    }
    assert {name: kind for name, (kind, _) in keys.items()} == {name: kind for name, (kind, _) in E2B_KEYS.items()}


@pytest.mark.parametrize(
    ("share", "scale"), [(0.95, 1.6448536), (0.5, 0.0), (0.0, float("-inf")), (0.9, 1.2815516), (0.1, -1.2815516)]
)
def test_sparsity_becomes_standard_deviations(share: float, scale: float) -> None:
    config = replace(PUBLISHED["E2B"], activation_sparsity_pattern=(share,))
    assert sparsity_scales(config) == pytest.approx([scale], abs=1e-7)


def test_the_keys_of_the_tokenizer(tmp_path: Path) -> None:
    assert written(tokenizer_keys(VOCABULARY), tmp_path) == TOKENIZER_KEYS


def test_what_the_tokenizer_does_not_say_is_not_written(tmp_path: Path) -> None:
    keys = written(tokenizer_keys(replace(VOCABULARY, special_ids={}, add_tokens={}, chat_templates={})), tmp_path)
    assert sorted(keys) == [
        "tokenizer.ggml.add_space_prefix",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.tokens",
    ]


@pytest.mark.parametrize(
    ("ftype", "number"),
    [(LlamaFileType.ALL_F32, 0), (LlamaFileType.MOSTLY_Q8_0, 7), (LlamaFileType.MOSTLY_BF16, 32)],
    ids=["F32", "Q8_0", "BF16"],
)
def test_the_keys_of_the_file(tmp_path: Path, ftype: LlamaFileType, number: int) -> None:
    assert written(file_keys(ftype), tmp_path) == {
        "general.quantization_version": ("uint32", 2),
        "general.file_type": ("uint32", number),
    }


# general keys

N_WEIGHTS = 4_456_156_768

CARD = """\
---
license: gemma
base_model: google/gemma-3n-E2B-it
pipeline_tag: text-generation
language: [en, no]
tags: [mine]
---
# A model
"""


def general(
    directory: Path, readme: str | None = None, generation: str | None = None, repo_id: str | None = None
) -> dict[str, tuple[str, Any]]:
    """The general keys of a directory with these files."""
    directory.mkdir(exist_ok=True)
    micro.write_json(directory / "config.json", micro.config())
    for name, text in (("README.md", readme), ("generation_config.json", generation)):
        if text is not None:
            (directory / name).write_text(text, "utf-8")
    return written(general_keys(directory, repo_id, ARCH, N_WEIGHTS), directory)


def test_the_general_keys(tmp_path: Path) -> None:
    generation = (
        '{"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "do_sample": true, "eos_token_id": [1]}'
    )
    assert general(tmp_path / "gemma-3n-E2B-it", CARD, generation) == {
        "general.architecture": ("string", "gemma3n"),
        "general.type": ("string", "model"),
        "general.sampling.top_k": ("int32", 64),
        "general.sampling.top_p": ("float32", float(np.float32(0.95))),
        "general.sampling.min_p": ("float32", 0.0),
        "general.sampling.temp": ("float32", 1.0),
        "general.name": ("string", "Gemma 3n E2B It"),
        "general.basename": ("string", "gemma"),
        "general.finetune": ("string", "3n-E2B-it"),
        "general.size_label": ("string", "4.5B"),
        "general.license": ("string", "gemma"),
        "general.base_model.count": ("uint32", 1),
        "general.base_model.0.name": ("string", "Gemma 3n E2B It"),
        "general.base_model.0.organization": ("string", "Google"),
        "general.base_model.0.repo_url": ("string", "https://huggingface.co/google/gemma-3n-E2B-it"),
        "general.tags": ("array of string", ["mine", "text-generation"]),
        "general.languages": ("array of string", ["en", "no"]),
    }


def test_the_least_there_is(tmp_path: Path) -> None:
    assert general(tmp_path / "mine") == {
        "general.architecture": ("string", "gemma3n"),
        "general.type": ("string", "model"),
        "general.name": ("string", "Mine"),
        "general.size_label": ("string", "4.5B"),
    }


def test_the_architecture_stands_first(tmp_path: Path) -> None:
    assert next(iter(general(tmp_path / "mine", CARD))) == "general.architecture"


def test_a_hub_id_says_the_name(tmp_path: Path) -> None:
    """The directory is a snapshot, named like a commit."""
    keys = general(tmp_path / ("0123456789abcdef" * 2), CARD, repo_id="someone/gemma-3n-E4B-cooking")
    assert keys["general.name"] == ("string", "Gemma 3n E4B Cooking")
    assert keys["general.finetune"] == ("string", "3n-E4B-cooking")


@pytest.mark.parametrize("spelling", [".", "../mine", "./", "../mine/."])
def test_the_spelling_of_a_path_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    micro.make(tmp_path / "mine")
    expected = part_of(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    model = part_of(Path(spelling))
    assert (model.source.name, model.keys) == (expected.source.name, expected.keys)
    assert model.source.name == "mine"


def test_a_link_has_the_name_that_was_given(tmp_path: Path) -> None:
    micro.make(tmp_path / "data")
    (tmp_path / "mine").symlink_to(tmp_path / "data")
    model = part_of(tmp_path / "mine")
    assert model.source.name == "mine"
    assert {key.name: key.value for key in model.keys}["general.name"] == "Mine"


@pytest.mark.parametrize(
    ("front_matter", "key", "value"),
    [
        ("version: 1.0", "general.version", ("string", "1.0")),
        ("version: 2025-06-26", "general.version", ("string", "2025-06-26")),
        ("license: [gemma, mit]", "general.license", ("string", "gemma,mit")),
        ("tags: [2025, a]", "general.tags", ("array of string", ["2025", "a"])),
        ("tags: [null, a]", "general.tags", ("array of string", ["a"])),
        ("tags: one", "general.tags", ("array of string", ["one"])),
        ("language:\n- no\n- de", "general.languages", ("array of string", ["no", "de"])),
        ("name: 3", "general.name", ("string", "3")),
        ("name: naïve 🙂", "general.name", ("string", "naïve 🙂")),
    ],
)
def test_values_of_yamls_own_types(tmp_path: Path, front_matter: str, key: str, value: tuple[str, Any]) -> None:
    assert general(tmp_path / "mine", f"---\n{front_matter}\n---\n")[key] == value


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "# No front matter",
        "---\n---\n",
        "---\n- a list\n---\n",
        "---\ntags: []\nlanguage:\n---\n",
        "---\nunclosed: 1\n",
    ],
    ids=["empty", "none", "empty-front-matter", "list", "empty-values", "unclosed"],
)
def test_a_model_card_that_says_nothing(tmp_path: Path, readme: str) -> None:
    assert general(tmp_path / "mine", readme) == general(tmp_path / "mine", "")


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\na: [\n---\n", "ParserError"),
        ("---\na: {b\n---\n", "ParserError"),
        ("---\na: !!python/object:os.system 1\n---\n", "ConstructorError"),
        ("---\nbase_model: [1, {}]\nlicense: [1]\n---\n", "TypeError"),
    ],
    ids=["list", "mapping", "python-object", "license-of-numbers"],
)
def test_a_model_card_that_cannot_be_read(tmp_path: Path, readme: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        general(tmp_path / "mine", readme)
    assert caught.value.exit_code == 4
    assert caught.value.what == f"{tmp_path / 'mine' / 'README.md'}: the model card can't be read"
    assert caught.value.found is not None
    assert caught.value.found.startswith(found)
    assert "\n" not in caught.value.found


@pytest.mark.parametrize(
    ("generation", "what"),
    [
        ("{", "generation_config.json: not JSON"),
        ("[]", "generation_config.json: not a JSON object"),
        ('{"temperature": "1.0"}', "generation_config.json: temp is impossible"),
        ('{"temperature": 1e39}', "generation_config.json: temp is impossible"),
        ('{"top_k": 64.5}', "generation_config.json: top_k is impossible"),
        ('{"top_k": 4294967296}', "generation_config.json: top_k is impossible"),
        ('{"top_p": [0.95]}', "generation_config.json: top_p is impossible"),
    ],
)
def test_a_generation_config_that_cannot_be_used(tmp_path: Path, generation: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        general(tmp_path / "mine", None, generation)
    assert caught.value.what == f"{tmp_path / 'mine'}{os.sep}{what}"


def test_sampling_values_may_be_null(tmp_path: Path) -> None:
    keys = general(tmp_path / "mine", None, '{"temperature": null, "top_k": null}')
    assert not [name for name in keys if name.startswith("general.sampling")]


def test_whole_numbers_for_fractions(tmp_path: Path) -> None:
    assert general(tmp_path / "mine", None, '{"temperature": 1}')["general.sampling.temp"] == ("float32", 1.0)


# the whole


def test_no_key_is_written_twice_and_every_value_fits_its_type(tmp_path: Path) -> None:
    keys = part_of(micro.make(tmp_path / "mine", readme=CARD)).keys
    assert len({key.name for key in keys}) == len(keys)
    assert struct.unpack("<Q", lay_out(keys, []).header[16:24]) == (len(keys),)
