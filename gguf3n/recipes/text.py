"""A recipe as a file: complete, with nothing inherited, to be read, copied and changed."""

from __future__ import annotations

import json
from collections.abc import Sequence

from gguf3n.recipes.model import For, Recipe, Rule
from gguf3n.recipes.toml import BASE, CONDITIONS, RULES


def format_recipe(recipe: Recipe, comments: Sequence[str] = ()) -> str:
    """TOML that reads back as the same recipe.

    Args:
        comments: lines for its top.
    """
    settings: list[tuple[str, object]] = [("name", recipe.name)]
    settings += [(key, text) for key, text in (("summary", recipe.summary), ("note", recipe.note)) if text]
    if recipe.part is not For.TEXT:
        settings.append(("for", recipe.part.value))
    settings += [
        ("ftype", recipe.ftype.name.removeprefix("MOSTLY_").removeprefix("ALL_")),
        ("type", recipe.qtype.name),
    ]
    text_settings: list[tuple[str, object]] = [
        ("token_embd", BASE if recipe.token_embd is None else recipe.token_embd.name),
        ("ple", BASE if recipe.ple is None else recipe.ple.name),
        ("unevaluated", RULES if recipe.unevaluated is None else recipe.unevaluated.name),
        ("keep", recipe.keep.value),
        ("image_rows", recipe.image_rows.value),
    ]
    if recipe.n_layers is not None:
        text_settings.append(("n_layers", recipe.n_layers))
    if recipe.part is For.TEXT:
        settings += text_settings
    lines = [f"# {line}".rstrip() for line in comments]
    lines += [f"{key} = {_value(value)}" for key, value in settings]
    if recipe.evidence:
        lines += ["evidence = [", *(f"    {_value(line)}," for line in recipe.evidence), "]"]
    for rule in recipe.rules:
        lines += ["", "[[rule]]", *_rule(rule)]
    return "\n".join(lines) + "\n"


def _rule(rule: Rule) -> list[str]:
    patterns = list(rule.patterns)
    lines = [f"{'regex' if rule.is_regex else 'tensor'} = {_value(patterns[0] if len(patterns) == 1 else patterns)}"]
    for key in CONDITIONS:
        value = getattr(rule, key)
        if key == "layers" and value is not None:
            value = [int(part) if part.lstrip("-").isdigit() else part for part in value.parts]
            value = value[0] if len(value) == 1 else value
        if value is not None:
            lines.append(f"{key} = {_value(value)}")
    return [*lines, f"type = {_value(rule.qtype.name)}", f"reason = {_value(rule.reason)}"]


def _value(value: object) -> str:
    """A TOML value; its strings, numbers, flags and lists are JSON's."""
    return json.dumps(value, ensure_ascii=False)
