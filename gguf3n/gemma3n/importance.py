"""An importance matrix held against the model it is used for, before any work.

Source: what is an error, a warning or silence in llama-quantize (src/llama-quant.cpp, tools/quantize/quantize.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import QuantizationError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.imatrix import ImportanceMatrix
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import Part

NAMES_SHOWN = 3


@dataclass(frozen=True)
class Importance:
    """Importances that fit the model.

    Shapes: quant_weights float32[n_per_row], by GGUF name.
    `keys` are those that llama-quantize writes; `notices` say what of the file or the model is not covered.
    """

    path: Path
    quant_weights: Mapping[str, NDArray[np.float32]]
    keys: tuple[KeyValue, ...]
    notices: tuple[str, ...]


def match_importance(imatrix: ImportanceMatrix, part: Part) -> Importance:
    """Check every entry against the model's tensors.

    Raises: QuantizationError for a file that was made for another model: no name that matches, or a length that does
        not fit.
    """
    tensors = {tensor.name: tensor for tensor in part.tensors}
    unknown = [name for name in imatrix.entries if name not in tensors]
    if len(unknown) == len(imatrix.entries):
        raise QuantizationError(
            f"{imatrix.path}: an importance matrix of another model",
            expected="entries named like blk.0.attn_q.weight",
            found=some_names(unknown),
            fix="use one that was measured on this model or its base",
        )
    weights: dict[str, NDArray[np.float32]] = {}
    uncounted, dead = [], []
    for name, entry in imatrix.entries.items():
        if name not in tensors:
            continue
        n_per_row = tensors[name].n_per_row
        if entry.sums.size != n_per_row:
            raise QuantizationError(
                f"{imatrix.path}: entry {name!r} does not fit the model",
                expected=f"{n_per_row} columns",
                found=f"{entry.sums.size}",
                fix="use an importance matrix that was measured on this model or its base",
            )
        if not (entry.counts > 0).all():
            uncounted.append(name)
        weights[name] = np.ascontiguousarray(entry.quant_weights.reshape(-1))
        if not weights[name].any():
            dead.append(name)
    wanted = [t.name for t in part.tensors if t.storage is Storage.QUANTIZABLE and t.bid is not None and t.evaluated]
    lacking = [name for name in wanted if name not in weights]
    notices = []
    for names, what in (
        (unknown, "have no tensor in this model and are not used"),
        (uncounted, "counted no input, so all their columns weigh the same"),
        (dead, "have importances that are all zero: llama.cpp writes zeros, or next to nothing, for these tensors"),
    ):
        if names:
            notices.append(f"{imatrix.path}: {len(names)} entries {what}: {some_names(names)}")
    if lacking:
        notices.append(f"{imatrix.path}: no entry for {len(lacking)} of {len(wanted)} matrices: {some_names(lacking)}")
    return Importance(imatrix.path, weights, _keys(imatrix), tuple(notices))


def _keys(imatrix: ImportanceMatrix) -> tuple[KeyValue, ...]:
    keys = [KeyValue("quantize.imatrix.file", GGUFValueType.STRING, str(imatrix.path))]
    if imatrix.datasets:
        keys.append(KeyValue("quantize.imatrix.dataset", GGUFValueType.STRING, imatrix.datasets[0]))
    keys.append(KeyValue("quantize.imatrix.entries_count", GGUFValueType.UINT32, len(imatrix.entries)))
    if imatrix.chunk_count > 0:
        keys.append(KeyValue("quantize.imatrix.chunks_count", GGUFValueType.UINT32, imatrix.chunk_count))
    return tuple(keys)


def some_names(names: list[str]) -> str:
    """The first of them."""
    return ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
