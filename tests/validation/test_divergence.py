"""The divergence measure against distributions whose divergence is known."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from gguf3n.engines.distribution import log_softmax
from gguf3n.validation.divergence import Divergence, kl_divergence, measure


def logs(*probabilities: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities, dtype=np.float32))


def test_known_value() -> None:
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(logs(0.5, 0.5), logs(0.25, 0.75)) == pytest.approx(expected, rel=1e-6)


def test_direction() -> None:
    p, q = logs(0.9, 0.1), logs(0.5, 0.5)
    assert kl_divergence(p, q) == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-6)
    assert kl_divergence(q, p) == pytest.approx(0.5 * math.log(1 / 1.8) + 0.5 * math.log(5), rel=1e-6)


def test_logits_need_no_normalizing() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.standard_normal((2, 1000), dtype=np.float32)
    assert kl_divergence(p + 8, q - 4) == pytest.approx(kl_divergence(p, q), rel=1e-5)
    assert kl_divergence(p, p) == 0.0


def test_small_differences_are_not_lost() -> None:
    """To second order a change of the logits costs half its variance: here 5e-9, less than float32 resolves."""
    rng = np.random.default_rng(1)
    p = rng.standard_normal(50_000).astype(np.float32)
    change = rng.standard_normal(50_000).astype(np.float32) * np.float32(1e-4)
    q = p + change
    weights = np.exp(p.astype(np.float64))
    weights /= weights.sum()
    real_change = q.astype(np.float64) - p
    variance = weights @ real_change**2 - (weights @ real_change) ** 2
    assert kl_divergence(p, q) == pytest.approx(variance / 2, rel=1e-3)


def test_impossible_tokens() -> None:
    assert kl_divergence(logs(1.0, 0.0), logs(0.5, 0.5)) == pytest.approx(math.log(2))
    assert kl_divergence(logs(0.5, 0.5), logs(1.0, 0.0)) == math.inf


def test_measure() -> None:
    same, other = logs(0.6, 0.4), logs(0.4, 0.6)
    divergence = measure([same] * 200, iter([same] * 198 + [other] * 2))
    cost = 0.2 * math.log(1.5)
    assert divergence.n_positions == 200
    assert divergence.mean == pytest.approx(cost / 100, rel=1e-6)
    assert divergence.median == 0.0
    # a hundredth of the way from the last zero to the first difference
    assert divergence.p99 == pytest.approx(cost * 0.01, rel=1e-5)
    assert divergence.maximum == pytest.approx(cost, rel=1e-6)
    assert divergence.top1_agreement == 0.99


def slow(
    reference: list[np.ndarray], candidate: list[np.ndarray], following: list[int], floor: float | None = None
) -> Divergence:
    """The same measures in plain loops over plain numbers."""

    def normalized(row: np.ndarray) -> list[float]:
        values = [float(value) for value in row]
        total = math.log(math.fsum(math.exp(value - max(values)) for value in values)) + max(values)
        return [value - total for value in values]

    def likeliest(row: list[float], n: int) -> set[int]:
        return set(sorted(range(len(row)), key=lambda i: row[i], reverse=True)[:n])

    costs, same, shared, p_cost, q_cost = [], 0, 0, 0.0, 0.0
    for p_row, q_row, token in zip(reference, candidate, following, strict=True):
        p = normalized(p_row) if floor is None else [float(value) for value in p_row]
        q = normalized(q_row)
        kept = [i for i in range(len(p)) if floor is None or p[i] > floor]
        costs.append(math.fsum(math.exp(p[i]) * (p[i] - q[i]) for i in kept))
        same += likeliest(p, 1) == likeliest(q, 1)
        shared += len(likeliest(p, 5) & likeliest(q, 5))
        p_cost, q_cost = p_cost - p[token], q_cost - q[token]
    costs.sort()

    def percentile(share: float) -> float:
        place = share * (len(costs) - 1)
        below = int(place)
        above = min(below + 1, len(costs) - 1)
        return costs[below] + (place - below) * (costs[above] - costs[below])

    n = len(costs)
    return Divergence(
        n_positions=n,
        mean=math.fsum(costs) / n,
        median=percentile(0.5),
        p95=percentile(0.95),
        p99=percentile(0.99),
        maximum=costs[-1],
        top1_agreement=same / n,
        top5_agreement=shared / (5 * n),
        reference_perplexity=math.exp(p_cost / n),
        candidate_perplexity=math.exp(q_cost / n),
    )


@pytest.mark.parametrize("floor", [None, -6.5])
def test_measure_against_plain_loops(floor: float | None) -> None:
    rng = np.random.default_rng(2)
    p = [log_softmax(row).astype(np.float32) for row in rng.standard_normal((60, 300), dtype=np.float32) * 2]
    q = [row + rng.standard_normal(300, dtype=np.float32) for row in p]
    following = [int(i) for i in rng.integers(0, 300, 60)]
    found, expected = measure(iter(p), iter(q), iter(following), floor=floor), slow(p, q, following, floor)
    assert asdict(found) == pytest.approx(asdict(expected), rel=1e-6)
    assert 0.2 < found.top5_agreement < 0.9
    assert found.mean != measure(p, q).mean or floor is None


def test_perplexity() -> None:
    """Of a model that holds each token that follows at a half, and one that holds it at an eighth."""
    p, q = logs(0.5, 0.25, 0.25), logs(0.125, 0.375, 0.5)
    divergence = measure([p, p], [q, q], [0, 0])
    assert divergence.reference_perplexity == pytest.approx(2)
    assert divergence.candidate_perplexity == pytest.approx(8)
    assert measure([p], [q]).reference_perplexity is None


def test_a_text_that_was_ruled_out_is_infinitely_perplexing() -> None:
    divergence = measure([logs(0.5, 0.5)], [logs(1.0, 0.0)], [1])
    assert divergence.reference_perplexity == pytest.approx(2)
    assert divergence.candidate_perplexity == math.inf


@pytest.mark.parametrize("floor", [None, -16.0])
def test_two_engines_that_both_fail_do_not_agree(floor: float | None) -> None:
    broken = np.full(4, math.nan, np.float32)
    assert math.isnan(measure([broken], [broken], floor=floor).mean)
    assert math.isnan(measure([broken], [logs(0.5, 0.5, 0.0, 0.0)], floor=floor).mean)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_a_number_shows(broken: float) -> None:
    divergence = measure([logs(0.5, 0.5)], [np.array([broken, 0.0], np.float32)], [0])
    assert math.isnan(divergence.mean)
    assert divergence.candidate_perplexity is not None
    assert math.isnan(divergence.candidate_perplexity)


def test_what_cannot_be_compared() -> None:
    p = logs(0.5, 0.5)
    with pytest.raises(ValueError, match="two vectors"):
        kl_divergence(p, logs(0.5, 0.25, 0.25))
    with pytest.raises(ValueError, match="two vectors"):
        measure([p], [logs(0.5, 0.25, 0.25)])
    with pytest.raises(ValueError, match="fewer tokens"):
        measure([p, p], [p, p], [0])
    with pytest.raises(ValueError, match="no position"):
        measure([], [])
    with pytest.raises(ValueError, match="zip"):
        measure([p, p], [p])
