"""Compares our importance matrices with those of llama-imatrix: measured, merged, summed up in statistics.

    python scripts/compare_imatrix.py CHECKPOINT --text FILE [--ctx 512] [--chunks 8]     measured on the same text
    python scripts/compare_imatrix.py CHECKPOINT --text FILE --like-llama-cpp             see below
    python scripts/compare_imatrix.py --write-golden    record llama-imatrix's side of the tiny checkpoint for the tests

LLAMA_CPP_BIN names the directory of llama.cpp's compiled programs. Names and counts must be the same; values differ
with the engines, most where llama.cpp departs from transformers: its sparse layers cut at mean + 1.645 deviations with
n - 1 in the deviation's denominator where transformers has n, and its GELU is a table of float16. With --like-llama-cpp
the reference does the same, and what is left is rounding. Exit code 1 if anything else differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import gguf3n
from gguf3n.engines.activations import measure_chunks
from gguf3n.formats.imatrix import ImportanceMatrix, read_imatrix
from gguf3n.inspection.imatrix_statistics import imatrix_statistics
from workshop import checkpoints, llama_cpp_tools
from workshop.imatrix_comparison import (
    GOLDEN,
    LIMITS,
    N_CHUNKS,
    N_CTX,
    TEXT,
    distance,
    limit,
    merge_ours,
    merge_theirs,
    our_statistics,
    sample_files,
    statistics_differences,
    their_statistics,
)


def measure_theirs(source: Path, text: Path, n_ctx: int, n_chunks: int | None, directory: Path) -> ImportanceMatrix:
    """What llama-imatrix measures on the F32 file, keys and values cached in float32."""
    model, output = directory / "model.gguf", directory / "theirs.gguf"
    gguf3n.convert(source, "F32", model)
    command = [llama_cpp_tools.program("llama-imatrix"), "-m", str(model), "-f", str(text), "-o", str(output)]
    command += ["-c", str(n_ctx), "--chunks", str(n_chunks or -1), "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    log = llama_cpp_tools.run(command, with_log=True)
    print("llama-imatrix:", *re.findall(r"Final estimate: .*", log))
    return read_imatrix(output)


@contextlib.contextmanager
def like_llama_cpp() -> Iterator[None]:
    """The reference with llama.cpp's deviation and GELU."""
    import torch
    from transformers.models.gemma3n import modeling_gemma3n

    def gaussian_topk(_self: Any, gate: torch.Tensor) -> torch.Tensor:
        cutoff = gate.mean(-1, keepdim=True) + gate.std(-1, keepdim=True) * 1.6448534
        return torch.relu(gate - cutoff)

    class Gelu(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()

    with (
        mock.patch.object(modeling_gemma3n.Gemma3nTextMLP, "_gaussian_topk", gaussian_topk),
        mock.patch.object(modeling_gemma3n, "ACT2FN", {"gelu_pytorch_tanh": Gelu()}),
    ):
        yield


def compare_measured(ours: ImportanceMatrix, theirs: ImportanceMatrix) -> int:
    """Print how far each kind of matrix is; returns how many differences there should not be."""
    wrong = [f"only one has {name}" for name in sorted(set(ours.entries) ^ set(theirs.entries))]
    facts = ("chunk_count", "chunk_size", "datasets")
    wrong += [
        f"{fact}: {getattr(ours, fact)} and {getattr(theirs, fact)}"
        for fact in facts
        if getattr(ours, fact) != getattr(theirs, fact)
    ]
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, entry in ours.entries.items():
        if name not in theirs.entries:
            continue
        other = theirs.entries[name]
        if not np.array_equal(entry.counts, other.counts):
            wrong.append(f"{name}: {entry.counts} and {other.counts} inputs")
        apart = distance(entry.sums, other.sums)
        column = float(np.max(np.abs(entry.sums - other.sums) / other.sums.mean()))
        if apart > limit(name):
            wrong.append(f"{name}: {apart:.1e} apart")
        kind = name.split(".")[2] + (", sparse layers" if limit(name) == max(LIMITS.values()) else "")
        kinds.setdefault(kind, []).append((apart, column))
    print(f"{'matrix':26}{'entries':>8}{'norm':>10}{'column':>10}   largest relative differences")
    for kind, values in sorted(kinds.items()):
        apart, column = np.max(values, axis=0)
        print(f"{kind:26}{len(values):8}{apart:10.1e}{column:10.1e}")
    return report(wrong)


def report(wrong: Sequence[str]) -> int:
    for line in wrong:
        print(f"  {line}")
    return len(wrong)


def write_golden() -> None:
    """Record what llama-imatrix measures on the tiny checkpoint, and what it makes of sample_files."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        checkpoints.make(directory / "tiny", checkpoints.Options())
        measured = measure_theirs(directory / "tiny", TEXT, N_CTX, N_CHUNKS, directory)
        samples = sample_files(directory)
        golden = {
            "provenance": f"llama-imatrix of llama-cpp-python {llama_cpp_tools.VERSION}",
            "text": TEXT.name,
            "n_ctx": N_CTX,
            "n_chunks": N_CHUNKS,
            "chunk_count": measured.chunk_count,
            "entries": {
                name: {
                    "columns": entry.sums.size,
                    "count": int(entry.counts[0]),
                    "sum": float(entry.sums.astype(np.float64).sum()),
                    "norm": float(np.linalg.norm(entry.sums.astype(np.float64))),
                }
                for name, entry in measured.entries.items()
            },
            "merged": hashlib.sha256(merge_theirs(samples, directory / "merged.gguf")).hexdigest(),
            "statistics": their_statistics(samples[0]),
        }
    GOLDEN.write_text(json.dumps(golden, indent=0) + "\n", encoding="utf-8")
    print(GOLDEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", help="a checkpoint directory")
    parser.add_argument("--text", type=Path, default=TEXT, help="a text file")
    parser.add_argument("--ctx", type=int, default=N_CTX, help=f"tokens of a chunk, {N_CTX} by default")
    parser.add_argument("--chunks", type=int, help="all by default")
    parser.add_argument("--like-llama-cpp", action="store_true", help="run the reference with llama.cpp's departures")
    parser.add_argument("--write-golden", action="store_true", help="record llama-imatrix's side for the tests")
    options = parser.parse_args()
    if options.write_golden:
        write_golden()
        return
    if options.source is None:
        parser.error("name a checkpoint directory")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        theirs = measure_theirs(options.source, options.text, options.ctx, options.chunks, directory)
        with like_llama_cpp() if options.like_llama_cpp else contextlib.nullcontext():
            *_, measured = measure_chunks(
                options.source, [options.text], n_ctx=options.ctx, n_chunks=options.chunks, tables=False, device="cpu"
            )
        ours = measured.imatrix
        print(f"ours: perplexity {measured.perplexity:.4f}")
        n_wrong = compare_measured(ours, theirs)
        samples = sample_files(directory)
        for paths, n_ctx in ((samples, N_CTX), ([theirs.path, theirs.path], options.ctx)):
            same = merge_ours(paths, directory / "ours.gguf") == merge_theirs(paths, directory / "merged.gguf", n_ctx)
            print(f"{len(paths)} files merged: {'equal to the byte' if same else 'different'}")
            n_wrong += not same
        for path in (theirs.path, samples[0]):
            rows = their_statistics(path)
            found = statistics_differences(our_statistics(imatrix_statistics(read_imatrix(path))), rows)
            print(f"statistics: {sum(map(len, rows))} cells, {len(found)} differ")
            n_wrong += report(found)
    sys.exit(n_wrong > 0)


if __name__ == "__main__":
    main()
