"""How far a candidate's next-token distributions are from a reference's.

At each position of a text, with P the reference's distribution over the vocabulary and Q the candidate's:

    KL(P || Q) = sum_i p_i (log p_i - log q_i)

It is zero where the two agree, counts a token in proportion to how likely the reference holds it, and is infinite where
the candidate rules out what the reference does not. Perplexity is another question, how likely a model holds the token
that the text goes on with: exp of the mean of -log p of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.distribution import log_softmax

N_LIKELY = 5
"""The tokens that a sampler mostly chooses from."""


@dataclass(frozen=True)
class Divergence:
    """The divergence over the positions of a text.

    Units: the KL divergences in nats.
    """

    n_positions: int
    mean: float
    median: float
    p95: float
    p99: float
    maximum: float
    top1_agreement: float
    """Share of positions at which both hold the same token most likely."""
    top5_agreement: float
    """Mean share of the reference's five most likely tokens that are among the candidate's five."""
    reference_perplexity: float | None = None
    """None where it was not said what follows each position."""
    candidate_perplexity: float | None = None


def kl_divergence(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
    """KL(reference || candidate) of one position, in float64.

    Shapes: logits or log-probabilities, `[vocab]` each; they are normalized here, so a shift does not matter.
    """
    if reference.shape != candidate.shape or reference.ndim != 1:
        raise ValueError(f"two vectors of one length, not {reference.shape} and {candidate.shape}")
    return _kl_divergence(log_softmax(reference), log_softmax(candidate), -math.inf)


def measure(
    reference: Iterable[NDArray[np.float32]],
    candidate: Iterable[NDArray[np.float32]],
    following: Iterable[int] | None = None,
    *,
    floor: float | None = None,
) -> Divergence:
    """Both streams position by position; what is kept is a few numbers a position.

    Args:
        following: the token that follows each position, for the perplexities.
        floor: the reference has log-probabilities that are known down to this only; they are taken as they are, without
            normalizing, and what is not above it is left out of the divergence.

    Raises: ValueError: one stream is longer, or both are empty.
    """
    divergences: list[float] = []
    n_same, n_shared, p_costs, q_costs = 0, 0, 0.0, 0.0
    tokens = None if following is None else iter(following)
    for p, q in zip(reference, candidate, strict=True):
        if p.shape != q.shape or p.ndim != 1:
            raise ValueError(f"two vectors of one length, not {p.shape} and {q.shape}")
        p_log = log_softmax(p) if floor is None else p.astype(np.float64)
        q_log = log_softmax(q)
        divergences.append(_kl_divergence(p_log, q_log, -math.inf if floor is None else floor))
        n_same += int(p.argmax() == q.argmax())
        n_shared += len(np.intersect1d(_likely(p), _likely(q), assume_unique=True))
        if tokens is not None:
            token = next(tokens, None)
            if token is None:
                raise ValueError("fewer tokens that follow than positions")
            p_costs -= float(p_log[token])
            q_costs -= float(q_log[token])
    if not divergences:
        raise ValueError("no position to measure")
    values, n = np.array(divergences), len(divergences)
    with np.errstate(invalid="ignore"):  # between two infinite ones is no number
        median, p95, p99 = np.quantile(values, (0.5, 0.95, 0.99))
    return Divergence(
        n_positions=n,
        mean=float(values.mean()),
        median=float(median),
        p95=float(p95),
        p99=float(p99),
        maximum=float(values.max()),
        top1_agreement=n_same / n,
        top5_agreement=n_shared / (n * min(N_LIKELY, len(p))),
        reference_perplexity=None if tokens is None else _perplexity(p_costs / n),
        candidate_perplexity=None if tokens is None else _perplexity(q_costs / n),
    )


def _kl_divergence(p_log: NDArray[np.float64], q_log: NDArray[np.float64], floor: float) -> float:
    known = ~(p_log <= floor)  # what is not a number is none in the result either
    if not known.all():
        p_log, q_log = p_log[known], q_log[known]
    p = np.exp(p_log)
    likely = p != 0
    if not likely.all():
        p, p_log, q_log = p[likely], p_log[likely], q_log[likely]
    return float(p @ (p_log - q_log))


def _likely(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    n = min(N_LIKELY, len(logits))
    return np.argpartition(logits, len(logits) - n)[-n:]


def _perplexity(cost: float) -> float:
    try:
        return math.exp(cost)
    except OverflowError:
        return math.inf
