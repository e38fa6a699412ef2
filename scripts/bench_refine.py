"""Throughput of quantizing with importances and of refining the codes after it: same rows, same process, one core.

    python scripts/bench_refine.py               every type whose codes can be refined
    python scripts/bench_refine.py Q4_K Q3_K     these types
    python scripts/bench_refine.py --full        with the correlations of all columns

The two take turns, so that a busy machine slows both. Each figure is a median, in million weights a second of the
thread's own time; the last column is what refining leaves of the error tr((W - Q) H (W - Q)^T).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.formats.correlations import BLOCK, Correlations, Entry
from gguf3n.formats.gguf_layout import row_bytes
from gguf3n.quants import QUANTIZERS
from gguf3n.quants.api import dequantize
from gguf3n.quants.refinement import refine_rows
from gguf3n.quants.unpacked import PARTS
from workshop.timing import machine

N_ROWS, N_PER_ROW, N_INPUTS = 128, 2048, 1024
"""Rows of a chunk of a conversion."""


def inputs() -> np.ndarray:
    """Correlated inputs, of which one column is large."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((N_INPUTS, N_PER_ROW // 4)) @ rng.standard_normal((N_PER_ROW // 4, N_PER_ROW)) / 16
    found += rng.standard_normal(found.shape) / 2
    found[:, 7] *= 30
    return found


def correlations(x: np.ndarray, width: int) -> np.ndarray:
    """What a file of these inputs gives."""
    blocks = [x[:, start : start + width].T @ x[:, start : start + width] for start in range(0, x.shape[1], width)]
    sums = np.concatenate(blocks).astype(np.float32)
    entry = Entry(x.shape[1], width, len(x))
    return Correlations(Path("measured"), {"": entry}, lambda _: sums).matrix("")


def error(difference: np.ndarray, H: np.ndarray) -> float:
    """tr(R H R^T)."""
    total = 0.0
    for start in range(0, difference.shape[1], H.shape[1]):
        part = difference[:, start : start + H.shape[1]].astype(np.float64)
        total += float(((part @ H[start : start + H.shape[1]]) * part).sum())
    return total


def own_seconds(call: Callable[..., object], *arguments: object) -> float:
    """Of this thread alone."""
    started = time.thread_time()
    call(*arguments)
    return time.thread_time() - started


def line(qtype: QType, rows: np.ndarray, quant_weights: np.ndarray, H: np.ndarray, turns: int) -> str:
    """A type's row of the table."""
    quantize = QUANTIZERS[qtype].weighted
    assert quantize is not None
    plain = np.empty((N_ROWS, row_bytes(qtype, N_PER_ROW)), np.uint8)
    quantize(rows, quant_weights, plain)
    refined = plain.copy()
    refine_rows(rows, qtype, H, refined)
    samples = []
    for _ in range(turns):
        out = np.empty_like(plain)
        samples.append((own_seconds(quantize, rows, quant_weights, out), own_seconds(refine_rows, rows, qtype, H, out)))
        assert np.array_equal(out, refined)
    left = error(rows - dequantize(refined, qtype), H) / error(rows - dequantize(plain, qtype), H)
    rates = [
        rows.size / 1e6 / statistics.median(seconds)
        for seconds in (*zip(*samples, strict=True), [sum(sample) for sample in samples])
    ]
    return f"{qtype.name:8}{''.join(f'{rate:10.1f}' for rate in rates)}{left:10.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=[qtype.name for qtype in PARTS])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    rows = (np.random.default_rng(1).standard_normal((N_ROWS, N_PER_ROW)) / 50).astype(np.float32)
    x = inputs()
    H = correlations(x, N_PER_ROW if options.full else BLOCK)
    quant_weights = (x * x).mean(axis=0).astype(np.float32)
    print(f"{machine()}; {N_ROWS} x {N_PER_ROW}, blocks of {H.shape[1]}; million weights a second, one core")
    print(f"{'':8}{'quantize':>10}{'refine':>10}{'both':>10}{'error':>10}")
    for name in options.types:
        print(line(QType[name], rows, quant_weights, H, options.turns), flush=True)


if __name__ == "__main__":
    main()
