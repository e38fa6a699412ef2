"""sentencepiece with the tokens that it does not look for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf3n.errors import TokenizerError
from gguf3n.gemma3n.sentencepieces import SentencePieces
from gguf3n.gemma3n.source import open_checkpoint


@pytest.fixture(scope="module")
def pieces(make_checkpoint: Callable[..., Path]) -> SentencePieces:
    return SentencePieces(open_checkpoint(make_checkpoint(tokenizer="model")))


def test_control_tokens_in_the_text(pieces: SentencePieces) -> None:
    assert pieces.encode("<bos><eos><pad><unk>") == [2, 2, 1, 0, 3]
    assert pieces.encode("<start_of_turn>\n<end_of_turn>", add_special=False) == [105, 107, 106]


def test_tokens_beyond_the_pieces(pieces: SentencePieces) -> None:
    assert pieces.encode("<image_soft_token><end_of_audio>", add_special=False) == [1025, 1056]


def test_control_tokens_that_are_text(pieces: SentencePieces) -> None:
    assert 2 not in pieces.encode("a<bos>b", add_special=False, special=False)
    assert pieces.encode("a<bos>b", special=False)[0] == 2


def test_text_between(pieces: SentencePieces) -> None:
    word, tail = pieces.encode("The harbour", add_special=False), pieces.encode(" wakes", add_special=False)
    assert pieces.encode("The harbour<eos> wakes<eos>", add_special=False) == [*word, 1, *tail, 1]
    assert pieces.encode("") == [2]
    assert pieces.encode("", add_special=False) == []


def test_what_is_added(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(make_checkpoint(tokenizer="model"), tmp_path / "checkpoint"))
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"add_bos_token": False, "add_eos_token": True}), "utf-8")
    assert SentencePieces(open_checkpoint(directory)).encode("<pad>") == [0, 1]


def test_no_tokenizer(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(make_checkpoint(tokenizer="model"), tmp_path / "checkpoint"))
    (directory / "tokenizer.model").unlink()
    with pytest.raises(TokenizerError, match="no tokenizer"):
        SentencePieces(open_checkpoint(directory))
