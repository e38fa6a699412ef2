"""How far a candidate's next-token distributions are from a reference's.

At each position of a text, with P the reference's distribution over the vocabulary and Q the candidate's:

    KL(P || Q) = sum_i p_i (log p_i - log q_i)

It is zero where the two agree, counts a token in proportion to how likely the reference holds it, and is infinite where
the candidate rules out what the reference does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Divergence:
    """The divergence over the positions of a text.

    Units: the KL divergences in nats.
    """

    n_positions: int
    mean: float
    median: float
    p99: float
    maximum: float
    top1_agreement: float
    """Share of positions at which both hold the same token most likely."""


def kl_divergence(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
    """KL(reference || candidate) of one position, in float64.

    Shapes: logits or log-probabilities, `[vocab]` each; they are normalized here, so a shift does not matter.
    """
    if reference.shape != candidate.shape or reference.ndim != 1:
        raise ValueError(f"two vectors of one length, not {reference.shape} and {candidate.shape}")
    p_log, q_log = _log_softmax(reference), _log_softmax(candidate)
    p = np.exp(p_log)
    likely = p > 0
    return float(np.sum(p[likely] * (p_log[likely] - q_log[likely])))


def measure(reference: Iterable[NDArray[np.float32]], candidate: Iterable[NDArray[np.float32]]) -> Divergence:
    """Both streams position by position; what is kept is one number a position.

    Raises: ValueError: one stream is longer, or both are empty.
    """
    divergences, n_same = [], 0
    for p, q in zip(reference, candidate, strict=True):
        divergences.append(kl_divergence(p, q))
        n_same += int(p.argmax() == q.argmax())
    if not divergences:
        raise ValueError("no position to measure")
    values = np.array(divergences)
    return Divergence(
        n_positions=len(values),
        mean=float(values.mean()),
        median=float(np.median(values)),
        p99=float(np.quantile(values, 0.99)),
        maximum=float(values.max()),
        top1_agreement=n_same / len(values),
    )


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
