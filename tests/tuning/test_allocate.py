"""Recipes from costs: within the budget, none better, readable, usable, and what can't be had."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

import gguf3n
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.sensitivity import Sensitivity, Sums, TensorSums, Text
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, PLE_TYPES, find_recipe, format_recipe
from gguf3n.tuning.allocate import REPACKED, Tuning, TypeLimits, check_engine
from gguf3n.tuning.budget import Budget
from gguf3n.tuning.costs import PRIOR_CHUNKS, costs_of
from gguf3n.tuning.ladder import climb, same_size
from tests import micro
from tests.tuning.facts import TYPES, made_up


@pytest.fixture(scope="module")
def part(tiny_checkpoint: Path) -> Part:
    return text_part(gguf3n.read_source(tiny_checkpoint))


@pytest.fixture(scope="module")
def tuning(part: Part) -> Tuning:
    return Tuning(part, made_up(part), TypeLimits())


def budget(n_bytes: int) -> Budget:
    return Budget(n_bytes, "a test")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.8, 1.0, 2.0])
def test_a_recipe_within_its_budget(tuning: Tuning, tmp_path: Path, share: float) -> None:
    """Read back from its file it makes the plan that was promised, and it says for each tensor what it costs."""
    n_bytes = int(tuning.least_bytes + share * (tuning.most_bytes - tuning.least_bytes))
    tuned = tuning.tune(budget(n_bytes), "mine")
    assert tuned.is_exact and tuned.plan.total_bytes <= n_bytes
    path = tmp_path / "mine.toml"
    path.write_text(format_recipe(tuned.recipe), "utf-8")
    recipe = find_recipe(str(path))
    assert recipe.evidence == tuned.recipe.evidence and len(recipe.evidence) >= 5
    plan = tuning.plan(recipe)
    assert plan.total_bytes == tuned.plan.total_bytes
    assert tuning.divergence(plan) == pytest.approx(tuned.divergence)
    reasons = {tensor.source.name: tensor.reason for tensor in plan.tensors}
    assert all("costs KL" in reasons[name] for name in tuning.choices)
    assert plan.recipe.n_layers == 22 and find_recipe(str(path)).unevaluated is QType.Q2_K


def test_none_is_better(tmp_path: Path) -> None:
    """Every choice of a small model's tensors, two types each, tried."""
    source = gguf3n.read_source(micro.make(tmp_path / "micro"))
    part = text_part(source)
    sensitivity = made_up(part, (QType.Q8_0, QType.Q4_0))
    few = list(sensitivity.tensors)[:12]
    flat = {
        name: tensor if name in few else TensorSums(tensor.shape, {QType.Q8_0: tensor.types[QType.Q8_0]})
        for name, tensor in sensitivity.tensors.items()
    }
    tuning = Tuning(part, replace(sensitivity, tensors=flat), TypeLimits())
    limit = (tuning.least_bytes + tuning.most_bytes) // 2
    best = min(
        sum(choice.cost for choice in chosen)
        for chosen in itertools.product(*tuning.choices.values())
        if tuning.fixed_bytes + sum(choice.n_bytes for choice in chosen) <= limit
    )
    assert tuning.tune(budget(limit), "mine").divergence == pytest.approx(best)


def test_too_small(tuning: Tuning) -> None:
    assert tuning.tune(budget(tuning.least_bytes), "least").plan.total_bytes == tuning.least_bytes
    with pytest.raises(UsageError, match="no file of this model is so small") as caught:
        tuning.tune(budget(tuning.least_bytes - 1), "less")
    assert f"at least {tuning.least_bytes:,} bytes" in str(caught.value)


def types_of(tuning: Tuning) -> dict[str, set[QType]]:
    """What each tensor may be, whatever the budget."""
    return {name: {choice.qtype for choice in choices} for name, choices in tuning.choices.items()}


def test_limits(part: Part) -> None:
    sensitivity = made_up(part)
    free = types_of(Tuning(part, sensitivity, TypeLimits()))
    assert free[PER_LAYER_TOKEN_EMBD] <= set(PLE_TYPES) and QType.Q2_K in free["blk.0.attn_q.weight"]
    any_type = types_of(Tuning(part, sensitivity, TypeLimits(any_table_type=True)))
    assert QType.Q2_K in any_type[PER_LAYER_TOKEN_EMBD]
    fast = types_of(Tuning(part, sensitivity, TypeLimits(fast_cpu=True)))
    assert all(types <= set(REPACKED) for name, types in fast.items() if name != PER_LAYER_TOKEN_EMBD)
    few = types_of(Tuning(part, sensitivity, TypeLimits((QType.Q8_0, QType.Q4_0))))
    assert all(types == {QType.Q8_0, QType.Q4_0} for types in few.values())
    with pytest.raises(UsageError, match=r"per_layer_token_embd\.weight: no type is left"):
        Tuning(part, sensitivity, TypeLimits((QType.Q4_K,)))
    with pytest.raises(UsageError, match=r"token_embd\.weight: no type is left"):
        Tuning(part, sensitivity, TypeLimits((QType.IQ3_S,)))


def test_types_that_need_importances_are_not_chosen_without(part: Part) -> None:
    found = types_of(Tuning(part, made_up(part, (*TYPES, QType.IQ2_XXS)), TypeLimits(any_table_type=True)))
    assert not any(QType.IQ2_XXS in types for types in found.values())


def test_engines() -> None:
    check_engine("llama.cpp", TypeLimits(any_table_type=True))
    check_engine("ollama-old", TypeLimits())
    with pytest.raises(UsageError, match="unknown"):
        check_engine("vllm", TypeLimits())
    with pytest.raises(UsageError, match="in few types"):
        check_engine("ollama-old", TypeLimits(any_table_type=True))


def test_of_another_model(part: Part, tmp_path: Path) -> None:
    sensitivity = made_up(part)
    with pytest.raises(UsageError, match="measured of another model"):
        Tuning(part, replace(sensitivity, fingerprint="f" * 64), TypeLimits())
    other = text_part(gguf3n.read_source(micro.make(tmp_path / "micro")))
    with pytest.raises(UsageError, match="measured of another model"):
        Tuning(other, sensitivity, TypeLimits())
    with pytest.raises(UsageError, match="with other importances"):
        Tuning(part, replace(sensitivity, imatrix=Text("i.gguf", "0" * 64)), TypeLimits())


def test_the_same_from_a_checkpoint_and_its_gguf_file(part: Part, tuning: Tuning, tmp_path: Path) -> None:
    (done,) = gguf3n.convert(part.source, "BF16", tmp_path / "model.gguf")
    of_file = Tuning(text_part(gguf3n.read_source(done.path)), made_up(part), TypeLimits())
    n_bytes = (tuning.least_bytes + tuning.most_bytes) // 2
    one, other = (each.tune(budget(n_bytes), "mine") for each in (tuning, of_file))
    assert one.divergence == pytest.approx(other.divergence, rel=1e-3)


def test_costs() -> None:
    """The diagonal, corrected by the mean ratio, drawn towards 1; of tables the larger of the two."""
    types = {QType.Q8_0: Sums(3.0, 9.0, 1.0), QType.Q4_0: Sums(10.0, 100.0, 10.0)}
    table = {QType.Q8_0: Sums(1.0, 1.0, 1.0, 2.0), QType.Q4_0: Sums(8.0, 64.0, 8.0, 4.0)}
    tensors = {"a": TensorSums((1, 32), types), "token_embd.weight": TensorSums((1, 32), table)}
    costs = costs_of(Sensitivity(Path("x"), "m", "f", None, 64, 0, (), ((0, PRIOR_CHUNKS),), (), tensors))
    ratio = (PRIOR_CHUNKS * 2.0 + PRIOR_CHUNKS) / (2 * PRIOR_CHUNKS)
    assert costs["a"] == pytest.approx({QType.Q8_0: ratio / PRIOR_CHUNKS, QType.Q4_0: 10 * ratio / PRIOR_CHUNKS})
    assert costs["token_embd.weight"] == pytest.approx({QType.Q8_0: 2 / PRIOR_CHUNKS, QType.Q4_0: 8 / PRIOR_CHUNKS})


def test_ladder(tuning: Tuning) -> None:
    """Less with every step, and never above a mixture that is not smaller."""
    ladder = climb(tuning, 12)
    sizes = [point.n_bytes for point in ladder.tuned]
    costs = [point.divergence for point in ladder.tuned]
    assert sizes == sorted(set(sizes)) and costs == sorted(costs, reverse=True)
    assert (sizes[0], sizes[-1]) == (tuning.least_bytes, tuning.most_bytes)
    names = [point.name for point in ladder.stock]
    assert {"Q4_K_M", "Q4_K_M@llama.cpp", "Q8_0"} <= set(names) and "IQ2_XXS" not in names
    for point in ladder.stock:
        if point.n_bytes < tuning.least_bytes:
            continue
        assert tuning.pack(budget(point.n_bytes)).cost <= point.divergence, point.name


def test_the_mixture_of_the_same_size(tuning: Tuning) -> None:
    plan = tuning.plan(find_recipe("Q4_K_M@llama.cpp"))
    found = same_size(tuning, plan.total_bytes)
    assert found is not None and found.total_bytes == plan.total_bytes
    below = same_size(tuning, plan.total_bytes - 1)
    assert below is not None and below.total_bytes < plan.total_bytes
    assert same_size(tuning, 1000) is None
