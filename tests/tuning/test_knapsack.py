"""The knapsack against trying everything, on small cases of many kinds; and its own bounds on large ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gguf3n.tuning import knapsack
from gguf3n.tuning.knapsack import pack


def best_of_all(weights: list[list[int]], costs: list[list[float]], capacity: int) -> float:
    """The least cost of all choices that fit."""
    found = [
        sum(costs[group][option] for group, option in enumerate(chosen))
        for chosen in itertools.product(*(range(len(group)) for group in weights))
        if sum(weights[group][option] for group, option in enumerate(chosen)) <= capacity
    ]
    return min(found)


def random_case(number: int) -> tuple[list[list[int]], list[list[float]], int]:
    """Up to six groups of up to five options; costs that fall with weight, that do not, that are equal, and zeros."""
    rng = np.random.default_rng(number)
    weights, costs = [], []
    for _ in range(rng.integers(1, 7)):
        n_options = int(rng.integers(1, 6))
        own = rng.integers(0, (8, 40, 10**9)[number % 3], n_options)
        falling = rng.lognormal(0, 2, n_options) / (1 + own / own.max(initial=1))
        weights.append(own.tolist())
        costs.append((rng.integers(0, 3, n_options) if number % 5 == 0 else falling).astype(float).tolist())
    least, most = (sum(of(group) for group in weights) for of in (min, max))
    return weights, costs, int(rng.integers(least, most + 2))


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_equal_to_trying_everything(first: int) -> None:
    for number in range(first, first + 50):
        weights, costs, capacity = random_case(number)
        found = pack(weights, costs, capacity)
        chosen = list(enumerate(found.chosen))
        assert found.weight == sum(weights[group][option] for group, option in chosen) <= capacity
        assert found.cost == pytest.approx(sum(costs[group][option] for group, option in chosen), abs=1e-12)
        assert found.is_exact
        assert found.cost == pytest.approx(best_of_all(weights, costs, capacity), rel=1e-9, abs=1e-12), number
        assert found.bound <= found.cost + 1e-12


def model_like(n_groups: int) -> tuple[list[list[int]], list[list[float]]]:
    """Matrices of a few shapes, each in twelve types, costs over five decades."""
    rng = np.random.default_rng(n_groups)
    bits = np.array([2.625, 3.4375, 3.4375, 4.25, 4.5, 4.5, 5.0, 5.5, 5.5, 6.0, 6.5625, 8.5])
    weights, costs = [], []
    for _ in range(n_groups):
        size = int(rng.choice([1 << 20, 1 << 22, 1 << 24]))
        weights.append((size * bits / 8).astype(int).tolist())
        costs.append((rng.lognormal(0, 3) * 4.0**-bits * rng.lognormal(0, 0.2, len(bits))).tolist())
    return weights, costs


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.97])
def test_a_model_of_many_tensors_is_packed_exactly(share: float) -> None:
    weights, costs = model_like(280)
    least, most = (sum(of(group) for group in weights) for of in (min, max))
    found = pack(weights, costs, int(least + share * (most - least)))
    assert found.is_exact and found.bound <= found.cost <= found.bound * 1.01


def test_more_room_never_costs_more() -> None:
    weights, costs = model_like(40)
    least, most = (sum(of(group) for group in weights) for of in (min, max))
    found = [pack(weights, costs, capacity).cost for capacity in np.linspace(least, most, 30).astype(int).tolist()]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(sum(map(min, costs)))


def test_too_little_room() -> None:
    with pytest.raises(ValueError, match="7 at least, 6 allowed"):
        pack([[3, 9], [4, 5]], [[1.0, 0.0], [1.0, 0.0]], 6)


def test_where_it_would_take_too_much_the_choice_fits_and_says_how_far_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knapsack, "MAX_STATES", 1)
    weights, costs = model_like(60)
    least, most = (sum(of(group) for group in weights) for of in (min, max))
    capacity = (least + most) // 2
    found = pack(weights, costs, capacity)
    assert not found.is_exact and found.weight <= capacity and found.bound < found.cost
