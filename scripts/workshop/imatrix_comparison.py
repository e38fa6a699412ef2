"""Holds our importance matrices against llama-imatrix's: how far apart they may be, merged files, statistics."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gguf3n.formats.imatrix import Entry, ImportanceMatrix, merge_imatrices, read_imatrix, write_imatrix
from gguf3n.inspection.imatrix_statistics import ImatrixStatistics, imatrix_statistics
from workshop import llama_cpp_tools
from workshop.places import FIXTURES

GOLDEN = FIXTURES / "llama_cpp" / "imatrix.json"
TEXT = FIXTURES / "text" / "english.txt"
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
        values = [each.total, each.minimum, each.maximum, each.mean, each.deviation, 100 * each.active, each.n]
        values += [each.entropy, 100 * each.evenness, 100 * each.zd, each.cosine or 0.0]
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
