"""Tokenizer files to vocabulary: both kinds of files, what does not fit, what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import TokenType
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from gguf3n.errors import TokenizerError
from gguf3n.gemma3n.config import Config, parse_config
from gguf3n.gemma3n.tokenizer import ADDED_SCORE, UNUSED_SCORE, Vocabulary, read_vocabulary
from tests import micro
from workshop import checkpoints

CONFIG = parse_config(micro.config(), Path("config.json"))
"""1,024 text tokens, 1,088 in all."""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """All tokenizer files beside a config.json, to be changed."""
    shutil.copytree(checkpoints.TOKENIZER, tmp_path, dirs_exist_ok=True)
    micro.write_json(tmp_path / "config.json", micro.config())
    return tmp_path


def read(directory: Path, config: Config = CONFIG) -> Vocabulary:
    return read_vocabulary(directory, config)


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place; the function changes its argument or returns something else."""
    value = micro.read_json(path)
    micro.write_json(path, change(value) or value)


TOKENS: list[tuple[int, str, float, TokenType]] = [
    (0, "<pad>", ADDED_SCORE, TokenType.CONTROL),
    (3, "<unk>", ADDED_SCORE, TokenType.CONTROL),
    (4, "<mask>", ADDED_SCORE, TokenType.CONTROL),  # not marked as special, but looks like it
    (5, "[multimodal]", ADDED_SCORE, TokenType.USER_DEFINED),
    (6, "<unused0>", ADDED_SCORE, TokenType.CONTROL),
    (106, "<end_of_turn>", ADDED_SCORE, TokenType.CONTROL),
    (108, "\n\n", ADDED_SCORE, TokenType.USER_DEFINED),
    (140, "    ", ADDED_SCORE, TokenType.USER_DEFINED),  # four "▁" in the files
    (237, "</footer>", ADDED_SCORE, TokenType.USER_DEFINED),
    (238, "<0x00>", -238.0, TokenType.BYTE),
    (493, "<0xFF>", -493.0, TokenType.BYTE),
    (494, "▁t", -494.0, TokenType.NORMAL),
    (1015, "£", -1015.0, TokenType.NORMAL),
    (1023, "<unused104>", ADDED_SCORE, TokenType.CONTROL),
    (1024, "<end_of_image>", ADDED_SCORE, TokenType.CONTROL),
    (1026, "[PAD1026]", UNUSED_SCORE, TokenType.UNUSED),
    (1087, "[PAD1087]", UNUSED_SCORE, TokenType.UNUSED),
]


def facts(vocabulary: Vocabulary) -> Vocabulary:
    """Everything but the file it came from."""
    return replace(vocabulary, origin="")


@pytest.mark.parametrize("left_out", ["tokenizer.json", "tokenizer.model", None], ids=["model", "json", "both"])
def test_what_each_token_becomes(files: Path, left_out: str | None) -> None:
    if left_out is not None:
        (files / left_out).unlink()
    vocabulary = read(files)
    assert len(vocabulary.tokens) == len(vocabulary.scores) == len(vocabulary.types) == 1088
    for i, token, score, kind in TOKENS:
        assert (vocabulary.tokens[i], vocabulary.scores[i], vocabulary.types[i]) == (token, score, kind)
    assert vocabulary.special_ids == {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    assert vocabulary.add_tokens["bos"] is True
    assert vocabulary.add_tokens["eos"] is False
    assert vocabulary.chat_templates == {"default": (files / "chat_template.jinja").read_text("utf-8")}
    assert vocabulary.origin == str(files / ("tokenizer.json" if left_out == "tokenizer.model" else "tokenizer.model"))


def test_tokenizer_json_gives_the_vocabulary_of_tokenizer_model(files: Path) -> None:
    both = read(files)
    (files / "tokenizer.model").unlink()
    assert facts(read(files)) == facts(both)


def test_the_files_of_transformers_5(files: Path) -> None:
    """Its tokenizer_config.json has no added_tokens_decoder, and there is no tokenizer.model."""
    before = read(files)
    (files / "tokenizer.model").unlink()
    change_json(files / "tokenizer_config.json", lambda raw: raw.pop("added_tokens_decoder") and None)
    assert facts(read(files)) == facts(before)


def test_old_spelling_of_merges(files: Path) -> None:
    """Strings with one space before transformers 4.45, pairs since."""
    (files / "tokenizer.model").unlink()
    before = read(files)

    def join(raw: dict[str, Any]) -> None:
        raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]

    change_json(files / "tokenizer.json", join)
    assert read(files) == before


def test_the_order_of_merges_decides_where_ids_do_not(files: Path) -> None:
    """Pieces that are merged first must have the higher scores, whatever their ids."""
    (files / "tokenizer.model").unlink()
    before = read(files)

    def swap(raw: dict[str, Any]) -> None:
        vocab = raw["model"]["vocab"]
        vocab["▁t"], vocab["▁wh"] = vocab["▁wh"], vocab["▁t"]

    change_json(files / "tokenizer.json", swap)
    after = read(files)
    assert (after.tokens[494], after.tokens[600]) == ("▁wh", "▁t")
    assert (after.scores[600], after.scores[494]) == (before.scores[494], before.scores[600])
    assert sorted(after.scores) == sorted(before.scores)


# added tokens


def test_added_tokens_json_names_ids_that_nothing_else_does(files: Path) -> None:
    """Written by old fine-tuning programs; what the other files say of an id decides."""
    micro.write_json(files / "added_tokens.json", {"<new>": 1050, "<|im_start|>": 1051, "not this": 106})
    vocabulary = read(files)
    assert (vocabulary.tokens[1050], vocabulary.types[1050]) == ("<new>", TokenType.USER_DEFINED)
    assert (vocabulary.tokens[1051], vocabulary.types[1051]) == ("<|im_start|>", TokenType.CONTROL)
    assert vocabulary.tokens[106] == "<end_of_turn>"


def add_token(i: int, content: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        def add(raw: dict[str, Any]) -> None:
            raw["added_tokens_decoder"][str(i)] = {"content": content, "special": False}

        change_json(directory / "tokenizer_config.json", add)

    return change


def test_an_added_token_within_the_vocabulary(files: Path) -> None:
    add_token(1087, "▁my▁token")(files)
    vocabulary = read(files)
    assert (vocabulary.tokens[1087], vocabulary.types[1087]) == (" my token", TokenType.USER_DEFINED)


# what does not fit

MISFITS: dict[str, tuple[Config, Callable[[Path], None], tuple[str, ...]]] = {
    # config, change, what the message must say
    "more pieces than tokens": (
        replace(CONFIG, vocab_size=1000, vocab_size_per_layer_input=1000),
        lambda directory: None,
        ("tokenizer.model", "at most 1,000", "a piece with id 1,023"),
    ),
    "fewer pieces than text tokens": (
        replace(CONFIG, vocab_size=4096, vocab_size_per_layer_input=4000),
        lambda directory: None,
        ("tokenizer.model", "a piece for each of 4,000", "no piece for 2,972 ids, the first 1026"),
    ),
    "an added token beyond": (CONFIG, add_token(1088, "<x>"), ("added token '<x>' with id 1088", "at most 1,088")),
    "an added token below zero": (CONFIG, add_token(-1, "<x>"), ("added token '<x>' with id -1",)),
    "the tokenizer of another model": (
        replace(CONFIG, vocab_size=262400, vocab_size_per_layer_input=262144),
        lambda directory: (directory / "tokenizer.model").unlink(),
        ("tokenizer.json", "a piece for each of 262,144", "saved with this model"),
    ),
}


@pytest.mark.parametrize(("config", "change", "said"), MISFITS.values(), ids=MISFITS)
def test_a_vocabulary_that_does_not_fit(
    files: Path, config: Config, change: Callable[[Path], None], said: tuple[str, ...]
) -> None:
    change(files)
    with pytest.raises(TokenizerError) as caught:
        read(files, config)
    assert caught.value.exit_code == 7
    assert str(files) in caught.value.what
    assert "does not fit config.json" in caught.value.what
    for text in said:
        assert text in str(caught.value)


def test_no_tokenizer(files: Path) -> None:
    (files / "tokenizer.model").unlink()
    (files / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="no tokenizer") as caught:
        read(files)
    assert caught.value.what.startswith(str(files))
    assert "tokenizer.model or tokenizer.json" in str(caught.value)


# broken files


def contents(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A change of a JSON file; the function may return another value, or change the argument."""
    return lambda directory: change_json(directory / name, change)


def bpe(**change: Any) -> Callable[[Path], None]:
    """tokenizer.json with another model, and no tokenizer.model beside it."""

    def apply(directory: Path) -> None:
        (directory / "tokenizer.model").unlink()
        change_json(directory / "tokenizer.json", lambda raw: raw["model"].update(change))

    return apply


def json_only(content: bytes) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / "tokenizer.model").unlink()
        (directory / "tokenizer.json").write_bytes(content)

    return apply


SPM = (checkpoints.TOKENIZER / "tokenizer.model").read_bytes()
CONFIG_NAME = "tokenizer_config.json"

BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    # change, what the message must say
    "tokenizer.model empty": (contents("tokenizer.model", b""), ("tokenizer.model", "not a sentencepiece model")),
    "tokenizer.model cut off": (contents("tokenizer.model", SPM[:5000]), ("tokenizer.model", "not a sentencepiece")),
    "tokenizer.model a pointer of Git LFS": (
        contents("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4696020\n"),
        ("tokenizer.model", "not a sentencepiece model", "download the file again"),
    ),
    "tokenizer.json not JSON": (json_only(b"{"), ("tokenizer.json", "not JSON")),
    "tokenizer.json empty": (json_only(b""), ("tokenizer.json", "not JSON")),
    "tokenizer.json a list": (json_only(b"[]"), ("tokenizer.json", "not a JSON object")),
    "tokenizer.json too deep": (json_only(b"[" * 100_000), ("tokenizer.json", "not JSON")),
    "tokenizer.json without a model": (json_only(b"{}"), ("tokenizer.json", "not the tokenizer of a Gemma")),
    "model a string": (json_only(b'{"model": "BPE"}'), ("not the tokenizer of a Gemma",)),
    "model a list": (json_only(b'{"model": []}'), ("not the tokenizer of a Gemma",)),
    "unigram": (bpe(type="Unigram", vocab=[["<pad>", 0.0], ["a", -1.5]], merges=[]), ("not the tokenizer of a Gemma",)),
    "WordPiece": (bpe(type="WordPiece"), ("BPE model with byte fallback", "WordPiece")),
    "byte-level BPE": (bpe(byte_fallback=False), ("BPE model with byte fallback", "byte_fallback False")),
    "no vocabulary": (bpe(vocab={}, merges=[]), ("not the tokenizer of a Gemma",)),
    "vocabulary null": (bpe(vocab=None), ("not the tokenizer of a Gemma",)),
    "id a string": (bpe(vocab={"a": "0"}, merges=[]), ("not the tokenizer of a Gemma",)),
    "id a fraction": (bpe(vocab={"a": 0.5}, merges=[]), ("not the tokenizer of a Gemma",)),
    "id infinite": (bpe(vocab={"a": float("inf")}, merges=[]), ("not the tokenizer of a Gemma",)),
    "id below zero": (bpe(vocab={"a": 0, "b": -1}, merges=[]), ("not the tokenizer of a Gemma", "negative")),
    "id of two pieces": (bpe(vocab={"a": 0, "b": 0}, merges=[]), ("not the tokenizer of a Gemma", "shared")),
    "a gap in the ids": (bpe(vocab={"a": 0, "b": 2000}, merges=[]), ("does not fit", "a piece with id 2,000")),
    "merges null": (bpe(merges=None), ("not the tokenizer of a Gemma",)),
    "merges of numbers": (bpe(merges=[1, 2]), ("not the tokenizer of a Gemma",)),
    "a merge of numbers": (bpe(merges=[[1, 2]]), ("not the tokenizer of a Gemma",)),
    "a merge of nothing known": (bpe(merges=[["no", "such"]]), ("not the tokenizer of a Gemma", "nosuch")),
    "unknown token a list": (bpe(unk_token=["<unk>"]), ("not the tokenizer of a Gemma",)),
    "added tokens not JSON": (contents("added_tokens.json", b"<"), ("added_tokens.json", "not JSON")),
    "added tokens a list": (contents("added_tokens.json", b"[]"), ("added_tokens.json", "not a JSON object")),
    "added tokens without ids": (contents("added_tokens.json", b'{"a": null}'), ("added_tokens.json", "malformed")),
    "added tokens of infinite ids": (
        contents("added_tokens.json", b'{"a": 1e999}'),
        ("added_tokens.json", "malformed"),
    ),
    "config not JSON": (contents(CONFIG_NAME, b"{"), (CONFIG_NAME, "not JSON")),
    "config a list": (contents(CONFIG_NAME, b"[]"), (CONFIG_NAME, "not a JSON object")),
    "decoder a list": (
        edited(CONFIG_NAME, lambda raw: raw | {"added_tokens_decoder": [1]}),
        (CONFIG_NAME, "malformed"),
    ),
    "decoder of other keys": (
        edited(CONFIG_NAME, lambda raw: raw | {"added_tokens_decoder": {"x": {"content": "a"}}}),
        (CONFIG_NAME, "malformed"),
    ),
    "decoder of strings": (
        edited(CONFIG_NAME, lambda raw: raw | {"added_tokens_decoder": {"5": "a"}}),
        (CONFIG_NAME, "malformed"),
    ),
    "decoder without content": (
        edited(CONFIG_NAME, lambda raw: raw | {"added_tokens_decoder": {"5": {"special": True}}}),
        (CONFIG_NAME, "malformed"),
    ),
    "post-processor of another shape": (
        edited("tokenizer.json", lambda raw: raw | {"post_processor": 5}),
        (CONFIG_NAME, "tokenizer.json", "malformed"),
    ),
    "chat templates without names": (
        edited(CONFIG_NAME, lambda raw: raw | {"chat_template": [{"template": "x"}]}),
        (CONFIG_NAME, "malformed"),
    ),
    "chat templates of numbers": (
        edited(CONFIG_NAME, lambda raw: raw | {"chat_template": [1]}),
        (CONFIG_NAME, "malformed"),
    ),
    "chat template not UTF-8": (contents("chat_template.jinja", b"\xff"), ("malformed",)),
}


@pytest.mark.parametrize(("change", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file(files: Path, change: Callable[[Path], None], said: tuple[str, ...]) -> None:
    change(files)
    with pytest.raises(TokenizerError) as caught:
        read(files)
    assert str(files) in caught.value.what
    for text in said:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 1000


# chat templates


def without_template(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


def in_a_json_file(directory: Path) -> None:
    without_template(directory)
    micro.write_json(directory / "chat_template.json", {"chat_template": "from json"})


def in_the_config(directory: Path) -> None:
    without_template(directory)
    change_json(directory / CONFIG_NAME, lambda raw: raw | {"chat_template": "from config"})


def several(directory: Path) -> None:
    entries = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    without_template(directory)
    change_json(directory / CONFIG_NAME, lambda raw: raw | {"chat_template": entries})


def only_named(directory: Path) -> None:
    without_template(directory)
    change_json(directory / CONFIG_NAME, lambda raw: raw | {"chat_template": [{"name": "rag", "template": "two"}]})


def in_both(directory: Path) -> None:
    change_json(directory / CONFIG_NAME, lambda raw: raw | {"chat_template": "from config"})


def in_a_file_alone(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("alone")
    (directory / CONFIG_NAME).unlink()


@pytest.mark.parametrize(
    ("change", "templates"),
    [
        (in_a_file_alone, {"default": "alone"}),
        (in_a_json_file, {"default": "from json"}),
        (in_the_config, {"default": "from config"}),
        (in_both, {"default": "from config"}),
        (several, {"default": "one", "tool_use": "two"}),
        (only_named, {"rag": "two"}),
        (without_template, {}),
    ],
    ids=[
        "chat_template.jinja-alone",
        "chat_template.json",
        "tokenizer_config.json",
        "config-before-file",
        "several",
        "only-named",
        "none",
    ],
)
def test_where_the_chat_template_is(files: Path, change: Callable[[Path], None], templates: dict[str, str]) -> None:
    change(files)
    assert read(files).chat_templates == templates


# special ids


@pytest.mark.parametrize(
    ("config_json", "ids"),
    [
        ({"eos_token_id": 106}, {"pad": 0, "eos": 1, "bos": 2, "unk": 3}),
        ({"text_config": {"sep_token_id": 5}}, {"pad": 0, "eos": 1, "bos": 2, "unk": 3, "sep": 5}),
        ({"sep_token_id": 99999}, {"pad": 0, "eos": 1, "bos": 2, "unk": 3}),
    ],
    ids=["tokenizer-before-config", "from-text-config", "out-of-range"],
)
def test_special_ids(files: Path, config_json: dict[str, Any], ids: dict[str, int]) -> None:
    (files / "config.json").write_text(json.dumps(config_json))
    assert read(files).special_ids == ids


def test_tokenizer_model_alone(files: Path) -> None:
    """It names its begin and end tokens, and its user-defined pieces are known without added_tokens_decoder."""
    for path in files.iterdir():
        if path.name != "tokenizer.model":
            path.unlink()
    vocabulary = read(files)
    assert vocabulary.special_ids == {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    model = ModelProto()
    model.ParseFromString((files / "tokenizer.model").read_bytes())
    defined = [i for i, piece in enumerate(model.pieces) if piece.type == TokenType.USER_DEFINED]
    assert {vocabulary.types[i] for i in defined} == {TokenType.USER_DEFINED, TokenType.CONTROL}
    assert vocabulary.types[vocabulary.tokens.index("<start_of_turn>")] == TokenType.USER_DEFINED


def test_a_user_defined_piece_that_no_file_lists(files: Path) -> None:
    def forget(raw: dict[str, Any]) -> None:
        raw["added_tokens_decoder"] = {
            i: entry for i, entry in raw["added_tokens_decoder"].items() if entry["content"] != "\n\n"
        }

    before = read(files)
    change_json(files / "tokenizer_config.json", forget)
    assert facts(read(files)) == facts(before)
