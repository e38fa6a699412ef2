"""Correlations held against the model whose codes they are to refine, before any work."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import QuantizationError
from gguf3n.formats.correlations import Correlations, block_width
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType
from gguf3n.gemma3n.config import Config
from gguf3n.gemma3n.importance import some_names
from gguf3n.gemma3n.mapping import Rule, Storage
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.text import dimensions, written_order

SAME_INPUT: Mapping[str, str] = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
"""Matrices that read what another one reads, which has the entry for both."""

REFINE_KEYS = "quantize.refine."
N_HELD = 2
"""Correlations that are kept in memory: of the tensor in work, and of the next one where workers have come so far."""

ENOUGH = 8
"""Inputs for each column of a block. Why: of fewer, much of what seems to go together does so by chance, and what is
gained on these inputs is lost on others."""

LARGE = 64 << 20
"""Bytes of an entry, more than the rest of a conversion takes; of blocks, E4B's largest has 17 million."""


def entry_name(name: str) -> str:
    """The entry that a tensor's correlations are in, as blk.3.attn_q.weight for blk.3.attn_k.weight."""
    parts = name.split(".")
    return ".".join(SAME_INPUT.get(part, part) for part in parts)


def has_own_entry(rule: Rule, bid: int | None) -> bool:
    """Whether correlations are measured for a tensor of a layer: a matrix that is quantized, the first of its input."""
    name = rule.name(bid)
    return bid is not None and rule.storage is Storage.QUANTIZABLE and entry_name(name) == name


def measured_bytes(config: Config, *, whole: bool) -> int:
    """Of all correlations of a model's layers."""
    lengths = [
        dimensions(config, bid)[rule.shape[-1]]
        for rule, bid in written_order(config.num_hidden_layers)
        if has_own_entry(rule, bid)
    ]
    return sum(4 * n * block_width(n, whole=whole) for n in lengths)


class Refinement:
    """Correlations that fit the model: of each tensor those of its inputs.

    `keys` are what a file says of how it was refined; `notices` what of the file or the model is not covered.
    """

    def __init__(self, correlations: Correlations, names: Mapping[str, str], notices: tuple[str, ...]) -> None:
        self.path: Path = correlations.path
        self.entries = dict(names)
        """The entry of each tensor that has one."""
        self.notices = notices
        self.keys = _keys(correlations)
        self._correlations = correlations
        self._held: dict[str, NDArray[np.float32]] = {}
        self._lock = threading.Lock()

    def refines(self, name: str, qtype: QType) -> bool:
        """Whether a tensor's codes are refined in this type."""
        return name in self.entries and GGML_TYPES[qtype].refinable

    def correlations(self, name: str) -> NDArray[np.float32]:
        """E[x x^T] of a tensor's inputs, damped; may be called from several threads. Shapes: float32[n_columns, width].

        Raises: GGUFError for sums that no inputs can give.
        """
        entry = self.entries[name]
        with self._lock:
            if entry not in self._held:
                while len(self._held) >= N_HELD:
                    del self._held[next(iter(self._held))]
                self._held[entry] = self._correlations.matrix(entry)
            return self._held[entry]


def match_correlations(correlations: Correlations, part: Part) -> Refinement:
    """Check every entry against the model's tensors.

    Raises: QuantizationError for a file that was made for another model: no name that matches, or a length that does
        not fit.
    """
    tensors = {tensor.name: tensor for tensor in part.tensors}
    unknown = [name for name in correlations.entries if name not in tensors]
    if len(unknown) == len(correlations.entries):
        raise QuantizationError(
            f"{correlations.path}: correlations of another model",
            expected="entries named like blk.0.attn_q.weight",
            found=some_names(unknown),
            fix="use some that were measured on this model or its base",
        )
    names: dict[str, str] = {}
    lacking = []
    for tensor in part.tensors:
        if tensor.storage is not Storage.QUANTIZABLE or not tensor.evaluated:
            continue
        entry = correlations.entries.get(entry_name(tensor.name))
        if entry is None:
            lacking.append(tensor.name)
            continue
        if entry.n_columns != tensor.n_per_row:
            raise QuantizationError(
                f"{correlations.path}: entry {entry_name(tensor.name)!r} does not fit the model",
                expected=f"{tensor.n_per_row} columns",
                found=f"{entry.n_columns}",
                fix="use correlations that were measured on this model or its base",
            )
        names[tensor.name] = entry_name(tensor.name)
    notices = []
    if unknown:
        n = len(unknown)
        notices.append(f"{correlations.path}: {n} entries have no tensor in this model: {some_names(unknown)}")
    if lacking:
        notices.append(
            f"{correlations.path}: no entry for {len(lacking)} matrices, which are not refined: {some_names(lacking)}"
        )
    scarce = [name for name, entry in correlations.entries.items() if entry.count < ENOUGH * entry.width]
    if scarce:
        least = min(scarce, key=lambda name: correlations.entries[name].count / correlations.entries[name].width)
        entry = correlations.entries[least]
        notices.append(
            f"{correlations.path}: {len(scarce)} entries are of few inputs, {entry.count:,.0f} of {entry.width:,} "
            f"columns in {least}: {ENOUGH} for each column make better codes"
        )
    if correlations.largest_bytes > LARGE:
        held = (N_HELD + 1) * correlations.largest_bytes
        notices.append(f"{correlations.path}: refining takes up to {held / 1e9:,.1f} GB of memory for it")
    return Refinement(correlations, names, tuple(notices))


def _keys(correlations: Correlations) -> tuple[KeyValue, ...]:
    widths = {entry.width for entry in correlations.entries.values()}
    keys = [KeyValue(REFINE_KEYS + "file", GGUFValueType.STRING, str(correlations.path))]
    if correlations.datasets:
        keys.append(KeyValue(REFINE_KEYS + "dataset", GGUFValueType.STRING, correlations.datasets[0]))
    keys.append(KeyValue(REFINE_KEYS + "entries_count", GGUFValueType.UINT32, len(correlations.entries)))
    if correlations.n_chunks > 0:
        keys.append(KeyValue(REFINE_KEYS + "chunks_count", GGUFValueType.UINT32, correlations.n_chunks))
    keys.append(KeyValue(REFINE_KEYS + "width", GGUFValueType.UINT32, max(widths)))
    return tuple(keys)
