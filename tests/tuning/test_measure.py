"""Costs against their definition, against the divergence that they foretell, and however they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf3n.engines import activations
from gguf3n.engines.reference import Reference
from gguf3n.errors import QuantizationError, UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.sensitivity import Sensitivity, merge_sensitivities
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.source import open_checkpoint
from gguf3n.quants.api import dequantize, quantize
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from gguf3n.tuning import measure
from gguf3n.tuning.costs import costs_of
from gguf3n.tuning.measure import TYPES, measure_batches, measure_sensitivity, parse_types
from gguf3n.validation.divergence import kl_divergence
from tests import micro
from workshop.imatrix_comparison import TEXT

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

Q4_0, Q8_0 = QType.Q4_0, QType.Q8_0
OPTIONS: dict[str, Any] = {"types": "Q8_0,Q4_0", "n_ctx": 16, "n_chunks": 6, "device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Norms of one and small matrices: a network that is not chaotic, so that what a change does is known."""
    raw = micro.config()
    rng = np.random.default_rng(0)
    shapes = {name: bits.shape for name, bits in micro.tensors(raw).items()}
    arrays = {
        name: micro.bf16_bits(
            (0.1 * rng.standard_normal(shape) if len(shape) > 1 else np.ones(shape)).astype(np.float32)
        )
        for name, shape in shapes.items()
    }
    return micro.make(tmp_path_factory.mktemp("measure") / "micro", raw=raw, arrays=arrays)


@pytest.fixture(scope="module")
def measured(checkpoint: Path) -> Sensitivity:
    return measure_sensitivity(checkpoint, [TEXT], batch=4, **OPTIONS)


def test_every_matrix_that_is_quantized_and_used(checkpoint: Path, measured: Sensitivity) -> None:
    part = text_part(open_checkpoint(checkpoint))
    wanted = {t.name: t.shape for t in part.tensors if t.storage.name == "QUANTIZABLE" and t.evaluated}
    assert {name: tensor.shape for name, tensor in measured.tensors.items()} == wanted
    assert all(set(tensor.types) == {Q8_0, Q4_0} for tensor in measured.tensors.values())
    has_rows = {name for name, tensor in measured.tensors.items() if tensor.types[Q8_0].rows is not None}
    assert has_rows == {TOKEN_EMBD, PER_LAYER_TOKEN_EMBD}
    assert (measured.spans, measured.ctx, measured.n_chunks) == (((0, 6),), 16, 6)
    assert measured.texts[0].name == TEXT.name and len(measured.texts[0].sha256) == 64


def test_fewer_bits_cost_more(measured: Sensitivity) -> None:
    for name, costs in costs_of(measured).items():
        assert 20 * costs[Q8_0] < costs[Q4_0], name


def test_however_it_is_cut(checkpoint: Path, measured: Sensitivity) -> None:
    """Other batches, and two runs that are merged: the same labels, the same sums."""
    halves = [
        measure_sensitivity(checkpoint, [TEXT], batch=2, **(OPTIONS | {"n_chunks": 3, "first_chunk": first}))
        for first in (0, 3)
    ]
    merged = merge_sensitivities(halves)
    assert merged.spans == measured.spans
    for name, tensor in measured.tensors.items():
        for qtype, sums in tensor.types.items():
            other = merged.tensors[name].types[qtype]
            assert other.fisher == pytest.approx(sums.fisher, rel=1e-3), name
            assert other.diagonal == pytest.approx(sums.diagonal, rel=1e-3), name


def test_what_comes_before_the_end_can_be_kept(checkpoint: Path, measured: Sensitivity) -> None:
    planned: list[Sensitivity] = []
    steps = list(
        measure_batches(checkpoint, [TEXT], batch=4, before=planned.append, **(OPTIONS | {"types": (Q8_0, Q4_0)}))
    )
    assert [(step.n_done, step.n_chunks, step.sensitivity.spans) for step in steps] == [
        (4, 6, ((0, 4),)),
        (6, 6, ((0, 6),)),
    ]
    assert steps[-1].sensitivity == measured
    assert planned[0].spans == ((0, 6),) and planned[0].tensors.keys() == measured.tensors.keys()
    assert 1088 / 3 < steps[0].perplexity < 3 * 1088  # it knows nothing


def test_the_seed_draws_other_labels(checkpoint: Path, measured: Sensitivity) -> None:
    other = measure_sensitivity(checkpoint, [TEXT], batch=6, seed=1, **OPTIONS)
    name = "blk.0.ffn_up.weight"
    one, two = (each.tensors[name].types[Q4_0] for each in (measured, other))
    assert one.fisher != pytest.approx(two.fisher, rel=1e-2)


def logits_of(reference: Reference, chunks: list[list[int]]) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield from reference.logprobs(chunk)


def test_costs_foretell_the_divergence(checkpoint: Path, measured: Sensitivity) -> None:
    """Every matrix in Q8_0 at once: what is measured against the sum of the costs."""
    tokens, _ = activations.read_tokens(open_checkpoint(checkpoint), [TEXT], 16, 6, 0, special=False)
    chunks = [[tokens[0], *tokens[16 * i + 1 : 16 * i + 16]] for i in range(6)]
    with Reference(checkpoint, device="cpu") as reference:
        before = list(logits_of(reference, chunks))
        for name, module in reference.model.model.named_modules():
            kind = name.rpartition(".")[2]
            if kind.endswith("_proj") or kind.startswith(("embed_tokens", "per_layer_input", "per_layer_projection")):
                if getattr(module, "weight", None) is None or module.weight.ndim < 2:
                    continue
                weight = module.weight.detach().numpy()
                changed = dequantize(quantize(weight, Q8_0), Q8_0)
                module.weight.data = torch.from_numpy(changed)
        reference.model.lm_head.weight = reference.model.model.embed_tokens.weight
        after = list(logits_of(reference, chunks))
    found = float(np.mean([kl_divergence(p, q) for p, q in zip(before, after, strict=True)]))
    expected = sum(costs[Q8_0] for costs in costs_of(measured).values())
    assert found == pytest.approx(expected, rel=0.4)


def test_sums_are_what_they_are_defined_as(checkpoint: Path) -> None:
    part = text_part(open_checkpoint(checkpoint))
    name = "blk.1.attn_q.weight"
    tensor = next(t for t in part.tensors if t.name == name)
    candidates = dict.fromkeys((name, TOKEN_EMBD, PER_LAYER_TOKEN_EMBD), (Q8_0, Q4_0))
    errors = measure._Errors(part, candidates, {}, 1)
    try:
        rows = np.arange(tensor.n_rows)
        weights = errors.reader.source_rows(tensor, rows)
        gradients = np.random.default_rng(0).standard_normal((2, *weights.shape), np.float32)
        errors.begin(2)
        errors.gradients(name, slice(0, 2), rows[:5], gradients[:, :5])
        errors.gradients(name, slice(0, 2), rows[5:], gradients[:, 5:])
        used = np.abs(np.random.default_rng(1).standard_normal((2, errors.tensor[TOKEN_EMBD].n_per_row)))
        errors.uses(TOKEN_EMBD, used)
        errors.end(16)
        found = errors.tensors()[name].types[Q4_0]
        change = dequantize(quantize(weights, Q4_0), Q4_0) - weights
        products = (gradients.astype(np.float64) * change).sum((1, 2))
        assert found.fisher == pytest.approx((products**2 / 32).sum(), rel=1e-3)
        assert found.squares == pytest.approx(((products**2 / 32) ** 2).sum(), rel=1e-3)
        assert found.diagonal == pytest.approx((gradients.astype(np.float64) ** 2 * change**2).sum() / 32, rel=1e-4)
        table = errors.reader.source_rows(errors.tensor[TOKEN_EMBD], np.arange(errors.tensor[TOKEN_EMBD].n_rows))
        all_rows = np.square(dequantize(quantize(table, Q4_0), Q4_0) - table, dtype=np.float64).mean(0)
        by_row = errors.tensors()[TOKEN_EMBD].types[Q4_0].rows
        assert by_row == pytest.approx((all_rows * used.sum(0)).sum() / 32, rel=0.1)
        with pytest.raises(QuantizationError, match="not finite"):
            errors.gradients(name, slice(0, 2), rows, np.full_like(gradients, np.nan))
    finally:
        errors.close()


def test_types() -> None:
    assert parse_types("q4_k, Q8_0,q4_k") == (QType.Q4_K, QType.Q8_0)
    for text in ("", " , ", "Q9", "Q4_K;Q8_0", "F16"):
        with pytest.raises(UsageError, match="--types"):
            parse_types(text)
    assert len(set(TYPES)) == len(TYPES)


def test_types_that_no_row_holds(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="none of the types can be measured"):
        measure_sensitivity(checkpoint, [TEXT], **(OPTIONS | {"types": "Q4_K"}))


def test_too_little_text(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Short.", "utf-8")
    with pytest.raises(UsageError, match="not enough text"):
        measure_sensitivity(checkpoint, [tmp_path / "short.txt"], **OPTIONS)
