"""Files of refined codes: made again where the correlations are at hand, else held to what any codes keep to."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n.conversion import read_source
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_reader import open_gguf, open_part
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.refinement import match_correlations
from gguf3n.validation.result import Verdict
from gguf3n.validation.tensors import check_tensors
from tests import refining
from tests.validation.plant import PLANTS, Planter

KINDS = ("Q4_K_M", "Q2_K")
NEEDS_FILE = {"older_version"}
"""Weights that differ by a hundredth, rounded; refined codes differ by more."""


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A refined file, sound and with faults, and what is found of each: with the correlations and without."""
    source = text_part(read_source(tiny_checkpoint))
    path = tmp_path_factory.mktemp("refined") / "x.gguf"
    correlations = refining.of_part(source)
    gguf3n.convert(source.source, request.param, path, refine=correlations)
    refinement = match_correlations(correlations, source)

    def check(**options: Any) -> Any:
        return check_tensors(open_gguf(path, strict=False), source, **options)

    sound = {"file": check(refinement=refinement), "no file": check()}
    planter = Planter(path, source, {})
    places = {name: plant(planter) for name, (plant, _) in PLANTS.items()}
    faulty = {"file": check(refinement=refinement), "no file": check()}
    return SimpleNamespace(path=path, source=source, sound=sound, faulty=faulty, places=places)


def test_a_sound_file_passes(made: Any) -> None:
    for result in made.sound.values():
        assert result.verdict is Verdict.PASS, result.problems
    assert made.sound["file"].n_identical == len(made.sound["file"].errors)
    assert made.sound["no file"].n_identical < len(made.sound["no file"].errors)
    (said,) = [line for line in made.sound["no file"].shows if "refined" in line]
    assert said.endswith("(refined codes, without --refine FILE)")
    assert not any("refined" in line for line in made.sound["file"].shows)


@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_fault_is_found_and_named(made: Any, fault: str) -> None:
    for way, result in made.faulty.items():
        problems = {problem.where: problem for problem in result.problems}
        if way == "no file" and fault in NEEDS_FILE:
            assert made.places[fault] not in problems
            continue
        problem = problems[made.places[fault]]
        assert problem.verdict is Verdict.FAIL
        if fault not in NEEDS_FILE:
            assert re.search(PLANTS[fault][1], problem.what), problem.what


def test_nothing_else_is_found(made: Any) -> None:
    assert {problem.where for problem in made.faulty["file"].problems} == set(made.places.values())
    without = {made.places[fault] for fault in PLANTS if fault not in NEEDS_FILE}
    assert {problem.where for problem in made.faulty["no file"].problems} == without


def test_a_damaged_block_is_seen_without_the_file(made: Any) -> None:
    """Here a block is a row."""
    tensor = open_part(made.path).tensors["blk.1.attn_q.weight"]
    levels, offset = GGML_TYPES[tensor.qtype].block.fields["qs"][:2]
    place = tensor.offset + 5 * tensor.n_bytes // tensor.shape[0] + offset
    with open(made.path, "r+b") as file:
        file.seek(place)
        kept = file.read(levels.itemsize)
        file.seek(place)
        file.write(np.random.default_rng(0).bytes(levels.itemsize))
    try:
        result = check_tensors(open_gguf(made.path, strict=False), made.source)
    finally:
        with open(made.path, "r+b") as file:
            file.seek(place)
            file.write(kept)
    problem = {problem.where: problem for problem in result.problems}["blk.1.attn_q.weight"]
    assert problem.verdict is Verdict.FAIL
    assert problem.what.startswith("row 5 of 256: ")
