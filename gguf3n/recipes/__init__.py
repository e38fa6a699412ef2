"""Which tensor gets which type, and why.

A recipe is data: TOML files under presets/, or a user's own. `find_recipe` reads one by name, `Recipe.resolve` turns
what is known of a tensor into a Decision.
"""

from __future__ import annotations

from gguf3n.recipes.extract import extract_recipe
from gguf3n.recipes.library import find_recipe, override, parse_recipe, preset_names, variant_names
from gguf3n.recipes.model import (
    PER_LAYER_TOKEN_EMBD,
    PLE_TYPES,
    TOKEN_EMBD,
    VARIANT_LABELS,
    Decision,
    For,
    ImageRows,
    Keep,
    Recipe,
    Rule,
    Tensor,
    check_rules,
)
from gguf3n.recipes.text import format_recipe

__all__ = [
    "PER_LAYER_TOKEN_EMBD",
    "PLE_TYPES",
    "TOKEN_EMBD",
    "VARIANT_LABELS",
    "Decision",
    "For",
    "ImageRows",
    "Keep",
    "Recipe",
    "Rule",
    "Tensor",
    "check_rules",
    "extract_recipe",
    "find_recipe",
    "format_recipe",
    "override",
    "parse_recipe",
    "preset_names",
    "variant_names",
]
