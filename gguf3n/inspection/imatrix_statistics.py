"""What an importance matrix says of a model's activations: entry by entry, and layer by layer.

Of an entry, x being the mean squared activation of each input column:

    total      sum of x                         minimum, maximum, mean, deviation   of x
    active     share of x above 1e-5            entropy   of x / total, in bits; evenness is its share of log2(n)
    zd         share of x more than one deviation above the mean
    cosine     between the entry and that of the layer before

Of a layer the means of total, zd and cosine over its entries, each weighted by its number of columns.

Source: compute_statistics, compute_cossim and show_statistics of tools/imatrix/imatrix.cpp of llama.cpp, which computes
in float32; this computes in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.imatrix import Entry, ImportanceMatrix

ACTIVE = 1e-5
"""Mean squares up to this are those of columns that do nothing."""

LAYER = re.compile(r"blk\.([0-9]{1,9})\.")


@dataclass(frozen=True)
class EntryStatistics:
    """One entry; `tensor` is its name without layer and suffix. `cosine` is None where no layer before has such a one.

    Units: entropy in bits; active, evenness and zd are shares of one.
    """

    name: str
    bid: int | None
    tensor: str
    n: int
    total: float
    minimum: float
    maximum: float
    mean: float
    deviation: float
    active: float
    entropy: float
    evenness: float
    zd: float
    cosine: float | None


@dataclass(frozen=True)
class LayerStatistics:
    """Means over a layer's entries, weighted by their columns."""

    bid: int
    total: float
    zd: float
    cosine: float | None


@dataclass(frozen=True)
class ImatrixStatistics:
    """Entries by tensor, the largest total first; layers in order."""

    entries: tuple[EntryStatistics, ...]
    layers: tuple[LayerStatistics, ...]


def imatrix_statistics(imatrix: ImportanceMatrix) -> ImatrixStatistics:
    """Statistics of every entry that counts any activation."""
    counted = {name: entry for name, entry in imatrix.entries.items() if (entry.counts > 0).any()}
    entries = [_entry(name, counted) for name in counted]
    entries.sort(key=lambda each: (each.tensor, -each.total))
    bids = sorted({each.bid for each in entries if each.bid is not None})
    layers = [_layer(bid, [each for each in entries if each.bid == bid]) for bid in bids]
    return ImatrixStatistics(tuple(entries), tuple(layers))


def _entry(name: str, entries: Mapping[str, Entry]) -> EntryStatistics:
    entry = entries[name]
    found = LAYER.search(name)
    used = entry.counts > 0
    x = (entry.sums[used] / entry.counts[used, None]).astype(np.float64).reshape(-1)
    total, mean = float(x.sum()), float(x.mean())
    deviation = math.sqrt(max(0.0, float(np.square(x).mean()) - mean * mean))
    shares = x[x > 0] / total if total > 0 else x[:0]
    entropy = float(-(shares * np.log2(shares)).sum())
    return EntryStatistics(
        name=name,
        bid=int(found[1]) if found else None,
        tensor=name.removesuffix(".weight").rpartition(".")[2],
        n=x.size,
        total=total,
        minimum=float(x.min()),
        maximum=float(x.max()),
        mean=mean,
        deviation=deviation,
        active=float((x > ACTIVE).mean()),
        entropy=entropy,
        evenness=entropy / math.log2(x.size) if x.size > 1 else 0.0,
        zd=float((x > mean + deviation).mean()) if deviation > 0 else 0.0,
        cosine=_cosine(entry.sums, entries.get(_layer_before(name))),
    )


def _layer_before(name: str) -> str:
    return LAYER.sub(lambda found: f"blk.{int(found[1]) - 1}.", name, count=1)


def _cosine(sums: NDArray[np.float32], before: Entry | None) -> float | None:
    if before is None or before.sums is sums or before.sums.shape != sums.shape:
        return None
    one, other = sums.astype(np.float64).reshape(-1), before.sums.astype(np.float64).reshape(-1)
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size > 0 else None


def _layer(bid: int, entries: Sequence[EntryStatistics]) -> LayerStatistics:
    columns = sum(each.n for each in entries)
    compared = [(each.n, each.cosine) for each in entries if each.cosine is not None]
    return LayerStatistics(
        bid=bid,
        total=sum(each.n * each.total for each in entries) / columns,
        zd=sum(each.n * each.zd for each in entries) / columns,
        cosine=sum(n * cosine for n, cosine in compared) / sum(n for n, _ in compared) if compared else None,
    )
