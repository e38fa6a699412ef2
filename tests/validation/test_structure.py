"""Keys and vocabulary: each planted fault is named, and what other converters do otherwise is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gguf3n
from gguf3n.conversion import read_gguf, read_source
from gguf3n.errors import GGUFError
from gguf3n.formats.gguf_draft import Draft
from gguf3n.formats.gguf_reader import open_part
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.result import Verdict
from gguf3n.validation.structure import check_structure
from tests.validation.plant_keys import FAULTS, SCORES, TEMPLATE, TOKENS, TYPES, change, set_key, unset_key, values
from workshop.places import FIXTURES


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path) -> Part:
    return text_part(read_source(tiny_checkpoint))


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint in Q4_0. Not to be changed."""
    path = tmp_path_factory.mktemp("sound") / "tiny-Q4_0.gguf"
    gguf3n.convert(tiny_checkpoint, "Q4_0", path)
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "copy.gguf"))


def found(path: Path, source: Part) -> dict[str, str]:
    """What is said of each key."""
    result = check_structure(Candidate(path), source)
    return {problem.where: problem.what for problem in result.problems}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "text-only"},
        {"layout": "nested", "shards": 3},
        {"layout": "peft-prefix", "multimodal": True},
        {"tokenizer": "model"},
        {"tokenizer": "json", "shared_kv": False},
    ],
    ids=str,
)
def test_sound(options: dict[str, Any], sound: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A file of each source has no problem with its own source, nor has one that is made of another layout of it."""
    directory = make_checkpoint(**options)
    path = tmp_path / "own.gguf"
    gguf3n.convert(directory, "Q4_0", path)
    for each in (path, sound):
        result = check_structure(Candidate(each), text_part(read_source(directory)))
        assert result.problems == ()
        assert result.verdict is Verdict.PASS
        assert result.lint.n_checks > 0


def test_a_gguf_source(tiny_checkpoint: Path, sound: Path, tmp_path: Path) -> None:
    gguf3n.convert(tiny_checkpoint, "BF16", tmp_path / "bf16.gguf")
    assert check_structure(Candidate(sound), text_part(read_gguf(tmp_path / "bf16.gguf"))).problems == ()


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.structure])
def test_faults(name: str, copy: Path, source: Part) -> None:
    fault = FAULTS[name]
    fault.plant(copy)
    result = check_structure(Candidate(copy), source)
    assert fault.structure in {problem.where for problem in result.problems}
    assert result.verdict is (Verdict.WARN if "structure" in fault.warns else Verdict.FAIL)


@pytest.mark.parametrize("key", ["gemma3n.rope.freq_base", "gemma3n.attention.sliding_window_pattern"])
def test_a_key_without_items(key: str, copy: Path, source: Part) -> None:
    set_key(copy, key, "float32[]", [])
    assert found(copy, source)[key].endswith(" items, found 0")


def test_token_types_that_are_no_numbers(copy: Path, source: Part) -> None:
    set_key(copy, "tokenizer.ggml.token_type", "float32[]", [float("nan")] * 1088)
    assert "type -1 found" in found(copy, source)["tokenizer.ggml.token_type"]


def test_what_is_said(copy: Path, source: Part) -> None:
    """Expected and found, and where in an array."""
    for name in ("wrong rope base", "wrong sliding pattern", "shared_kv_layers off by one", "wrong sparsity"):
        FAULTS[name].plant(copy)
    said = found(copy, source)
    assert said["gemma3n.rope.freq_base"] == "expected 1000000, found 10000"
    assert said["gemma3n.attention.shared_kv_layers"] == "expected 2, found 3"
    sparsity = "expected 1.6448536, found 1.2815516 in layer 9; 1 of 22 layers differ"
    assert said["gemma3n.activation_sparsity_scale"] == sparsity
    pattern = "expected true, found false in layer 3; 10 of 22 layers differ"
    assert said["gemma3n.attention.sliding_window_pattern"] == pattern


def test_what_is_said_of_a_vocabulary(sound: Path, source: Part, tmp_path: Path) -> None:
    expected = values(sound, TOKENS)
    said = {}
    for name in ("vocabulary shifted up", "vocabulary shifted down", "a token's text", "two scores swapped"):
        path = Path(shutil.copy(sound, tmp_path / "copy.gguf"))
        FAULTS[name].plant(path)
        said[name] = found(path, source)
    up, down = (said[f"vocabulary shifted {way}"][TOKENS] for way in ("up", "down"))
    first = f"the first at id 494: {expected[494]!r} expected"
    assert up == f"tokens are shifted by 1 up from id 494 on; {first}, '<new>' found"
    assert down == f"tokens are shifted by 1 down from id 494 on; {first}, {expected[495]!r} found"
    at = expected.index("e")
    assert said["a token's text"][TOKENS] == f"1 token differs, the first at id {at}: 'e' expected, 'qqqq' found"
    swapped = said["two scores swapped"][SCORES]
    assert "2 tokens differ, the first at id 500" in swapped
    assert swapped.endswith("-500 expected, -800 found")


def test_several_token_texts(copy: Path, source: Part) -> None:
    change(TOKENS, "string[]", lambda old: [f"{t}qq" if 700 <= i < 717 else t for i, t in enumerate(old)])(copy)
    assert found(copy, source)[TOKENS].startswith("17 tokens differ, the first at id 700: ")


def test_as_llama_cpp_converts(copy: Path, source: Part) -> None:
    """The values that convert_hf_to_gguf.py wrote for the same checkpoint; long ones are kept as digests there."""
    written = json.loads((FIXTURES / "llama_cpp" / "tiny.json").read_text("utf-8"))["types"]["Q8_0"]
    names = [name[len("key ") : -len("/value")] for name in written if name.endswith("/value")]
    n = 0
    for name in names:
        value, kind = written[f"key {name}/value"], written[f"key {name}/type"]
        is_digest = kind.startswith(("array", "string")) and value[0] not in '["'
        if name.startswith(("gemma3n.", "tokenizer.")) and not is_digest:
            of = kind.removeprefix("array of ")
            set_key(copy, name, of if of == kind else f"{of}[]", json.loads(value))
            n += 1
    assert n > 20
    assert check_structure(Candidate(copy), source).problems == ()


def other_converters(path: Path) -> None:
    """What differs in sound files of llama.cpp, Unsloth and Ollama."""
    set_key(path, "general.name", "string", "Another name")
    set_key(path, "tokenizer.ggml.eos_token_id", "uint32", 106)
    set_key(path, "tokenizer.ggml.eot_token_id", "uint32", 106)
    set_key(path, "tokenizer.ggml.eos_token_ids", "int32[]", [1, 106])
    set_key(path, "tokenizer.ggml.add_sep_token", "bool", False)
    unset_key(path, "tokenizer.ggml.add_bos_token")
    unset_key(path, "tokenizer.ggml.add_eos_token")
    unset_key(path, "tokenizer.ggml.pre")
    set_key(path, "gemma3n.attention.head_count", "uint32[]", [4] * 22)
    set_key(path, "gemma3n.feed_forward_length", "uint32", 512)
    set_key(path, "gemma3n.rope.scaling.type", "string", "none")
    set_key(path, "gemma3n.altup.correct_scale", "bool", True)
    set_key(path, "gemma3n.attention.layer_norm_rms_epsilon", "float32", 1.0000001e-6)
    change("gemma3n.activation_sparsity_scale", "float32[]", lambda old: [v * (1 - 5e-8) for v in old])(path)
    change(SCORES, "float32[]", lambda old: [s / 2 - 7 if 494 <= i < 1016 else -1e3 for i, s in enumerate(old)])(path)
    change(TOKENS, "string[]", lambda old: [t.replace("[PAD", "<pad_") if i > 1024 else t for i, t in enumerate(old)])(
        path
    )
    template = open_part(path).value(TEMPLATE)
    set_key(path, TEMPLATE, "string", f"{template}\n\n")


def test_what_other_converters_do(copy: Path, source: Part) -> None:
    other_converters(copy)
    assert check_structure(Candidate(copy), source).problems == ()


def cut(path: Path, n_tokens: int) -> None:
    """So many tokens, and as many rows in both tables: what converters wrote in 2025."""
    draft = Draft(open_part(path))
    for i, tensor in enumerate(draft.tensors):
        if tensor.name in ("token_embd.weight", "per_layer_token_embd.weight"):
            n_bytes = tensor.n_bytes // tensor.shape[0] * n_tokens
            draft.tensors[i] = replace(tensor, shape=(n_tokens, tensor.shape[1]), n_source=n_bytes)
    draft.save()
    for key, kind in ((TOKENS, "string[]"), (SCORES, "float32[]"), (TYPES, "int32[]")):
        change(key, kind, lambda old: old[:n_tokens])(path)


def test_without_padding(tiny_checkpoint: Path, copy: Path, source: Part, tmp_path: Path) -> None:
    """1,024 tokens against 1,088 with padding, either way around; a token of text may not be missing."""
    cut(copy, 1024)
    assert check_structure(Candidate(copy), source).problems == ()
    short = tmp_path / "short.gguf"
    gguf3n.convert(tiny_checkpoint, "F16", short)
    cut(short, 1024)
    gguf3n.convert(tiny_checkpoint, "F16", tmp_path / "long.gguf")
    assert check_structure(Candidate(tmp_path / "long.gguf"), text_part(read_gguf(short))).problems == ()
    cut(copy, 1020)
    assert found(copy, source)[TOKENS] == "expected 1,088 tokens, found 1,020: '<unused101>' (token 1,020) is missing"


def test_marks_of_other_modalities_left_unnamed(copy: Path, source: Part) -> None:
    """A converter that did not read tokenizer_config.json has padding in their place."""
    change(TOKENS, "string[]", lambda old: [f"[PAD{i}]" if i >= 1024 else t for i, t in enumerate(old)])(copy)
    change(TYPES, "int32[]", lambda old: [5 if i >= 1024 else t for i, t in enumerate(old)])(copy)
    result = check_structure(Candidate(copy), source)
    assert [problem.where for problem in result.problems] == [TOKENS]
    assert result.verdict is Verdict.WARN


@pytest.mark.parametrize("n_bytes", [0, 100, 20_000])
def test_truncated(n_bytes: int, copy: Path, source: Part) -> None:
    copy.write_bytes(copy.read_bytes()[:n_bytes])
    result = check_structure(Candidate(copy), source)
    assert [problem.where for problem in result.problems] == ["unreadable"]
    assert result.verdict is Verdict.FAIL


def test_no_file(tmp_path: Path, source: Part) -> None:
    with pytest.raises(GGUFError, match="no such file"):
        check_structure(Candidate(tmp_path / "none.gguf"), source)
