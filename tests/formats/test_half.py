"""Whether float16 holds a tensor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf3n.formats.source import SourceTensor

from gguf3n.formats.half import CHUNK_WEIGHTS, fits_f16, rows_fit

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


def write(path: Path, rows: np.ndarray, dtype: str) -> SourceTensor:
    data = rows if dtype == "F32" else (rows.view(np.uint32) >> 16).astype(np.uint16)
    path.write_bytes(b"head" + data.tobytes())
    return SourceTensor("x", dtype, rows.shape, path, 4)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_tensors_in_files(tmp_path: Path, dtype: str) -> None:
    """The row that does not fit is in the last chunk."""
    n_rows = CHUNK_WEIGHTS // 1024 + 5
    rows = bf16(np.resize(NORMAL * np.float32(0.02), (n_rows, 1024)))
    assert fits_f16(write(tmp_path / "fits", rows, dtype))
    rows[-1] = 1e6
    assert not fits_f16(write(tmp_path / "large", rows, dtype))


def test_what_is_not_looked_at(tmp_path: Path) -> None:
    assert fits_f16(SourceTensor("x", "BF16", (4, 4), tmp_path / "not there yet", 0))
    assert fits_f16(SourceTensor("x", "F16", (4, 4), tmp_path, 0))
    (tmp_path / "short").write_bytes(b"\0\0")
    assert fits_f16(SourceTensor("x", "BF16", (4, 4), tmp_path / "short", 0))
