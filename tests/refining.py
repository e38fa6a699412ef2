"""Correlations for tests: of inputs that go together, as a model's do."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gguf3n.formats.correlations import BLOCK, Correlations, Entry
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.refinement import entry_name

N_INPUTS = 4096


def sums_of(x: np.ndarray, width: int = BLOCK) -> np.ndarray:
    """Sums of products in blocks, as a file has them."""
    n = x.shape[1]
    width = min(width, n)
    sums = np.zeros((n, width), np.float32)
    for start in range(0, n, width):
        part = x[:, start : start + width].astype(np.float64)
        square = (part.T @ part).astype(np.float32)
        sums[start : start + width, : part.shape[1]] = (square + square.T) / 2
    return sums


def inputs(n_columns: int, seed: int = 0) -> np.ndarray:
    """A few directions and some noise; one column is large, one is never used."""
    rng = np.random.default_rng(seed)
    n_directions = max(n_columns // 4, 1)
    x = rng.standard_normal((N_INPUTS, n_directions)) @ rng.standard_normal((n_directions, n_columns))
    x = x / np.sqrt(n_directions) + rng.standard_normal(x.shape) / 2
    x[:, n_columns // 3] *= 30
    x[:, n_columns // 2] = 0
    return x


def of_arrays(arrays: dict[str, np.ndarray], path: Path = Path("correlations.gguf")) -> Correlations:
    """A file of these sums, in memory."""
    entries = {name: Entry(sums.shape[0], sums.shape[1], N_INPUTS) for name, sums in arrays.items()}
    return Correlations(path, entries, arrays.__getitem__, ("text",), 100)


def of_part(part: Part, width: int = BLOCK) -> Correlations:
    """An entry for every matrix that is quantized and evaluated."""
    names = {
        entry_name(tensor.name): tensor.n_per_row
        for tensor in part.tensors
        if tensor.storage is Storage.QUANTIZABLE and tensor.evaluated
    }
    return of_arrays({name: sums_of(inputs(n), width) for name, n in names.items()})


def errors(difference: np.ndarray, correlations: np.ndarray) -> np.ndarray:
    """r H r^T of each row's blocks, in float64. Shapes: [n_rows, n_blocks]."""
    width = correlations.shape[1]
    found = []
    for start in range(0, difference.shape[1], width):
        part = difference[:, start : start + width].astype(np.float64)
        square = correlations[start : start + width, : part.shape[1]].astype(np.float64)
        found.append(((part @ square) * part).sum(axis=1))
    return np.stack(found, axis=1)
