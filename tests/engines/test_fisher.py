"""Gradients of the model's own guesses against torch's own, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf3n.engines import fisher
from gguf3n.engines.fisher import fisher_need, run_backward
from gguf3n.engines.reference import Reference
from gguf3n.gemma3n.source import open_checkpoint
from gguf3n.gemma3n.text import written_order
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from tests import micro

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SEQUENCES = [[2, 500, 501, 500, 17, 900, 3, 44, 45, 46, 47, 48], [2, 7, 7, 7, 300, 301, 302, 1000, 5, 6, 8, 9]]
SEEDS = [11, 12]


class Collected:
    """A listener that keeps all it is told."""

    def __init__(self) -> None:
        self.dense: dict[str, np.ndarray] = {}
        self.squares: dict[str, np.ndarray] = {}
        self.shapes: dict[str, tuple[int, int]] = {}

    def gradients(self, name: str, sequences: slice, rows: np.ndarray, values: np.ndarray) -> None:
        whole = self.dense.setdefault(name, np.zeros((len(SEQUENCES), 2000, values.shape[2])))
        whole[sequences, rows] += values

    def uses(self, name: str, values: np.ndarray) -> None:
        self.squares[name] = self.squares.get(name, 0) + values


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    with Reference(micro.make(tmp_path_factory.mktemp("fisher") / "micro"), device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def collected(reference: Reference) -> Collected:
    found = Collected()
    run_backward(reference, SEQUENCES, SEEDS, found)
    return found


def labels_of(reference: Reference, sequence: list[int], seed: int) -> Any:
    """Draws as the head makes them where all logits are there at once."""
    logits = reference.logits(reference.run(sequence))
    noise = torch.empty_like(logits).exponential_(generator=torch.Generator("cpu").manual_seed(seed))
    return (logits - noise.log()).argmax(1)


def by_autograd(reference: Reference, sequence: list[int], labels: Any) -> tuple[float, dict[str, np.ndarray]]:
    """The log-probability of a sequence's own tokens, and the gradient of that of labels by every matrix."""
    model = reference.model
    model.zero_grad()
    hidden = model.model(input_ids=torch.tensor([sequence]), use_cache=False).last_hidden_state[0]
    cap = model.config.final_logit_softcapping
    logprobs = (torch.tanh(model.lm_head(hidden) / cap) * cap).log_softmax(-1)
    logprobs[range(len(labels)), labels].sum().backward()
    modules = dict(model.model.named_modules())
    found = {}
    for rule, bid in written_order(model.config.num_hidden_layers):
        module = modules.get(rule.source.format(bid=bid, k=0).removesuffix(".weight"))
        if module is not None and getattr(module, "weight", None) is not None and module.weight.grad is not None:
            found[rule.name(bid)] = module.weight.grad.numpy().copy()
    own = logprobs[range(len(sequence) - 1), sequence[1:]].sum()
    return float(own.detach()), found


@pytest.mark.parametrize("number", range(len(SEQUENCES)))
def test_gradients_are_those_of_torch(reference: Reference, collected: Collected, number: int) -> None:
    labels = labels_of(reference, SEQUENCES[number], SEEDS[number])
    _, expected = by_autograd(reference, SEQUENCES[number], labels)
    assert len(collected.dense) == 2 + 3 * 7 + 2 * 2  # tables, seven matrices a layer, keys and values of two
    for name, whole in collected.dense.items():
        found = whole[number, : len(expected[name])]
        assert np.abs(found - expected[name]).max() <= 2e-5 * np.abs(expected[name]).max(), name


def test_the_loss_is_that_of_the_text(reference: Reference) -> None:
    loss = run_backward(reference, SEQUENCES, SEEDS, Collected())
    logprobs = [by_autograd(reference, sequence, torch.tensor(sequence))[0] for sequence in SEQUENCES]
    assert loss == pytest.approx(-sum(logprobs), rel=1e-5)


def test_whatever_is_in_memory_at_once(
    reference: Reference, collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the head and of matrices a few at a time: the same gradients, by the same labels if the draws are."""
    monkeypatch.setattr(fisher, "ROW_VALUES", 1 << 10)
    found = Collected()
    run_backward(reference, SEQUENCES, SEEDS, found)
    for name, whole in collected.dense.items():
        assert np.allclose(found.dense[name], whole, rtol=1e-4, atol=1e-6 * np.abs(whole).max()), name


def test_labels_of_a_sequence_depend_on_its_seed_alone(reference: Reference, collected: Collected) -> None:
    alone = Collected()
    run_backward(reference, SEQUENCES[1:], SEEDS[1:], alone)
    name = "blk.0.ffn_up.weight"
    assert np.allclose(alone.dense[name][0], collected.dense[name][1], rtol=1e-4, atol=1e-6)
    other = Collected()
    run_backward(reference, SEQUENCES[1:], [99], other)
    assert not np.allclose(other.dense[name][0], alone.dense[name][0], rtol=1e-2)


def test_uses_of_tables(reference: Reference, collected: Collected) -> None:
    """A token that is used once: its squared gradient is its share of the sum, the rest is the others'."""
    assert collected.squares.keys() == {TOKEN_EMBD, PER_LAYER_TOKEN_EMBD}
    whole = collected.dense[PER_LAYER_TOKEN_EMBD][0]
    once = [token for token in SEQUENCES[0] if SEQUENCES[0].count(token) == 1]
    assert (collected.squares[PER_LAYER_TOKEN_EMBD][0] >= np.square(whole[once]).sum(0) * (1 - 1e-5)).all()
    alone = np.square(whole[once]).sum()
    assert alone < collected.squares[PER_LAYER_TOKEN_EMBD][0].sum() < 20 * alone


def test_the_model_is_as_it_was(reference: Reference) -> None:
    before = reference.next_token_logprobs(SEQUENCES[0])
    run_backward(reference, SEQUENCES, SEEDS, Collected())
    text = reference.model.model
    assert (reference.next_token_logprobs(SEQUENCES[0]) == before).all()
    assert all(weight.requires_grad for weight in text.parameters()) and not text.training
    assert not [module for module in text.modules() if "forward" in vars(module)]


def test_memory_grows_with_what_is_run_together(tiny_checkpoint: Path) -> None:
    source = open_checkpoint(tiny_checkpoint)
    needs = [fisher_need(source, dtype, 256, n) for dtype in ("bfloat16", "float32") for n in (1, 8)]
    sizes = [need.n_bytes for need in needs]
    assert sizes[0] < sizes[1] < sizes[3] and sizes[0] < sizes[2] < sizes[3]
    assert [str(other) for other in needs[3].alternatives] == ["--dtype bfloat16", "a smaller --batch or --ctx"]
