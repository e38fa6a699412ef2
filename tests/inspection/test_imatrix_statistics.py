"""Statistics of importance matrices: what llama-imatrix prints, and what can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gguf3n.formats.imatrix import Entry, ImportanceMatrix, read_imatrix
from gguf3n.inspection.imatrix_statistics import imatrix_statistics
from workshop import imatrix_comparison


def matrix(entries: dict[str, tuple[list[float], float]]) -> ImportanceMatrix:
    made = {
        name: Entry(np.array([sums], np.float32), np.array([count], np.float32))
        for name, (sums, count) in entries.items()
    }
    return ImportanceMatrix(Path("x.gguf"), made)


def test_what_llama_imatrix_prints(tmp_path: Path) -> None:
    """Recorded by scripts/compare_imatrix.py."""
    theirs = json.loads(imatrix_comparison.GOLDEN.read_text("utf-8"))["statistics"]
    sample = read_imatrix(imatrix_comparison.sample_files(tmp_path)[0])
    ours = imatrix_comparison.our_statistics(imatrix_statistics(sample))
    assert len(theirs) == 9 + 3
    assert imatrix_comparison.statistics_differences(ours, theirs) == []
    ours[0][2] = "1e6"
    assert len(imatrix_comparison.statistics_differences(ours, theirs)) == 1


def test_worked_out_by_hand() -> None:
    found = imatrix_statistics(
        matrix({"blk.0.proj.weight": ([0, 0, 0, 8], 2), "blk.1.proj.weight": ([4, 4, 4, 4], 4), "a.weight": ([3], 1)})
    )
    first, second, last = found.entries
    assert [(each.tensor, each.bid) for each in found.entries] == [("a", None), ("proj", 0), ("proj", 1)]
    assert (second.total, second.minimum, second.maximum, second.mean) == (4, 0, 4, 1)
    assert second.deviation == pytest.approx(3**0.5)
    assert (second.active, second.entropy, second.evenness, second.zd, second.cosine) == (0.25, 0, 0, 0.25, None)
    assert (last.total, last.deviation, last.entropy, last.evenness, last.zd) == (4, 0, 2, 1, 0)
    assert last.cosine == pytest.approx(0.5)
    assert (first.n, first.evenness, first.cosine) == (1, 0, None)
    assert [(each.bid, each.total, each.zd) for each in found.layers] == [(0, 4, 0.25), (1, 4, 0)]
    assert [each.cosine for each in found.layers] == [None, pytest.approx(0.5)]


def test_layers_are_weighted_by_columns() -> None:
    (layer,) = imatrix_statistics(matrix({"blk.5.a.weight": ([1, 1, 1], 1), "blk.5.b.weight": ([7], 1)})).layers
    assert layer.total == (3 * 3 + 1 * 7) / 4


def test_nothing_to_divide_by() -> None:
    """Columns that are all zero, entries that counted nothing, a layer before of another width."""
    found = imatrix_statistics(
        matrix(
            {
                "blk.0.a.weight": ([0, 0], 3),
                "blk.1.a.weight": ([0, 0], 3),
                "blk.2.a.weight": ([1, 2, 3], 3),
                "blk.3.a.weight": ([1, 2, 3], 0),
            }
        )
    )
    assert [each.bid for each in found.layers] == [0, 1, 2]
    assert [each.cosine for each in found.entries] == [None] * 3
    assert found.entries[-1].entropy == found.entries[-1].active == 0
