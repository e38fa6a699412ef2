"""The table of qualities: what stands in its cells, and what it calls a surprise."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gguf3n.validation.divergence import Divergence
from workshop import pages
from workshop import quality as bench
from workshop.quality import Quality, Row


def quality(bits: float, mean: float) -> Quality:
    divergence = Divergence(
        n_positions=1000,
        mean=mean,
        median=mean / 2,
        p95=2 * mean,
        p99=4 * mean,
        maximum=9 * mean,
        top1_agreement=0.987,
        top5_agreement=0.95,
        reference_perplexity=20.0,
        candidate_perplexity=20.125,
    )
    return Quality(file_bytes=int(bits * 3e6), bits_per_weight=bits, divergence=divergence)


SMALL, MIDDLE, LARGE = quality(3.0, 9e-3), quality(5.0, 1.5e-3), quality(8.5, 2.5e-5)


def cells(row: Row) -> list[str]:
    line = bench.table([row]).splitlines()[-1]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table() -> None:
    rows = [Row("low", None, SMALL), Row("high", LARGE, LARGE), Row("mid", MIDDLE, MIDDLE)]
    head, rule, *lines = bench.table(rows).splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {15}
    assert [line.split("`")[1] for line in lines] == ["high", "mid", "low"]


def test_cells() -> None:
    better = quality(5.25, 1.2e-3)
    row = Row("mid", MIDDLE, better, MIDDLE, quality(5.5, 1.1e-3), has_counterpart=True)
    ours = ["1.50", "6.00", "98.7", "20.125", "1.20", "4.80", "98.7", "20.125"]
    assert cells(row) == ["`mid`", "15.0", "5.00", *ours, "5.00", "=", "1.10"]


def test_cells_of_what_cannot_be_written() -> None:
    nothing = ["-"] * 4
    some = ["9.00", "36.0", "98.7", "20.125"]
    assert cells(Row("UD", None, SMALL)) == ["`UD`", "9.0", "3.00", *nothing, *some, "-", "-", "-"]
    assert cells(Row("IQ", None, SMALL, has_counterpart=True))[-3:] == ["refused", "-", "-"]
    assert cells(Row("IQ", None, SMALL, None, SMALL, has_counterpart=True))[-3:] == ["3.00", "-", "="]


@pytest.mark.parametrize(
    ("nats", "text"), [(5e-10, "5e-07"), (2.76e-5, "0.0276"), (1e-3, "1.00"), (0.0123, "12.3"), (0.4567, "457")]
)
def test_milli(nats: float, text: str) -> None:
    assert bench.milli(nats) == text


def test_surprises() -> None:
    assert bench.surprises([Row("low", None, SMALL), Row("mid", MIDDLE, MIDDLE), Row("high", LARGE, LARGE)]) == []
    harmed = Row("harmed", MIDDLE, quality(5.0, 1.6e-3))
    beaten = Row("beaten", MIDDLE, None, quality(4.9, 1.4e-3), None, has_counterpart=True)
    wasteful = Row("wasteful", quality(6.0, 2e-3), None)
    found = bench.surprises([harmed, beaten, wasteful])
    assert found == [
        "harmed: importances make it worse, KL 1.60 against 1.50 at 5.00 and 5.00 bits",
        "beaten: worse than llama.cpp's, KL 1.50 against 1.40 at 5.00 and 4.90 bits",
        "wasteful: worse than the smaller harmed, KL 2.00 against 1.50 at 6.00 and 5.00 bits",
    ]


def test_smaller_and_worse_than_llama_cpps_is_no_surprise() -> None:
    row = Row("mid", MIDDLE, None, quality(5.5, 1e-3), None, has_counterpart=True)
    assert bench.surprises([row]) == []


def test_rows_come_back_from_json() -> None:
    rows = [Row("low", None, SMALL), Row("mid", MIDDLE, MIDDLE, MIDDLE, None, has_counterpart=True)]
    facts = json.loads(json.dumps({"rows": [asdict(row) for row in rows]}))
    assert bench.read_rows(facts) == rows


def test_windows() -> None:
    """Each begins with the begin mark, none shares a token with another, what is left over is not read."""
    found = bench.windows_of([2, *range(10, 30)], bench.Options(ctx=8, windows=9))
    assert found == [[2, *range(10, 17)], [2, *range(17, 24)]]
    with pytest.raises(SystemExit, match="too few"):
        bench.windows_of([2, 3], bench.Options(ctx=8))


def test_markers() -> None:
    page = "before\n<!-- x:begin -->\n{}<!-- x:end -->\nafter\n"
    assert pages.filled(page.format("old\n"), "x", "new\n") == page.format("new\n")
    with pytest.raises(SystemExit, match="no markers"):
        pages.filled("nothing", "x", "new\n")
