"""`gguf3n recipes`: which quantizations there are, what is in them, and the one that a file has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, human_bytes, print_json, print_note
from gguf3n.cli.paint import say, say_exactly
from gguf3n.deciding import Estimate, estimate, estimate_encoders
from gguf3n.formats.whole_file import check_not_input, write_whole
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.recipes import For, Recipe, find_recipe, format_recipe, preset_names, variant_names

app = typer.Typer(
    name="recipes", help="List, show and extract quantizations.", no_args_is_help=True, add_completion=False
)


Mmproj = Annotated[bool, typer.Option("--mmproj", help="Those of the mmproj file, with vision and audio.")]


def list_recipes(
    all_names: Annotated[bool, typer.Option("--all", help="Also NAME@llama.cpp and NAME@2025.")] = False,
    mmproj: Mmproj = False,
    json: options.Json = False,
) -> None:
    """List the quantizations: size of an E2B and an E4B file, bits a weight, advice."""
    part = For.MMPROJ if mmproj else For.TEXT
    names = list(preset_names(part))
    if all_names and not mmproj:
        names += [variant for name in preset_names() for variant in variant_names(name)]
    found = [(recipe, _estimates(recipe)) for recipe in (find_recipe(name, part) for name in names)]
    found.sort(key=lambda pair: -list(pair[1].values())[-1].total_bytes)
    if json:
        print_json([_as_json(recipe, estimates) for recipe, estimates in found])
        return
    sizes = tuple(found[0][1])
    rows = [("name", *sizes, "bits", "advice")]
    for recipe, estimates in found:
        cells = [human_bytes(each.total_bytes) for each in estimates.values()]
        rows.append((recipe.name, *cells, f"{estimates[sizes[-1]].bits_per_weight:.2f}", recipe.summary))
    for line in columns(rows, "<" + ">" * len(sizes) + "><"):
        say(line)


def show(
    name: Annotated[str, typer.Argument(help="A quantization, or a recipe file.")],
    mmproj: Mmproj = False,
    json: options.Json = False,
) -> None:
    """Show a quantization in full, as a file to copy and change."""
    recipe = find_recipe(name, For.MMPROJ if mmproj else For.TEXT)
    estimates = _estimates(recipe)
    if json:
        print_json(_as_json(recipe, estimates) | {"rules": [_rule_json(recipe, i) for i in range(len(recipe.rules))]})
        return
    say_exactly(format_recipe(recipe, [_size_line(size, each) for size, each in estimates.items()]))


def extract(
    source: Annotated[str, typer.Argument(help="A GGUF file: a path, an https URL, or org/repo:QUANT on the Hub.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A .toml file.", show_default="stdout")] = None,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Write the recipe that gives a model the types of a GGUF file, tensor by tensor; reads its header only."""
    if output is not None:
        check_not_input(output, source)
    from gguf3n.conversion import read_recipe  # Why: listing and showing need nothing that converts

    recipe = read_recipe(source)
    if recipe.note:
        print_note("note", recipe.note, quiet=quiet)
    text = format_recipe(recipe)
    if output is None:
        say_exactly(text)
        return
    write_whole(output, text, force=force)


def _estimates(recipe: Recipe) -> dict[str, Estimate]:
    """For each published size that the recipe is for; of the encoders, with the audio encoder and without."""
    if recipe.part is For.MMPROJ:
        return {
            "vision": estimate_encoders(recipe, audio=False),
            "vision, audio": estimate_encoders(recipe),
        }
    return {
        size: estimate(recipe, config)
        for size, config in PUBLISHED.items()
        if recipe.n_layers in (None, config.num_hidden_layers)
    }


def _size_line(size: str, found: Estimate) -> str:
    counts = ", ".join(f"{count} {qtype.name}" for qtype, count in found.type_counts.items())
    need = ", needs an importance matrix" if found.needs_imatrix else ""
    return f"{size}: {human_bytes(found.total_bytes)}, {found.bits_per_weight:.2f} bits a weight, {counts}{need}"


def _as_json(recipe: Recipe, estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "note": recipe.note,
        "sizes": {
            size: {
                "bytes": each.total_bytes,
                "bits_per_weight": round(each.bits_per_weight, 4),
                "types": {qtype.name: count for qtype, count in each.type_counts.items()},
                "needs_imatrix": each.needs_imatrix,
            }
            for size, each in estimates.items()
        },
    }


def _rule_json(recipe: Recipe, index: int) -> dict[str, Any]:
    rule = recipe.rules[index]
    return {
        "patterns": list(rule.patterns),
        "is_regex": rule.is_regex,
        "layers": None if rule.layers is None else list(rule.layers.parts),
        "imatrix": rule.imatrix,
        "type": rule.qtype.name,
        "reason": rule.reason,
    }
