"""One option of each group, the least cost in all, within a capacity: the multiple-choice knapsack, exactly.

    1  options that another of their group beats in weight and cost are left out
    2  the relaxed problem is solved by taking the steps along each group's convex hull, the steepest first; the step
       that does not fit gives the multiplier lambda, and with it a bound: no choice costs less than
       bound = sum of min(cost + lambda weight) - lambda capacity
    3  the steps taken, and those after them that still fit, are a choice; its distance from the bound is the gap
    4  an option whose cost + lambda weight is further from its group's least than the gap can't be in a better choice;
       few are left
    5  over those, dynamic programming: of partial choices only those are kept that none beats in weight and cost, and
       whose distance from the bound is below the gap

Exact: the least cost there is, up to the rounding of sums in float64; `is_exact` is False where step 5 would take more
than MAX_STATES partial choices: the choice is then that of step 3, and `bound` says how far from the best it can be.

Source: Kellerer, Pferschy and Pisinger, "Knapsack Problems", chapter 11; Pisinger, "A minimal algorithm for the
multiple-choice knapsack problem" (1995).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Weights: TypeAlias = NDArray[np.int64]
Costs: TypeAlias = NDArray[np.float64]

MAX_STATES = 1 << 21
TOLERANCE = 1e-12
"""Share of the costs below which a gap is rounding."""


@dataclass(frozen=True)
class Packing:
    """One option a group. `bound`: no choice within the capacity costs less."""

    chosen: tuple[int, ...]
    weight: int
    cost: float
    bound: float
    is_exact: bool


def pack(weights: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], capacity: int) -> Packing:
    """The choice of the least cost; of several, one.

    Args:
        weights, costs: of each group's options, in any order; costs are finite.

    Raises: ValueError: even the lightest options are beyond the capacity.
    """
    groups = [_Group.of(*pair) for pair in zip(weights, costs, strict=True)]
    least = sum(int(group.weights[0]) for group in groups)
    if least > capacity:
        raise ValueError(f"{least} at least, {capacity} allowed")
    taken, multiplier = _greedy(groups, capacity)
    _, cost = _totals(groups, taken)
    reduced = [group.costs + multiplier * group.weights for group in groups]
    bound = sum(float(each.min()) for each in reduced) - multiplier * capacity
    gap = cost - bound
    if gap <= TOLERANCE * max(abs(cost), abs(bound)):
        return _packing(groups, taken, bound, is_exact=True)
    excess = [each - each.min() for each in reduced]
    better = _search(groups, excess, multiplier, capacity, gap)
    if better is None:
        return _packing(groups, taken, bound, is_exact=False)
    if better and _totals(groups, better)[1] < cost:
        taken = better
    return _packing(groups, taken, bound, is_exact=True)


@dataclass(frozen=True)
class _Group:
    """A group's options that no other beats, the lightest first; `numbers` are those that the caller knows them by."""

    weights: Weights
    costs: Costs
    numbers: NDArray[np.intp]

    @classmethod
    def of(cls, weights: Sequence[int], costs: Sequence[float]) -> _Group:
        all_weights, all_costs = np.array(weights, np.int64), np.array(costs, np.float64)
        order = np.lexsort((all_costs, all_weights))
        kept = order[_unbeaten(all_costs[order])]
        return cls(all_weights[kept], all_costs[kept], kept)

    def hull(self) -> list[int]:
        """Those on the lower convex hull."""
        kept: list[int] = []
        for option in range(len(self.weights)):
            while len(kept) > 1 and self._slope(kept[-2], kept[-1]) >= self._slope(kept[-1], option):
                kept.pop()
            kept.append(option)
        return kept

    def _slope(self, one: int, other: int) -> float:
        return float((self.costs[other] - self.costs[one]) / (self.weights[other] - self.weights[one]))


def _unbeaten(costs: Costs) -> NDArray[np.intp]:
    """Places of what is cheaper than all before it."""
    before = np.concatenate(([np.inf], np.minimum.accumulate(costs)[:-1]))
    return np.flatnonzero(costs < before)


def _greedy(groups: Sequence[_Group], capacity: int) -> tuple[list[int], float]:
    """Steps 2 and 3: a choice that fits, and the multiplier."""
    steps = [
        (group._slope(one, other), number, one, other)
        for number, group in enumerate(groups)
        for one, other in itertools.pairwise(group.hull())
    ]
    taken = [0] * len(groups)
    left = capacity - sum(int(group.weights[0]) for group in groups)
    multiplier = 0.0
    for slope, number, one, other in sorted(steps):
        step = int(groups[number].weights[other] - groups[number].weights[one])
        if taken[number] == one and step <= left:
            taken[number], left = other, left - step
        elif not multiplier:
            multiplier = -slope
    return _filled(groups, taken, left), multiplier


def _filled(groups: Sequence[_Group], taken: list[int], left: int) -> list[int]:
    """The choice with what is left spent on single options, the largest gain first."""
    while True:
        gains = []
        for number, group in enumerate(groups):
            now = taken[number]
            fitting = np.flatnonzero((group.weights - group.weights[now] <= left) & (group.costs < group.costs[now]))
            if len(fitting):
                best = int(fitting[group.costs[fitting].argmin()])
                gains.append((float(group.costs[now] - group.costs[best]), number, best))
        if not gains:
            return taken
        _, number, best = max(gains)
        left -= int(groups[number].weights[best] - groups[number].weights[taken[number]])
        taken[number] = best


def _search(
    groups: Sequence[_Group], excess: Sequence[Costs], multiplier: float, capacity: int, gap: float
) -> list[int] | None:
    """Steps 4 and 5: the best choice whose distance from the bound is below the gap; nothing where there is none.

    Returns: None where it would take too many partial choices.
    """
    left = [np.flatnonzero(each < gap) for each in excess]
    widths = [int(np.ptp(group.weights[kept])) for group, kept in zip(groups, left, strict=True)]
    order = sorted(range(len(groups)), key=lambda number: -widths[number])
    lightest = sum(int(groups[number].weights[left[number][0]]) for number in order)
    heaviest = lightest + sum(widths)
    weights, distances = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[int, NDArray[np.int32], NDArray[np.intp]]] = []
    for number in order:
        kept = left[number]
        own = groups[number].weights[kept]
        lightest, heaviest = lightest - int(own[0]), heaviest - int(own[-1])
        sums = (weights[:, None] + own).reshape(-1)
        apart = (distances[:, None] + excess[number][kept]).reshape(-1)
        unused = np.maximum(capacity - heaviest - sums, 0)
        alive = np.flatnonzero((sums + lightest <= capacity) & (apart + multiplier * unused < gap))
        alive = alive[np.lexsort((apart[alive], sums[alive]))]
        alive = alive[_unbeaten(apart[alive] - multiplier * sums[alive])]
        if len(alive) > MAX_STATES:
            return None
        weights, distances = sums[alive], apart[alive]
        trail.append((number, (alive // len(kept)).astype(np.int32), kept[alive % len(kept)]))
    if not len(weights):
        return []
    state = int((distances - multiplier * weights).argmin())
    chosen = [0] * len(groups)
    for number, parents, options in reversed(trail):
        chosen[number], state = int(options[state]), int(parents[state])
    return chosen


def _totals(groups: Sequence[_Group], taken: Sequence[int]) -> tuple[int, float]:
    pairs = list(zip(groups, taken, strict=True))
    return sum(int(g.weights[i]) for g, i in pairs), sum(float(g.costs[i]) for g, i in pairs)


def _packing(groups: Sequence[_Group], taken: Sequence[int], bound: float, *, is_exact: bool) -> Packing:
    weight, cost = _totals(groups, taken)
    chosen = tuple(int(group.numbers[i]) for group, i in zip(groups, taken, strict=True))
    return Packing(chosen, weight, cost, min(bound, cost), is_exact)
