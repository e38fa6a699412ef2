"""The llama.cpp engine on a one-layer Llama that is written here, with the small vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
from make_checkpoint import TOKENIZER

from gguf3n.errors import GGUFError
from gguf3n.validation.llama_cpp import LlamaCpp

pytest.importorskip("xllamacpp")

N_VOCAB, N_EMBD, N_FF, N_HEADS = 1024, 64, 128, 2
TEXT = "The harbour wakes before the town does.\n\nA   <b>little</b> after four."


def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(1)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    pieces = tokenizer()
    kinds = [gguf.TokenType.NORMAL] * N_VOCAB
    for i in range(N_VOCAB):
        if pieces.is_byte(i):
            kinds[i] = gguf.TokenType.BYTE
        elif i < 107:
            kinds[i] = gguf.TokenType.CONTROL
        elif i < 238:
            kinds[i] = gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("llama")
    texts = [pieces.id_to_piece(i) for i in range(N_VOCAB)]
    writer.add_token_list([text.replace("▁", " ") for text in texts[:238]] + texts[238:])
    writer.add_token_scores([-float(i) for i in range(N_VOCAB)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(106)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (N_VOCAB, N_EMBD),
        "blk.0.attn_q": (N_EMBD, N_EMBD),
        "blk.0.attn_k": (N_EMBD, N_EMBD),
        "blk.0.attn_v": (N_EMBD, N_EMBD),
        "blk.0.attn_output": (N_EMBD, N_EMBD),
        "blk.0.ffn_gate": (N_FF, N_EMBD),
        "blk.0.ffn_up": (N_FF, N_EMBD),
        "blk.0.ffn_down": (N_EMBD, N_FF),
    }
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[1], dtype=np.float32)
        writer.add_tensor(f"{name}.weight", values)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(N_EMBD, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(model_path: Path) -> Iterator[LlamaCpp]:
    with LlamaCpp(model_path, n_ctx=256, n_threads=1) as opened:
        yield opened


def test_distribution_of_every_position(model: LlamaCpp) -> None:
    ids = model.tokenize(TEXT)
    rows = list(model.logprobs(ids))
    assert len(rows) == len(ids)
    for row in rows:
        assert row.shape == (N_VOCAB,)
        assert np.exp(row.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)


def test_every_kind_of_token_can_come_next(model: LlamaCpp) -> None:
    """Tied embeddings make a model repeat itself: after an end mark or half a character, it would pick that again."""
    for last in (0, 1, 3, 106, 107, 366, 493, 1016):
        assert np.isfinite(model.next_token_logprobs([2, last, last, last])).all()


def test_cache_does_not_change_the_distribution(model: LlamaCpp) -> None:
    ids = model.tokenize(TEXT)
    *_, last = model.logprobs(ids)
    assert np.abs(last - model.next_token_logprobs(ids)).max() < 1e-3


def test_tokenize(model: LlamaCpp) -> None:
    assert model.tokenize(TEXT) == [2, *tokenizer().encode(TEXT)]
    assert model.tokenize("hi<end_of_turn>")[-1] == 106
    assert 106 not in model.tokenize("hi<end_of_turn>", special=False)


def test_generate_is_greedy(model: LlamaCpp) -> None:
    ids = model.tokenize("The harbour")
    likely = int(model.next_token_logprobs(ids).argmax())
    assert model.generate(ids, 1) == tokenizer().decode([likely])
    assert model.generate("The harbour", 5) == model.generate(ids, 5)


@pytest.mark.parametrize("n_bytes", [0, 100, 20_000])
def test_truncated_file(n_bytes: int, model_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model_path.read_bytes()[:n_bytes])
    with pytest.raises(GGUFError, match=r"cut\.gguf"):
        LlamaCpp(path, n_ctx=256)
