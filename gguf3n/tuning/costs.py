"""One figure for each tensor and type, from all that was measured.

    diagonal    hardly varies, but takes the errors of weights as independent of each other
    fisher      needs no such assumption, and varies as much as it is large

The first ranks types, the second says by how much the first is wrong for a tensor, whatever the type: their ratio, the
mean over types. Of a few chunks it is mostly chance, so it is drawn towards 1 as if PRIOR_CHUNKS more had given that.

Tables: the larger of the figures for the rows that the text uses, and for the mean row.
"""

from __future__ import annotations

from collections.abc import Mapping

from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.sensitivity import Sensitivity, TensorSums

Costs = Mapping[str, Mapping[QType, float]]
"""By tensor and type. Units: nats a token."""

PRIOR_CHUNKS = 64


def costs_of(sensitivity: Sensitivity) -> Costs:
    """What each tensor costs in each type that was measured."""
    return {name: _costs(tensor, sensitivity.n_chunks) for name, tensor in sensitivity.tensors.items()}


def _costs(tensor: TensorSums, n_chunks: int) -> dict[QType, float]:
    ratios = [sums.fisher / sums.diagonal for sums in tensor.types.values() if sums.diagonal > 0]
    found = sum(ratios) / len(ratios) if ratios else 1.0
    ratio = (n_chunks * found + PRIOR_CHUNKS) / (n_chunks + PRIOR_CHUNKS)
    return {qtype: ratio * max(sums.diagonal, sums.rows or 0.0) / n_chunks for qtype, sums in tensor.types.items()}
