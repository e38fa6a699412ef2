"""Importance matrices: both forms, several added, and what is wrong with broken ones."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, chunk_count, merge_imatrices, read_imatrix, write_imatrix
from workshop import imatrix_comparison

RNG = np.random.default_rng(0)


def legacy(entries: dict[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    """llama-imatrix's .dat form."""
    parts = [struct.pack("<i", len(entries))]
    for name, (n_calls, values) in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", n_calls, len(values))]
        parts.append(values.astype("<f4").tobytes())
    return b"".join(parts) + tail


def test_the_gguf_form_comes_back(tmp_path: Path) -> None:
    written = ImportanceMatrix(
        tmp_path / "i.gguf",
        {
            "blk.0.attn_q.weight": Entry(RNG.random((1, 256), np.float32), np.array([512], np.float32)),
            "blk.0.ffn_up.weight": Entry(RNG.random((2, 64), np.float32), np.array([512, 0], np.float32)),
        },
        ("calibration.txt", "more.txt"),
        chunk_count=7,
        chunk_size=512,
    )
    write_imatrix(written, written.path)
    read = read_imatrix(written.path)
    assert (read.datasets, read.chunk_count, read.chunk_size) == (written.datasets, 7, 512)
    assert list(read.entries) == sorted(written.entries)
    for name, entry in written.entries.items():
        assert np.array_equal(read.entries[name].sums, entry.sums)
        assert np.array_equal(read.entries[name].counts, entry.counts)


def test_quant_weights_are_one_float32_division_and_one_where_nothing_was_counted() -> None:
    sums = RNG.random((2, 8), np.float32)
    weights = Entry(sums, np.array([3, 0], np.float32)).quant_weights
    assert weights.dtype == np.float32
    assert np.array_equal(weights[0], sums[0] / np.float32(3))
    assert np.array_equal(weights[1], np.ones(8, np.float32))


def test_the_legacy_form(tmp_path: Path) -> None:
    values = RNG.random(256, np.float32)
    path = tmp_path / "i.dat"
    path.write_bytes(legacy({"blk.3.proj.weight": (4, values)}, struct.pack("<ii", 9, 5) + b"a.txt"))
    read = read_imatrix(path)
    assert (read.chunk_count, read.datasets) == (9, ("a.txt",))
    assert np.array_equal(read.entries["blk.3.proj.weight"].quant_weights[0], values / np.float32(4))
    path.write_bytes(legacy({"blk.3.proj.weight": (4, values)}))
    assert (read_imatrix(path).chunk_count, read_imatrix(path).datasets) == (0, ())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1\0",
        struct.pack("<i", 0),
        struct.pack("<ii", 1, 1 << 30),
        struct.pack("<ii", 1, -1),
        legacy({"a": (1, np.ones(8))})[:-4],
        legacy({"a": (1, np.array([np.nan]))}),
        legacy({"a": (1, np.array([-1.0]))}),
        legacy({"a": (1, np.array([]))}),
    ],
    ids=["empty", "short", "no entries", "long name", "negative length", "truncated", "nan", "negative", "no values"],
)
def test_broken_files_are_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken.dat"
    path.write_bytes(data)
    with pytest.raises(GGUFError, match=r"broken\.dat"):
        read_imatrix(path)


def test_a_gguf_without_sums_is_no_importance_matrix(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_imatrix(ImportanceMatrix(path, {}), path)
    with pytest.raises(GGUFError, match="not an importance matrix"):
        read_imatrix(path)


def test_a_gguf_with_empty_entries(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    for entry in (Entry(np.ones((0, 8), np.float32), np.ones(0, np.float32)), Entry(np.ones((1, 0)), np.ones(1))):
        write_imatrix(ImportanceMatrix(path, {"a": entry}), path, force=True)
        with pytest.raises(GGUFError, match="entry 'a'"):
            read_imatrix(path)


def test_sums_too_large_for_float32_are_not_written() -> None:
    entry = Entry(np.full((1, 4), 3e38, np.float32), np.ones(1, np.float32))
    imatrix = ImportanceMatrix(Path("large.gguf"), {"a": entry}, chunk_size=64)
    with pytest.raises(UsageError, match="a sum that float32 does not hold"):
        merge_imatrices([imatrix, imatrix])


def matrix(seed: int = 0, *, chunk_size: int = 64, n: int = 32, name: str = "blk.0.attn_q.weight") -> ImportanceMatrix:
    sums = np.random.default_rng(seed).random((1, n), np.float32)
    entry = Entry(sums, np.array([128 * (seed + 1)], np.float32))
    return ImportanceMatrix(Path(f"{seed}.gguf"), {name: entry}, (f"{seed}.txt",), 2 * (seed + 1), chunk_size)


def test_merged_as_llama_imatrix_merges_them(tmp_path: Path) -> None:
    """Two files of the GGUF form and a legacy one; the bytes are recorded by scripts/compare_imatrix.py."""
    golden = json.loads(imatrix_comparison.GOLDEN.read_text("utf-8"))
    merged = imatrix_comparison.merge_ours(imatrix_comparison.sample_files(tmp_path), tmp_path / "merged.gguf")
    assert hashlib.sha256(merged).hexdigest() == golden["merged"]


def test_sums_and_counts_are_added() -> None:
    parts = [matrix(0), matrix(1), matrix(2, name="blk.1.attn_q.weight")]
    merged = merge_imatrices(parts)
    (one, two, three) = (next(iter(part.entries.values())) for part in parts)
    assert np.array_equal(merged.entries["blk.0.attn_q.weight"].sums, one.sums + two.sums)
    assert merged.entries["blk.0.attn_q.weight"].counts == [384]
    assert np.array_equal(merged.entries["blk.1.attn_q.weight"].sums, three.sums)
    assert merged.datasets == ("0.txt", "1.txt", "2.txt")
    assert (merged.chunk_count, merged.chunk_size, merged.n_chunks) == (6, 64, 6)
    assert np.array_equal(parts[0].entries["blk.0.attn_q.weight"].sums, matrix(0).entries["blk.0.attn_q.weight"].sums)


@pytest.mark.parametrize(("others", "asked", "size"), [([], None, 512), ([], 100, 100), ([matrix(0)], 100, 64)])
def test_a_legacy_file_counts_chunks(others: list[ImportanceMatrix], asked: int | None, size: int) -> None:
    legacy = replace(matrix(1), is_legacy=True, chunk_size=0)
    assert legacy.n_chunks == 256
    merged = merge_imatrices([legacy, *others], chunk_size=asked)
    entry = merged.entries["blk.0.attn_q.weight"]
    added = next(iter(others[0].entries.values())) if others else Entry(np.zeros((1, 32)), np.zeros(1))
    assert np.array_equal(
        entry.sums, legacy.entries["blk.0.attn_q.weight"].sums * np.float32(size) + added.sums.astype(np.float32)
    )
    assert entry.counts == [256 * size + added.counts[0]]
    assert merged.chunk_size == size and not merged.is_legacy


def test_what_does_not_belong_together_is_not_added() -> None:
    with pytest.raises(UsageError, match="different sizes"):
        merge_imatrices([matrix(0), matrix(1, chunk_size=128)])
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q"):
        merge_imatrices([matrix(0), matrix(1, n=64)])
    with pytest.raises(UsageError, match="no importance matrix"):
        merge_imatrices([])


def test_chunks() -> None:
    """AltUp's router counts twice, which llama-imatrix takes for twice the chunks."""
    entries = {
        "blk.0.attn_q.weight": Entry(np.ones((1, 4), np.float32), np.array([256], np.float32)),
        "blk.0.altup_router.weight": Entry(np.ones((1, 4), np.float32), np.array([512], np.float32)),
    }
    assert chunk_count(entries.values(), 128) == 4
    assert ImportanceMatrix(Path("x"), entries, (), 4, 128).n_chunks == 2
    assert ImportanceMatrix(Path("x"), entries, (), 4, 0).n_chunks == 0
