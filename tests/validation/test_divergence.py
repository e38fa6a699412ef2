"""The divergence measure against distributions whose divergence is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gguf3n.validation.divergence import kl_divergence, measure


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


def test_what_cannot_be_compared() -> None:
    p = logs(0.5, 0.5)
    with pytest.raises(ValueError, match="two vectors"):
        kl_divergence(p, logs(0.5, 0.25, 0.25))
    with pytest.raises(ValueError, match="no position"):
        measure([], [])
    with pytest.raises(ValueError, match="zip"):
        measure([p, p], [p])
