"""The presets as data: every one complete, alive and where it is meant to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.deciding import estimate
from gguf3n.gemma3n.published import HEADER_BYTES, PUBLISHED
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, PLE_TYPES, TOKEN_EMBD, Keep, find_recipe, preset_names
from tests.recipes.facts import data_bytes, decisions, facts, type_counts, types
from workshop.snapshots import SIZES

NAMES = preset_names()
UNSLOTH = [name for name in NAMES if name.startswith("UD-") or name == "Q2_K_L"]
ROOT = Path(__file__).resolve().parents[2]

BITS = {qtype: 8 * n_bytes / n for qtype, (n, n_bytes) in GGML_QUANT_SIZES.items()}


def test_all_are_there() -> None:
    assert len(NAMES) == 32 + 12
    assert set(UNSLOTH) == {
        "Q2_K_L", "UD-IQ1_S", "UD-IQ1_M", "UD-IQ2_XXS", "UD-IQ2_M", "UD-IQ3_XXS", "UD-Q2_K_XL", "UD-Q3_K_XL",
        "UD-Q4_K_XL", "UD-Q5_K_XL", "UD-Q6_K_XL", "UD-Q8_K_XL",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_is_for(name: str) -> None:
    recipe = find_recipe(name)
    assert 20 <= len(recipe.summary) <= 100 and recipe.summary.endswith(".")
    assert recipe.keep is {"F32": Keep.F32, "BF16": Keep.BF16}.get(name, Keep.F16)
    assert all(rule.reason and not rule.strict for rule in recipe.rules)
    assert ("reconstruction" in recipe.note) is (name in UNSLOTH)


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_decides_something(name: str) -> None:
    recipe = find_recipe(name)
    deciding = {
        id(recipe.deciding_rule(tensor))
        for size in SIZES
        for imatrix in (False, True)
        for tensor in facts(size, imatrix=imatrix).quantizable
    }
    assert [rule.place for rule in recipe.rules if id(rule) not in deciding] == []


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("name", NAMES)
def test_no_bits_for_weights_that_are_never_evaluated(name: str, size: str) -> None:
    """They have the smallest type that every engine has, or at least none above the base type."""
    recipe = find_recipe(name)
    found = decisions(recipe, size, imatrix=True)
    for tensor in facts(size).quantizable:
        if not tensor.evaluated:
            assert BITS[found[tensor.name].qtype] <= max(BITS[QType.Q2_K], BITS[recipe.qtype])
            assert found[tensor.name].rule in ("unevaluated", "type")


PLE = {
    "Q4_0": "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XXS IQ3_XS IQ3_S IQ3_M",
    "Q4_1": "Q2_K Q2_K_S Q2_K_L Q3_K_S Q3_K_M Q3_K_L TQ1_0 TQ2_0",
    "Q5_1": "IQ4_XS IQ4_NL Q4_0 Q4_1 Q4_K_S Q4_K_M Q5_0 Q5_1 Q5_K_S Q5_K_M UD-Q2_K_XL UD-Q3_K_XL",
    "Q8_0": "Q6_K Q8_0 UD-Q4_K_XL UD-Q5_K_XL UD-Q6_K_XL",
    "F16": "F16 UD-Q8_K_XL",
    "BF16": "BF16",
    "F32": "F32",
}


@pytest.mark.parametrize("name", NAMES)
def test_the_per_layer_table_is_in_a_type_that_every_engine_reads(name: str) -> None:
    qtype = decisions(find_recipe(name), "E4B", imatrix=True)[PER_LAYER_TOKEN_EMBD].qtype
    assert qtype in PLE_TYPES
    expected = next((qtype for qtype, names in PLE.items() if name in names.split()), "Q4_0")
    assert qtype.name == expected


PUBLISHED_GIB = {
    # E4B, E2B
    "Q2_K_L": (3.0, 2.1),
    "UD-IQ2_XXS": (2.6, 1.9),
    "UD-IQ2_M": (2.9, 2.0),
    "UD-IQ3_XXS": (3.1, 2.2),
    "UD-Q2_K_XL": (3.4, 2.4),
    "UD-Q3_K_XL": (3.8, 2.7),
    "UD-Q4_K_XL": (5.01, 3.5),
    "UD-Q5_K_XL": (5.5, 3.7),
    "UD-Q6_K_XL": (6.2, 4.2),
    "UD-Q8_K_XL": (9.9, 7.0),
}
"""Unsloth's files as its pages show them; of UD-IQ1_S and UD-IQ1_M only early files of E2B are known."""


@pytest.mark.parametrize("name", PUBLISHED_GIB)
def test_reconstructions_have_the_published_size(name: str) -> None:
    for size, gib in zip(("E4B", "E2B"), PUBLISHED_GIB[name], strict=True):
        total = data_bytes(find_recipe(name), size) + HEADER_BYTES
        assert total / 2**30 == pytest.approx(gib, rel=0.015)


def test_ud_q4_k_xl_has_the_published_counts() -> None:
    assert type_counts(find_recipe("UD-Q4_K_XL"), "E4B") == {
        "F32": 422, "F16": 108, "Q8_0": 1, "Q4_K": 189, "Q5_K": 61, "Q6_K": 50, "IQ4_XS": 16,
    }  # fmt: skip


TABLES = {
    # token_embd, per_layer_token_embd: what the sizes of the published files give away
    "UD-Q8_K_XL": ("F16", "F16"),
    "UD-Q6_K_XL": ("Q8_0", "Q8_0"),
    "UD-Q5_K_XL": ("Q6_K", "Q8_0"),
}


@pytest.mark.parametrize("name", TABLES)
def test_reconstructions_have_the_published_tables(name: str) -> None:
    found = types(find_recipe(name), "E4B")
    assert (found[TOKEN_EMBD], found[PER_LAYER_TOKEN_EMBD]) == TABLES[name]


@pytest.mark.parametrize("name", ["Q4_K_M", "UD-Q2_K_XL", "IQ2_XXS", "UD-IQ1_S", "F16", "Q4_0", "IQ4_XS@llama.cpp"])
@pytest.mark.parametrize("size", PUBLISHED)
def test_estimates(name: str, size: str) -> None:
    recipe = find_recipe(name)
    found = estimate(recipe, PUBLISHED[size])
    assert found.needs_imatrix is ("IQ2" in name or "IQ1" in name)
    assert found.total_bytes == data_bytes(recipe, size, imatrix=found.needs_imatrix) + HEADER_BYTES
    counts = {qtype.name: count for qtype, count in found.type_counts.items()}
    if recipe.keep is Keep.SOURCE:
        counts["F16"] = counts.pop("BF16")
    assert counts == type_counts(recipe, size, imatrix=found.needs_imatrix)


def test_the_table_in_the_docs_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_recipe_table.py"), "--check"]
    done = subprocess.run(command, check=False, env={"PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0, "run scripts/make_recipe_table.py"
