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
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp_tools
import make_checkpoint
import numpy as np

import gguf3n
from gguf3n.engines.activations import measure_importance
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, merge_imatrices, read_imatrix, write_imatrix
from gguf3n.inspection.imatrix_statistics import ImatrixStatistics, imatrix_statistics

GOLDEN = make_checkpoint.FIXTURES / "llama_cpp" / "imatrix.json"
TEXT = make_checkpoint.FIXTURES / "text" / "english.txt"
N_CTX, N_CHUNKS = 128, 4
"""What the golden record was measured with."""

SPARSE_LAYERS = 10
LIMITS = {"ffn_down of a sparse layer": 1e-2, "others": 1e-3}
"""Relative difference that an entry may have; two to three times what the tiny checkpoint's had on 2026-11-21."""

DIGITS = (2, 4, 4, 2, 2, 2, 0, 4, 2, 2, 4)
"""Decimals of the columns that --show-statistics prints, after layer and tensor."""


TRIES = 50


def limit(name: str) -> float:
    """How far an entry may be from llama-imatrix's."""
    layer, _, tensor = name.removeprefix("blk.").partition(".")
    sparse = tensor.startswith("ffn_down") and int(layer) < SPARSE_LAYERS
    return LIMITS["ffn_down of a sparse layer" if sparse else "others"]


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference, as a share of the norm."""
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs.astype(np.float64)))


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


def sample_files(directory: Path) -> list[Path]:
    """Two matrices in the GGUF form and one in the legacy form, the same at every call."""
    paths = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        entries = {}
        for bid in range(3):
            for tensor, n in (("attn_q", 256), ("ffn_down", 512), ("altup_predict_coef", 4)):
                sums = (rng.chisquare(1, (1, n)) ** 2 * rng.choice([1e-6, 1, 50], (1, n))).astype(np.float32)
                entries[f"blk.{bid}.{tensor}.weight"] = Entry(sums, np.array([256 * (seed + 1)], np.float32))
        sample = ImportanceMatrix(Path("sample"), entries, (f"text-{seed}.txt",), 2 * (seed + 1), 128)
        paths.append(directory / f"sample-{seed}.{'dat' if seed == 2 else 'gguf'}")
        (write_legacy if seed == 2 else write_imatrix)(sample, paths[-1])
    return paths


def write_legacy(imatrix: ImportanceMatrix, path: Path) -> None:
    """llama-imatrix's .dat form. Source: save_imatrix_legacy of tools/imatrix/imatrix.cpp."""
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in imatrix.entries.items():
        n_chunks = int(entry.counts[0]) // imatrix.chunk_size
        values = entry.sums / entry.counts[:, None] * np.float32(n_chunks)
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", n_chunks, values.size)]
        parts.append(values.astype("<f4").tobytes())
    dataset = imatrix.datasets[0].encode()
    path.write_bytes(b"".join(parts) + struct.pack("<ii", imatrix.chunk_count, len(dataset)) + dataset)


def merge_theirs(paths: Sequence[Path], output: Path, n_ctx: int = N_CTX) -> bytes:
    """What llama-imatrix writes for several --in-file, which it takes to have chunks of `n_ctx`."""
    command = [llama_cpp_tools.program("llama-imatrix"), "-m", "none", "--in-file", ",".join(map(str, paths))]
    llama_cpp_tools.run([*command, "-c", str(n_ctx), "-o", str(output)])
    return output.read_bytes()


def merge_ours(paths: Sequence[Path], output: Path) -> bytes:
    """What we write for them."""
    write_imatrix(merge_imatrices([read_imatrix(path) for path in paths]), output, force=True)
    return output.read_bytes()


def their_statistics(path: Path) -> list[list[str]]:
    """The rows that llama-imatrix prints, of entries and then of layers, without percent signs.

    Why: its log is written by a thread that it does not wait for, so it is run until every row has come.
    """
    command = [llama_cpp_tools.program("llama-imatrix"), "-m", "none", "--in-file", str(path), "--show-statistics"]
    expected = len(our_statistics(imatrix_statistics(read_imatrix(path))))
    for _ in range(TRIES):
        lines = llama_cpp_tools.run(command, with_log=True).splitlines()
        rows = [re.sub(r"^\S+ I ", "", line).replace("%", "").split() for line in lines if "\t" in line]
        rows = [row for row in rows if row and (row[0].isdigit() or row[0] == "-")]
        if len(rows) == expected:
            break
    return rows


def our_statistics(statistics: ImatrixStatistics) -> list[list[str]]:
    """The same rows from ours."""
    rows = []
    for each in statistics.entries:
        values = (each.total, each.minimum, each.maximum, each.mean, each.deviation, 100 * each.active, each.n)
        values += (each.entropy, 100 * each.evenness, 100 * each.zd, each.cosine or 0.0)
        cells = [f"{value:.{digits}f}" for value, digits in zip(values, DIGITS, strict=True)]
        rows.append(["-" if each.bid is None else str(each.bid), each.tensor, *cells])
    for layer in statistics.layers:
        rows.append([str(layer.bid), f"{layer.total:.2f}", f"{100 * layer.zd:.4f}", f"{layer.cosine or 0.0:.4f}"])
    return rows


def statistics_differences(ours: list[list[str]], theirs: list[list[str]]) -> list[str]:
    """Cells that differ by more than one in their last digit, or, float32 being what it is, two in a million.

    Why: rows are compared in the order of their names; entries of nearly the same total may change places.
    """
    found = []
    for mine, other in zip(sorted(ours, key=_row_name), sorted(theirs, key=_row_name), strict=True):
        if _row_name(mine) != _row_name(other):
            return [f"ours has {_row_name(mine)}, llama-imatrix {_row_name(other)}"]
        for one, two in zip(mine[1:], other[1:], strict=True):
            if one == two:
                continue
            unit = 10.0 ** -len(two.partition(".")[2])
            if abs(float(one) - float(two)) > 1.01 * unit + 2e-6 * abs(float(two)):
                found.append(f"{' '.join(_row_name(mine))}: ours {one}, llama-imatrix {two}")
    return found


def _row_name(row: list[str]) -> list[str]:
    return row[:2] if len(row) > 4 else row[:1]


def report(wrong: Sequence[str]) -> int:
    for line in wrong:
        print(f"  {line}")
    return len(wrong)


def write_golden() -> None:
    """Record what llama-imatrix measures on the tiny checkpoint, and what it makes of sample_files."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_checkpoint.make(directory / "tiny", make_checkpoint.Options())
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
            ours = measure_importance(
                options.source,
                [options.text],
                n_ctx=options.ctx,
                n_chunks=options.chunks,
                tables=False,
                device="cpu",
                progress=lambda measured: (
                    print(f"ours: perplexity {measured.perplexity:.4f}")
                    if measured.n_done == measured.n_chunks
                    else None
                ),
            )
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
