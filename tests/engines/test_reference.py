"""transformers on the small checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.engines.reference import HEAD_POSITIONS, Reference
from gguf3n.errors import ConfigError, SourceError, UsageError
from gguf3n.gemma3n.source import open_source
from tests import micro

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


def test_a_device_without_enough_memory(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def refuse(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    model = Reference(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(model.model.model, "forward", refuse)
    with pytest.raises(UsageError, match=r"the reference in float32 does not fit into the memory of cpu"):
        model.run([2, 500])


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


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("bfloat16", 0.1)])
def test_logits_are_those_of_the_plain_forward(dtype: str, bound: float, tiny_checkpoint: Path) -> None:
    """In bfloat16 the plain forward rounds its logits to eight bits, which ours does not."""
    import torch

    ids = [2, *range(500, 570)]  # more than are computed at once
    assert len(ids) > 2 * HEAD_POSITIONS
    with Reference(tiny_checkpoint, dtype=dtype) as reference:
        with torch.no_grad():
            plain = reference.model(torch.tensor([ids]), use_cache=False).logits[0].float()
        hidden = reference.run(ids)
        assert hidden.shape == (len(ids), 256)
        assert hidden.dtype == getattr(torch, dtype)
        ours = reference.logits(hidden)
        assert ours.dtype == torch.float32
        assert float((ours - plain).abs().max()) <= bound
        rows = list(reference.logprobs(ids, first=40))
        assert len(rows) == len(ids) - 40
        assert np.abs(rows[-1] - torch.log_softmax(ours[-1].double(), -1).numpy()).max() < 1e-5
        assert (rows[0] == list(reference.logprobs(ids))[40]).all()


def test_what_it_cannot_run_on(tiny_checkpoint: Path) -> None:
    import torch

    with pytest.raises(UsageError, match="float16"):
        Reference(tiny_checkpoint, dtype="float16")
    with pytest.raises(UsageError, match="device 'tpu'"):
        Reference(tiny_checkpoint, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="torch finds none"):
            Reference(tiny_checkpoint, device="cuda")


def test_without_torch(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"gguf3n\[validate\]"):
        Reference(tiny_checkpoint)


def test_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SourceError, match="no checkpoint here"):
        Reference(tmp_path)
    micro.write_safetensors(tmp_path / "model.safetensors", {"x": np.zeros(4, np.float32)})
    with pytest.raises(ConfigError, match="another model"):
        Reference(tmp_path)


def test_a_source_that_is_open(tiny_checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    with Reference(open_source(tiny_checkpoint)) as reference:
        assert (np.array(list(reference.logprobs(IDS))) == expected).all()
        assert reference.tokenize("The harbour") == Reference(str(tiny_checkpoint)).tokenize("The harbour")
    (written,) = gguf3n.convert(tiny_checkpoint, "F16", tmp_path)
    with pytest.raises(SourceError, match="a GGUF file"):
        Reference(written.path)
