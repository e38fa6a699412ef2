"""The comparison at the same bytes: its intervals, its table, the text of programs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from gguf3n.validation.divergence import Divergence
from workshop import same_bytes
from workshop.same_bytes import Result, bootstrap, change, programs, read_results, table

DIVERGENCE = Divergence(
    n_positions=100, mean=2e-3, median=1e-3, p95=5e-3, p99=9e-3, maximum=0.1, top1_agreement=0.975, top5_agreement=0.9,
    reference_perplexity=20.0, candidate_perplexity=20.5,
)  # fmt: skip
STOCK = Result(
    mixture="Q4_K_M", calibration=0, variant="stock", what="Q4_K_M@llama.cpp", text="held out", file_bytes=20_000_000,
    expected=1.9e-3, divergence=DIVERGENCE, divergences=(2e-3, 2e-3), ratio=1.0, interval=(1.0, 1.0),
)  # fmt: skip
FLAG = replace(STOCK, variant="one flag", what="a flag", ratio=0.5, interval=(0.4, 0.6), divergences=(1e-3, 1e-3))
TUNED = replace(STOCK, variant="tuned", what="tuned", ratio=0.25, interval=(0.2, 0.4), divergences=(5e-4, 5e-4))


def test_intervals_hold_the_ratio() -> None:
    rng = np.random.default_rng(0)
    base = rng.lognormal(0, 1, 30)
    low, high = bootstrap(0.5 * base, base)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)  # paired: what both windows share cancels
    low, high = bootstrap(0.5 * base * rng.lognormal(0, 0.3, 30), base)
    assert 0.35 < low < 0.5 < high < 0.75


def test_table() -> None:
    results = [STOCK, FLAG, TUNED, replace(STOCK, calibration=1), replace(TUNED, calibration=1, ratio=0.3)]
    head, rule, *lines = table(results).splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {14} and len(lines) == 3
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:6] == ["`Q4_K_M`", "tuned", "held out", "20.00", "2.00", "1.00"]
    assert cells[6:] == [
        "9.00",
        "97.5",
        "1.0250",
        "1.90",
        "-75 % (-80 to -60)",
        "-70 % (-80 to -60)",
        "-50 % (-50 to -50)",
    ]
    assert [cell.strip() for cell in lines[1].strip("|").split("|")][10:] == ["-50 % (-60 to -40)", "-", ""]


def test_change() -> None:
    assert change(replace(TUNED, ratio=1.1, interval=(0.95, 1.2))) == "+10 % (-5 to +20)"


def test_results_come_back_from_json() -> None:
    facts = json.loads(json.dumps({"results": [asdict(STOCK), asdict(TUNED)]}))
    assert read_results(facts) == [STOCK, TUNED]


def test_programs_are_code_without_prose() -> None:
    text = programs()
    assert "def heappush(heap, item):" in text and '"""' not in text and "#" not in text.splitlines()[0]


def test_the_first_variant_is_what_others_are_held_against() -> None:
    assert next(iter(same_bytes.VARIANTS)) == "stock"
