"""What a model says comes next, as log-probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities of logits, in float64."""
    shifted = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # an infinite logit makes a row that is no number
        shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
