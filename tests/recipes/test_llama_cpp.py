"""The exact names against what llama-quantize itself chose (fixtures/recipes), and against published files."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.gemma3n.config import parse_config
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, PLE_TYPES, find_recipe, override, preset_names, variant_names
from tests.recipes.facts import data_bytes, decisions, facts, type_counts, types
from workshop.snapshots import FTYPES, SIZES, SNAPSHOT, compress, expand


@lru_cache
def snapshot() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SNAPSHOT.read_text("utf-8"))
    return found


def llama_quantize(size: str, ftype: str, *, imatrix: bool) -> dict[str, str]:
    """Tensor -> type as llama-quantize chooses."""
    entry = dict(snapshot()[f"{size} {ftype}"])
    guided = entry.pop("imatrix", {})
    return expand(entry | guided if imatrix else entry, SIZES[size].num_hidden_layers)


def test_the_snapshot_is_complete() -> None:
    assert set(snapshot()) == {"provenance", *(f"{size} {ftype}" for size in SIZES for ftype in FTYPES)}


def test_compress_and_expand_are_inverse() -> None:
    types = {f"blk.{bid}.attn_v.weight": "Q6_K" if bid in (0, 1, 5) else "Q4_K" for bid in range(9)}
    types["token_embd.weight"] = "Q8_0"
    assert compress(types) == {"token_embd": "Q8_0", "attn_v": "Q4_K, Q6_K 0-1,5"}
    assert expand(compress(types), 9) == types


@pytest.mark.parametrize("ftype", FTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_types_are_those_of_llama_quantize(size: str, ftype: str) -> None:
    recipe = find_recipe(f"{ftype}@llama.cpp")
    assert types(recipe, size, imatrix=True, complete=True) == llama_quantize(size, ftype, imatrix=True)
    expected = llama_quantize(size, ftype, imatrix=False)
    needy = {qtype.name for qtype, row in GGML_TYPES.items() if row.needs_importances}
    for name, decision in decisions(recipe, size).items():
        substituted = decision.qtype.name == "Q2_K" and "never evaluated" in decision.reason
        assert decision.qtype.name == expected[name] or (substituted and expected[name] in needy)


@pytest.mark.parametrize("ftype", FTYPES)
def test_the_three_names_differ_where_they_should(ftype: str) -> None:
    """The plain name and @2025 have the same layers as @llama.cpp, but for weights that are never evaluated."""
    exact = types(find_recipe(f"{ftype}@llama.cpp"), "E4B", imatrix=True, complete=True)
    of_2025 = types(find_recipe(f"{ftype}@2025"), "E4B", imatrix=True, complete=True)
    plain = decisions(find_recipe(ftype), "E4B", imatrix=True, complete=True)
    assert {name for name in exact if exact[name] != of_2025[name]} <= {PER_LAYER_TOKEN_EMBD}
    for tensor in facts("E4B").quantizable:
        if tensor.evaluated and tensor.name != PER_LAYER_TOKEN_EMBD:
            assert plain[tensor.name].qtype.name == exact[tensor.name]
    assert plain[PER_LAYER_TOKEN_EMBD].qtype in PLE_TYPES


OLD_TABLES = {
    "Q2_K": ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"),
    "IQ3_S": ("IQ2_S", "IQ2_M", "IQ3_XXS"),
    "Q4_K": ("TQ1_0", "TQ2_0"),
}


@pytest.mark.parametrize("ftype", FTYPES)
def test_the_per_layer_table_of_2025(ftype: str) -> None:
    recipe = find_recipe(f"{ftype}@2025")
    expected = next((qtype for qtype, ftypes in OLD_TABLES.items() if ftype in ftypes), recipe.qtype.name)
    assert types(recipe, "E2B", imatrix=True)[PER_LAYER_TOKEN_EMBD] == expected


UNSLOTH_2025 = {"ple": "Q5_1", "token_embd": "Q4_K"}


@pytest.mark.parametrize(
    ("ftype", "options", "size", "file_bytes"),
    [
        ("Q8_0", {}, "E4B", 7_353_292_256),  # ggml-org
        ("Q8_0", {}, "E2B", 4_788_112_064),
        ("Q4_K_M", UNSLOTH_2025, "E4B", 4_539_054_208),  # unsloth
        ("Q4_K_M", UNSLOTH_2025, "E2B", 3_026_881_888),
    ],
)
def test_published_files_of_2025_have_that_size(
    ftype: str, options: dict[str, str], size: str, file_bytes: int
) -> None:
    """What is left is the header: vocabulary, chat template and keys, alike in all four but for the tensor table."""
    recipe = override(find_recipe(f"{ftype}@2025"), **options)
    header_bytes = file_bytes - data_bytes(recipe, size, vocab_size=262_144)
    assert header_bytes - {"E2B": 0, "E4B": 120 * 61}[size] == pytest.approx(6_558_300, abs=500)


def test_a_published_file_of_2025_has_these_counts() -> None:
    """lmstudio-community's E4B Q4_K_M."""
    assert type_counts(find_recipe("Q4_K_M@2025"), "E4B") == {"F32": 422, "F16": 108, "Q4_K": 282, "Q6_K": 35}


def test_every_mixture_has_both_exact_names() -> None:
    mixtures = {name for name in preset_names() if not name.startswith("UD-") and name != "Q2_K_L"}
    assert mixtures == set(FTYPES)
    for name in mixtures:
        assert set(variant_names(name)) == {f"{name}@llama.cpp", f"{name}@2025"}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configs_are_those_of_the_fixtures(size: str) -> None:
    from workshop.checkpoints import CONFIGS

    path = CONFIGS / f"gemma-3n-{size.lower()}.json"
    assert parse_config(json.loads(path.read_text("utf-8")), path) == PUBLISHED[size]
