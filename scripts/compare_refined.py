"""What refined codes do to a small trained model: KL divergence of identical types, stock and refined.

    python scripts/train_tiny.py -o /tmp/trained --steps 1000
    python scripts/compare_refined.py /tmp/trained                          Q4_K_M and Q3_K_M
    python scripts/compare_refined.py /tmp/trained --recipe Q4_K_S --chunks 200

Each recipe is written with the same importances three times: as it is, refined with correlations in blocks of 256
columns, and with whole ones; and once more refined in blocks, its two embedding tables left as they are. All are run in
llama.cpp over the checkpoint's held_out.txt, the second half of each window scored, against transformers in float32.
Importances and correlations are of the same chunks of train.txt.

The interval is that of the change of the mean, from 2,000 draws of windows, the same windows for both files.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gguf3n
from gguf3n.engines.activations import BLOCKS, FULL, measure_chunks
from gguf3n.engines.llama_cpp import open_llama_cpp
from gguf3n.formats.correlations import Correlations
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD
from workshop.quality import Options, Yardstick, scored, yardstick_of
from workshop.training import TRAIN

DRAWS = 2000


def measured(checkpoint: Path, kind: str, options: Options) -> tuple[gguf3n.ImportanceMatrix, Correlations]:
    """Importances and correlations of the same chunks."""
    chunks = measure_chunks(
        checkpoint,
        [checkpoint / TRAIN],
        n_ctx=options.ctx,
        n_chunks=options.imatrix_chunks,
        correlations=kind,
        device="cpu",
    )
    (last,) = deque(chunks, maxlen=1)
    assert last.correlations is not None
    return last.imatrix, last.correlations


def divergences(path: Path, yardstick: Yardstick, n_ctx: int) -> NDArray[np.float64]:
    """Mean divergence of each window."""
    engine = open_llama_cpp(path, n_ctx=n_ctx, n_threads=1)
    try:
        found = np.array(list(_divergences(yardstick, scored(engine, yardstick.windows))))
    finally:
        engine.close()
    means: NDArray[np.float64] = found.reshape(len(yardstick.windows), -1).mean(axis=1)
    return means


def _divergences(yardstick: Yardstick, rows: Iterator[NDArray[np.float32]]) -> Iterator[float]:
    for expected, found in zip(yardstick.rows, rows, strict=True):
        p, q = expected.astype(np.float64), found.astype(np.float64)
        yield float((np.exp(p) * (p - q)).sum())


def change(one: NDArray[np.float64], other: NDArray[np.float64]) -> str:
    """How much less the other is, with the middle 95 % of the draws."""
    rng = np.random.default_rng(0)
    places = rng.integers(0, len(one), (DRAWS, len(one)))
    draws = other[places].mean(axis=1) / one[places].mean(axis=1) - 1
    low, high = np.percentile(draws, (2.5, 97.5))
    return f"{other.mean() / one.mean() - 1:+7.1%} ({low:+.1%} to {high:+.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--recipe", dest="recipes", nargs="+", default=["Q4_K_M", "Q3_K_M"], metavar="NAME")
    parser.add_argument("--chunks", type=int, default=Options().imatrix_chunks, help="of the training text")
    parser.add_argument("--windows", type=int, default=Options().windows, help="of the held-out text")
    parser.add_argument("--ctx", type=int, default=Options().ctx, help="tokens of both")
    given = parser.parse_args()
    options = Options(ctx=given.ctx, windows=given.windows, imatrix_chunks=given.chunks, threads=1)
    imatrix, blocks = measured(given.checkpoint, BLOCKS, options)
    _, whole = measured(given.checkpoint, FULL, options)
    tables = (TOKEN_EMBD, PER_LAYER_TOKEN_EMBD)
    layers = replace(blocks, entries={name: entry for name, entry in blocks.entries.items() if name not in tables})
    ways = {"stock": None, "blocks": blocks, "full": whole, "blocks, layers": layers}
    with tempfile.TemporaryDirectory() as directory:
        stored = Path(directory, "imatrix.gguf")
        gguf3n.write_imatrix(imatrix, stored)
        yardstick = yardstick_of(given.checkpoint, replace(options, imatrix=stored))
        n_tokens = int(imatrix.entries["blk.0.attn_q.weight"].counts.max())
        n_positions = len(yardstick.rows)
        print(f"{n_tokens:,} tokens measured, {n_positions:,} positions scored; KL in thousandths of a nat", flush=True)
        for name in given.recipes:
            stock: NDArray[np.float64] | None = None
            for way, correlations in ways.items():
                path = Path(directory, "candidate.gguf")
                gguf3n.convert(given.checkpoint, name, path, imatrix=stored, refine=correlations, force=True)
                found = divergences(path, yardstick, options.ctx)
                stock = found if stock is None else stock
                print(f"{name:8} {way:15} {1000 * found.mean():8.4f}  {change(stock, found)}", flush=True)


if __name__ == "__main__":
    main()
