"""What may have happened to a tensor that differs from its source: a table, of which the first that fits is told.

A few rows are compared with what a fault would have made of the source: other rows of the tensor, other tensors, the
transposed one. Rows fit where they are about as near as the type allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.rows import Values
from gguf3n.gemma3n.mapping import MappedTensor
from gguf3n.validation.bands import HOLDS, Spread
from gguf3n.validation.evidence import Evidence
from gguf3n.validation.weights import Pair, WeightReader
from gguf3n.validation.yardsticks import error, row_errors

MAX_ROWS = 8
"""That are compared with what a fault would have made."""
NEAR = 2.0
"""Times the type's own error; a tenth of that of strangers in all types but IQ1, where EVEN_SO decides."""
EVEN_SO = 0.95
EXACT = 1e-3
CLEAR_FACTOR = 0.03
"""Or half of the type's own error, if that is more. Why: importances make rows a little longer or shorter."""
SMOOTH = 0.1
"""Spread of a constant's differences, relative to it."""
MOST = 0.75
"""Of the rows must be found elsewhere. Why: a shift loses the first or the last; padding rows are all alike."""
VERSION = 0.5
"""Cosine above which a tensor is another version and not another tensor."""


@dataclass(frozen=True)
class Suspect:
    """Rows that are not what they should be."""

    pair: Pair
    evidence: Evidence
    allowed: Spread
    reader: WeightReader
    tensors: Sequence[MappedTensor]

    @property
    def x(self) -> Values:
        return self.evidence.x

    @property
    def q(self) -> Values:
        return self.evidence.q

    @property
    def near(self) -> float:
        """The relative error of rows that can have been made from one another."""
        return min(NEAR * self.evidence.own_error + EXACT, EVEN_SO)

    def fits(self, y: Values, q: Values | None = None) -> bool:
        """Whether the file's rows can have been made from these."""
        return error(y, self.q if q is None else q) <= self.near


def _not_finite(suspect: Suspect) -> str | None:
    if not np.isfinite(suspect.x).all():
        return "values that are not finite, in the source"
    return None if np.isfinite(suspect.q).all() else "values that are not finite"


def _vanished(suspect: Suspect) -> str | None:
    return None if suspect.q.any() else "zeros"


def _not_zero(suspect: Suspect) -> str | None:
    return None if suspect.x.any() else "values where the source has zeros"


def _shifted_values(suspect: Suspect) -> str | None:
    differences = suspect.q.astype(np.float64) - suspect.x
    shift = float(differences.mean())
    if shift == 0 or float(differences.std()) > SMOOTH * abs(shift):
        return None
    text = f"every value is {abs(shift):.3g} {'more' if shift > 0 else 'less'} than in the source"
    if len(suspect.pair.source.shape) == 1 and abs(shift - 1) < SMOOTH**2:
        text += " (Gemma 3n's norms are stored without 1 added)"
    return text


def _scaled(suspect: Suspect) -> str | None:
    x, q, own = (values.astype(np.float64) for values in (suspect.x, suspect.q, suspect.evidence.own))
    factor = float((x * q).sum() / ((x * own).sum() or 1.0))
    if abs(factor - 1) < max(CLEAR_FACTOR, suspect.evidence.own_error / 2) or abs(factor) < CLEAR_FACTOR:
        return None
    return f"scaled by {factor:.3g}" if suspect.fits(suspect.x, (q / factor).astype(np.float32)) else None


def _near_version(suspect: Suspect) -> str | None:
    """Why here: rows near their own source need no search."""
    return _version(suspect) if suspect.fits(suspect.x) else None


def _other_tensor(suspect: Suspect) -> str | None:
    source = suspect.pair.source

    def distance(tensor: MappedTensor) -> int:
        return abs((tensor.bid or 0) - (source.bid or 0))

    same_shape = [t for t in suspect.tensors if t.name != source.name and t.shape == source.shape and not t.missing]
    for tensor in sorted(same_shape, key=distance):
        if suspect.fits(suspect.reader.source_rows(tensor, suspect.evidence.rows)):
            return f"the values of {tensor.name}"
    return None


def _other_rows(suspect: Suspect) -> str | None:
    source, rows = suspect.pair.source, suspect.evidence.rows
    if source.n_rows == 1:
        return None
    if len(source.shape) == 3:
        firsts = np.arange(source.shape[0], dtype=np.int64) * source.shape[1]
        q = suspect.reader.values(suspect.reader.blocks(suspect.pair, firsts), suspect.pair)
        places, found = _places(suspect, q)
        if found.all() and not (places % source.shape[1]).any():
            return f"its matrices in another order: {', '.join(map(str, (places // source.shape[1]).tolist()))}"
    places, found = _places(suspect, suspect.q)
    if found.mean() < MOST:
        return None
    row, place = rows[found][0], places[found][0]
    offsets, counts = np.unique((places - rows)[found], return_counts=True)
    if counts.max() >= MOST * len(rows):
        return f"its rows shifted by {offsets[counts.argmax()]:+d}"
    return f"its rows in another order: row {row} is the source's row {place}"


def _places(suspect: Suspect, q: Values) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Which rows of the source these are nearest to, and whether they fit."""
    best = np.full(len(q), np.inf)
    places = np.zeros(len(q), np.int64)
    with np.errstate(all="ignore"):
        for first, y in suspect.reader.source_chunks(suspect.pair.source):
            distances = 1 + (np.einsum("ij,ij->i", q, q)[:, None] - 2 * q @ y.T) / np.einsum("ij,ij->i", y, y)
            distances[~np.isfinite(distances)] = np.inf
            nearest = distances.argmin(axis=1)
            distance = distances[np.arange(len(q)), nearest]
            places = np.where(distance < best, first + nearest, places)
            best = np.minimum(distance, best)
    return places, row_errors(suspect.reader.source_rows(suspect.pair.source, places), q) <= suspect.near


def _transposed(suspect: Suspect) -> str | None:
    """The bytes of each matrix transposed, under the shape that it had before."""
    shape = suspect.pair.source.shape
    if len(shape) < 2:
        return None
    n_rows, n_columns = shape[-2:]
    rows = suspect.evidence.rows
    matrices = rows // n_rows
    flat = (rows % n_rows)[:, None] * n_columns + np.arange(n_columns)
    from_rows, from_columns = matrices[:, None] * n_rows + flat % n_rows, flat // n_rows
    expected = np.zeros(suspect.q.shape, np.float32)
    for first, y in suspect.reader.source_chunks(suspect.pair.source):
        here = (from_rows >= first) & (from_rows < first + len(y))
        expected[here] = y[from_rows[here] - first, from_columns[here]]
    return "transposed" if suspect.fits(expected) else None


def _version(suspect: Suspect) -> str | None:
    evidence = suspect.evidence
    x, q = suspect.x.astype(np.float64), suspect.q.astype(np.float64)
    if float((x * q).sum()) < VERSION * float(np.sqrt((x * x).sum() * (q * q).sum())):
        return None
    if suspect.pair.qtype in HOLDS:
        return f"another version of this tensor, {evidence.error:.2%} away"
    if evidence.is_made_from_source(suspect.allowed):
        return "a greater loss than it should be"
    share = float(evidence.misplaced.mean())
    return f"another version of this tensor: {share:.2%} of its weights lie where the source's would not"


DIAGNOSES: tuple[Callable[[Suspect], str | None], ...] = (
    _not_finite,
    _vanished,
    _not_zero,
    _shifted_values,
    _scaled,
    _near_version,
    _other_tensor,
    _other_rows,
    _transposed,
    _version,
)
SEARCHES = frozenset({_other_tensor, _other_rows, _transposed})
"""Those that read other rows, at worst all of the tensor."""


def diagnose(suspect: Suspect, *, search: bool = True) -> str:
    """What the rows look like."""
    for look in DIAGNOSES:
        if search or look not in SEARCHES:
            text = look(suspect)
            if text is not None:
                return text
    return "something else"
