"""Importance matrices: both forms, and what is wrong with broken ones."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from gguf3n.errors import GGUFError
from gguf3n.formats.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix

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
    ],
    ids=["empty", "short", "no entries", "long name", "negative length", "truncated", "nan", "negative"],
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
