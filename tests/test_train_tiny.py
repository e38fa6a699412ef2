"""A few steps of training: it learns, it is repeatable, and what it writes is a checkpoint like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gguf3n
from gguf3n.engines.llama_cpp import LlamaCpp
from gguf3n.engines.reference import Reference
from gguf3n.validation.divergence import kl_divergence
from workshop import training
from workshop.checkpoints import PUBLISHED
from workshop.places import FIXTURES

safetensors = pytest.importorskip("safetensors.torch")

ENGLISH = FIXTURES / "text" / "english.txt"
FEW = training.Options(steps=6, texts=(ENGLISH,), threads=1, ctx=32, evaluate=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, training.Training]:
    directory = tmp_path_factory.mktemp("trained")
    return directory, training.train(directory, FEW)


def test_it_learns(trained: tuple[Path, training.Training]) -> None:
    _, result = trained
    assert len(result.losses) == FEW.steps
    assert result.losses[-1] < result.losses[0] - 1
    assert result.perplexity_after < result.perplexity_before / 2


def test_it_says_how_it_was_made(trained: tuple[Path, training.Training]) -> None:
    directory, result = trained
    written = json.loads((directory / training.TRAINING).read_text("utf-8"))
    assert (written["steps"], written["seed"], written["texts"]) == (FEW.steps, FEW.seed, ["english.txt"])
    assert written["perplexity_after"] == result.perplexity_after


def test_same_seed_same_weights(trained: tuple[Path, training.Training], tmp_path: Path) -> None:
    directory, _ = trained
    training.train(tmp_path, FEW)
    name = "model.safetensors"
    assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_layout(trained: tuple[Path, training.Training], tiny_checkpoint: Path) -> None:
    """Names, shapes and BF16 as in the random checkpoint; what is never evaluated is still as it was there."""
    directory, _ = trained
    ours, random = (safetensors.load_file(d / "model.safetensors") for d in (directory, tiny_checkpoint))
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in random.items()
    }
    unchanged = {name for name in ours if ours[name].equal(random[name])}
    parts = ("k_norm", "k_proj", "v_proj")
    assert unchanged == {f"{PUBLISHED}layers.{i}.self_attn.{part}.weight" for i in (20, 21) for part in parts}
    embeddings = ours[f"{PUBLISHED}embed_tokens.weight"]
    assert (embeddings[1024:] == embeddings[0]).all()


def test_both_engines_agree_on_it(trained: tuple[Path, training.Training], tmp_path: Path) -> None:
    directory, _ = trained
    path = tmp_path / "trained.gguf"
    gguf3n.convert(directory, "F32", path)
    reference = Reference(directory)
    ids = reference.tokenize((directory / training.HELD_OUT).read_text("utf-8"))[:48]
    with LlamaCpp(path, n_ctx=64, n_threads=1) as model:
        assert model.tokenize((directory / training.HELD_OUT).read_text("utf-8"))[:48] == ids
        divergence = kl_divergence(reference.next_token_logprobs(ids), model.next_token_logprobs(ids))
    assert divergence < 1e-5


def test_passages_are_the_text() -> None:
    text = "\n\n".join(f"paragraph {i} " + "x" * (i % 700) for i in range(300)) + "\n"
    pieces = list(training.passages(text))
    assert "\n\n".join(pieces) == text
    assert all(training.PASSAGE <= len(piece) < training.PASSAGE + 1000 for piece in pieces[:-1])


def test_nothing_is_both_trained_on_and_held_out() -> None:
    pieces = [f"passage {i}" for i in range(45)]
    train, held_out = training.split(pieces)
    assert held_out == ["passage 19", "passage 39"]
    assert sorted(train + held_out) == sorted(pieces)
    assert training.split(pieces[:2]) == (["passage 0"], ["passage 1"])


def test_too_little_text() -> None:
    with pytest.raises(SystemExit, match="too little text"):
        training.split(["one"])


def test_default_corpus_is_english(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fixtures first, then the language reference, then what the library says of itself, but not its tests."""
    monkeypatch.setattr(training.sysconfig, "get_path", lambda _: str(tmp_path))
    (tmp_path / "test").mkdir()
    long = ("What it does, at length. " * 10).strip()
    (tmp_path / "good.py").write_text(f'"""{long}"""\ndef f():\n    """Too short."""\n')
    (tmp_path / "test" / "bad.py").write_text(f'"""Not to be read. {long}"""\n')
    pieces = training.corpus(())
    assert ENGLISH.read_text("utf-8").startswith(pieces[0])
    assert pieces[-1] == long
    text = "\n\n".join(pieces)
    assert "Lambda expressions" in text
    assert "Too short" not in text and "Not to be read" not in text


def test_learning_rate_rises_then_falls() -> None:
    rates = [training.rate_at(step, 100) for step in range(100)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0.1 < rates[-1] < 0.11
