"""Whether float16 holds a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gguf3n.formats.half import CHUNK_WEIGHTS, fits_f16, rows_fit
from gguf3n.formats.rows import LowRank, RowReader, Stored, View, Zeros

NORMAL = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def with_row(scale: float) -> np.ndarray:
    rows = NORMAL * np.float32(0.02)
    rows[3] = NORMAL[3] * np.float32(scale)
    return rows


CASES: tuple[tuple[str, np.ndarray, bool], ...] = (
    ("ordinary weights", NORMAL * np.float32(0.02), True),
    ("all zero", np.zeros((4, 8), np.float32), True),
    ("the largest float16", np.full((1, 8), 65504, np.float32), True),
    ("above it", np.full((1, 8), 65536, np.float32), False),
    ("infinity", np.full((1, 8), np.inf, np.float32), False),
    ("not a number", np.full((1, 8), np.nan, np.float32), False),
    ("a few values that vanish", np.where(np.arange(64) % 9 == 0, np.float32(1e-9), NORMAL * np.float32(0.02)), True),
    ("one small row", with_row(1e-4), True),
    ("one row of denormals", with_row(1e-5), False),
    ("one row that vanishes", with_row(1e-9), False),
    ("one row of zeros", with_row(0.0), True),
    ("all vanishes", NORMAL * np.float32(1e-20), False),
)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("rows", "expected"), [row[1:] for row in CASES], ids=[row[0] for row in CASES])
def test_rows(rows: np.ndarray, expected: bool, exact: bool) -> None:
    assert rows_fit(bf16(rows) if exact else rows, exact=exact) is expected


def write(path: Path, rows: np.ndarray, dtype: str) -> Stored:
    data = rows if dtype == "F32" else (rows.view(np.uint32) >> 16).astype(np.uint16)
    path.write_bytes(b"head" + data.tobytes())
    return Stored("x", dtype, rows.shape, path, 4)


@pytest.fixture
def reader() -> Iterator[RowReader]:
    with closing(RowReader()) as reader:
        yield reader


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_tensors_in_files(tmp_path: Path, reader: RowReader, dtype: str) -> None:
    """The row that does not fit is in the last chunk."""
    n_rows = CHUNK_WEIGHTS // 1024 + 5
    rows = bf16(np.resize(NORMAL * np.float32(0.02), (n_rows, 1024)))
    assert fits_f16(write(tmp_path / "fits", rows, dtype), reader)
    rows[-1] = 1e6
    assert not fits_f16(write(tmp_path / "large", rows, dtype), reader)


def test_what_is_not_looked_at(tmp_path: Path, reader: RowReader) -> None:
    assert fits_f16(Stored("x", "BF16", (4, 4), tmp_path / "not there yet", 0), reader)
    assert fits_f16(Stored("x", "F16", (4, 4), tmp_path, 0), reader)
    (tmp_path / "short").write_bytes(b"\0\0")
    assert fits_f16(Stored("x", "BF16", (4, 4), tmp_path / "short", 0), reader)
    assert fits_f16(Zeros(4, 4), reader)


def test_only_what_a_view_takes_is_looked_at(tmp_path: Path, reader: RowReader) -> None:
    rows = bf16(NORMAL * np.float32(0.02))
    rows[5, 7] = 1e6
    stored = write(tmp_path / "x", rows, "BF16")
    assert not fits_f16(stored, reader)
    assert fits_f16(View(stored, range(5), (range(64),)), reader)
    assert fits_f16(View(stored, range(8), (range(7), range(8, 64))), reader)
    assert not fits_f16(View(stored, range(5, 6), (range(7, 8),)), reader)


def test_a_low_rank_product_that_does_not_fit(tmp_path: Path, reader: RowReader) -> None:
    """Whatever its matrices are stored in: the sum is neither."""
    base = Stored("base", "F16", (8, 64), tmp_path / "base", 0)
    (tmp_path / "base").write_bytes(NORMAL.astype(np.float16).tobytes())
    a = write(tmp_path / "a", bf16(np.full((1, 64), 300, np.float32)), "BF16")
    b = write(tmp_path / "b", bf16(np.full((8, 1), 300, np.float32)), "F32")
    assert fits_f16(LowRank(base, a, b, 0.5), reader)
    assert not fits_f16(LowRank(base, a, b, 1.0), reader)
