"""transformers on the small checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gguf3n.errors import ConfigError
from gguf3n.validation.reference import Reference

pytest.importorskip("torch")
pytest.importorskip("transformers")

IDS = [2, 858, 503, 600, 700, 106, 107, 900]


def logprobs(directory: Path) -> np.ndarray:
    return np.array(list(Reference(directory).logprobs(IDS)))


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> np.ndarray:
    return logprobs(tiny_checkpoint)


def test_distribution(expected: np.ndarray) -> None:
    assert expected.shape == (len(IDS), 1088)
    assert expected.dtype == np.float32
    assert np.exp(expected.astype(np.float64)).sum(axis=1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"layout": "text-only"},
        {"layout": "nested", "shards": 3},
        {"layout": "peft-prefix", "multimodal": True},
        {"shared_kv": False, "tokenizer": "json"},
        {"shared_kv": False, "layout": "text-only"},
    ],
    ids=str,
)
def test_every_layout_is_the_same_model(
    options: dict[str, object], expected: np.ndarray, make_checkpoint: Callable[..., Path]
) -> None:
    assert (logprobs(make_checkpoint(**options)) == expected).all()


def test_precision_of_the_weights_shows(expected: np.ndarray, make_checkpoint: Callable[..., Path]) -> None:
    difference = np.abs(logprobs(make_checkpoint(dtype="f32")) - expected).max()
    assert 0 < difference < 0.1


def test_text_in_and_out(tiny_checkpoint: Path) -> None:
    model = Reference(tiny_checkpoint)
    ids = model.tokenize("The harbour<end_of_turn>\n")
    assert ids[0] == 2
    assert ids[-2:] == [106, 107]
    assert model.next_token_logprobs(ids).shape == (1088,)
    assert isinstance(model.generate("The harbour", 4), str)


def test_chat_template(tiny_checkpoint: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": " What is this? "}, {"type": "image"}]},
        {"role": "assistant", "content": "A boat."},
        {"role": "user", "content": "Thanks."},
    ]
    expected = (
        "<bos><start_of_turn>user\nBe brief.\n\nWhat is this?<image_soft_token><end_of_turn>\n"
        "<start_of_turn>model\nA boat.<end_of_turn>\n"
        "<start_of_turn>user\nThanks.<end_of_turn>\n<start_of_turn>model\n"
    )
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected


def test_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="another model"):
        Reference(tmp_path)
