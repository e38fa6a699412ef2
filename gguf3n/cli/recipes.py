"""`gguf3n recipes`: which quantizations there are, what is in them, and the one that a file has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.choosing import Choice, Limit, choices, estimates
from gguf3n.cli import options
from gguf3n.cli.console import columns, human_bytes, print_json, print_note
from gguf3n.cli.paint import filled, say, say_exactly
from gguf3n.cli.sizes import parse_bytes
from gguf3n.deciding import Estimate, estimate_encoders
from gguf3n.errors import UsageError
from gguf3n.formats.whole_file import check_not_input, write_whole
from gguf3n.gemma3n.runtime_memory import RUN_CTX
from gguf3n.recipes import For, Recipe, find_recipe, format_recipe, preset_names, variant_names

app = typer.Typer(
    name="recipes", help="List, show and extract quantizations.", no_args_is_help=True, add_completion=False
)


GIB = 1 << 30

Mmproj = Annotated[bool, typer.Option("--mmproj", help="Those of the mmproj file, with vision and audio.")]


def list_recipes(
    all_names: Annotated[bool, typer.Option("--all", help="Also NAME@llama.cpp and NAME@2025.")] = False,
    mmproj: Mmproj = False,
    size: Annotated[str | None, typer.Option(help="Only files of at most this size, as in 4GB or 4GiB.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Only what llama.cpp runs in this much free memory, on a CPU, as in 8GB.")
    ] = None,
    ctx: Annotated[
        int | None, typer.Option(help="With --memory: tokens of context.", show_default=str(RUN_CTX))
    ] = None,
    types: Annotated[bool, typer.Option("--types", help="Also how many tensors have which type.")] = False,
    json: options.Json = False,
) -> None:
    """List the quantizations: size of an E2B and an E4B file, bits a weight, advice."""
    limit = _limit(size, memory, ctx, mmproj=mmproj)
    part = For.MMPROJ if mmproj else For.TEXT
    names = list(preset_names(part))
    if all_names and not mmproj:
        names += [variant for name in preset_names() for variant in variant_names(name)]
    listed = [(recipe, _estimates(recipe)) for recipe in (find_recipe(name, part) for name in names)]
    listed.sort(key=lambda pair: -list(pair[1].values())[-1].total_bytes)
    best = None
    if limit is not None:
        best = next(choices(limit), None)
        fitting = [
            (recipe, {size: each for size, each in found.items() if limit.allows(size, each)})
            for recipe, found in listed
        ]
        if not any(found for _, found in fitting):
            raise _nothing_fits(limit, listed)
        listed = [(recipe, found) for recipe, found in fitting if found]
    if json:
        entries = [_as_json(recipe, found) for recipe, found in listed]
        if limit is not None:
            for entry in entries:
                for name, one in entry["sizes"].items():
                    one["recommended"] = best is not None and (best.size, best.quant) == (name, entry["name"])
        print_json(entries)
        return
    if limit is not None:
        _print_choice(best, limit)
    _print_table(listed, with_types=types)


def _limit(size: str | None, memory: str | None, ctx: int | None, *, mmproj: bool) -> Limit | None:
    """What is to fit, if that is asked. Raises: UsageError."""
    if ctx is not None and memory is None:
        raise UsageError("--ctx without --memory", fix="add --memory 8GB, or leave --ctx out")
    most, room = parse_bytes(size, "--size"), parse_bytes(memory, "--memory")
    if most is None and room is None:
        return None
    if mmproj:
        option = "--memory" if most is None else "--size"
        raise UsageError(f"{option} with --mmproj", expected="a limit for text files", fix="leave one of them out")
    return Limit(
        None if most is None else int(most), None if room is None else int(room), RUN_CTX if ctx is None else ctx
    )


def _nothing_fits(limit: Limit, listed: Sequence[tuple[Recipe, Mapping[str, Estimate]]]) -> UsageError:
    needs = [
        (limit.need(size, each), f"{size} in {recipe.name}") for recipe, sizes in listed for size, each in sizes.items()
    ]
    smallest, what = min(needs)
    found = [human_bytes(each) for each in (limit.file_bytes, limit.memory_bytes) if each is not None]
    return UsageError(
        "nothing is as small as that",
        expected=f"at least {human_bytes(smallest)}, which {what} takes",
        found=" and ".join(found),
        fix="give more" + (", or a smaller --ctx" if limit.memory_bytes is not None else ""),
    )


def _print_choice(best: Choice | None, limit: Limit) -> None:
    """What to take, first of all, and what it takes."""
    if best is None:
        say("recommended: none; what is as small as that loses too much", "")
        return
    say(f"recommended: gguf3n convert google/gemma-3n-{best.size}-it -q {best.quant}")
    parts = [(best.estimate.total_bytes, "file")]
    if limit.memory_bytes is not None:
        runtime = limit.runtime(best.size)
        parts += [
            (runtime.cache_bytes, f"for {runtime.n_ctx:,} tokens"),
            (runtime.total_bytes - runtime.cache_bytes, "to compute with"),
        ]
    sums = " + ".join(f"{n_bytes / GIB:.2f} GiB {what}" for n_bytes, what in parts)
    total = f" = {sum(n_bytes for n_bytes, _ in parts) / GIB:.2f} GiB" if len(parts) > 1 else ""
    say(f"  {sums}{total}")
    if best.estimate.needs_imatrix:
        say("  it needs an importance matrix: --imatrix FILE")
    say("")


def _print_table(listed: Sequence[tuple[Recipe, Mapping[str, Estimate]]], *, with_types: bool) -> None:
    sizes = tuple(dict.fromkeys(size for _, found in reversed(listed) for size in found))
    rows = [("name", *sizes, "bits", "advice")]
    for recipe, found in listed:
        cells = [human_bytes(found[size].total_bytes) if size in found else "-" for size in sizes]
        bits = list(found.values())[-1].bits_per_weight
        rows.append((recipe.name, *cells, f"{bits:.2f}", recipe.summary))
    heading, *lines = columns(rows, "<" + ">" * len(sizes) + "><")
    say(heading)
    for line, (_, found) in zip(lines, listed, strict=True):
        say(line)
        if with_types:
            for size, each in found.items():
                say(*filled(f"{size}: {_type_counts(each)}", indent=4))


def show(
    name: Annotated[str, typer.Argument(help="A quantization, or a recipe file.")],
    mmproj: Mmproj = False,
    json: options.Json = False,
) -> None:
    """Show a quantization in full, as a file to copy and change."""
    recipe = find_recipe(name, For.MMPROJ if mmproj else For.TEXT)
    found = _estimates(recipe)
    if json:
        print_json(_as_json(recipe, found) | {"rules": [_rule_json(recipe, i) for i in range(len(recipe.rules))]})
        return
    say_exactly(format_recipe(recipe, [_size_line(size, each) for size, each in found.items()]))


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
    return dict(estimates(recipe))


def _type_counts(found: Estimate) -> str:
    return ", ".join(f"{count} {qtype.name}" for qtype, count in found.type_counts.items())


def _size_line(size: str, found: Estimate) -> str:
    need = ", needs an importance matrix" if found.needs_imatrix else ""
    bits = f"{found.bits_per_weight:.2f} bits a weight"
    return f"{size}: {human_bytes(found.total_bytes)}, {bits}, {_type_counts(found)}{need}"


def _as_json(recipe: Recipe, found: Mapping[str, Estimate]) -> dict[str, Any]:
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
            for size, each in found.items()
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
