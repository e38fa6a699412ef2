"""Writes the tables of all quantizations into docs/quantizations.md and docs/mmproj.md, between their markers.

python scripts/make_recipe_table.py           write
python scripts/make_recipe_table.py --check   only say whether it is up to date
"""

from __future__ import annotations

import argparse
import sys

from gguf3n.deciding import Estimate, estimate, estimate_encoders
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.recipes import For, find_recipe, preset_names
from workshop.pages import MMPROJ, RECIPES, filled


def table() -> str:
    """Every preset with sizes and type counts, largest first."""
    found = []
    for recipe in map(find_recipe, preset_names()):
        found.append((recipe, {size: estimate(recipe, config) for size, config in PUBLISHED.items()}))
    found.sort(key=lambda pair: -pair[1]["E4B"].total_bytes)
    lines = [
        "| | E2B GiB | E4B GiB | bits | E2B types | E4B types | |",
        "|---|--:|--:|--:|---|---|---|",
    ]
    for recipe, estimates in found:
        cells = [
            f"`{recipe.name}`",
            *(f"{each.total_bytes / 2**30:.2f}" for each in estimates.values()),
            f"{estimates['E4B'].bits_per_weight:.2f}",
            *map(counts, estimates.values()),
            recipe.summary,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def encoder_table() -> str:
    """The presets of the mmproj file, largest first."""
    found = []
    for recipe in (find_recipe(name, For.MMPROJ) for name in preset_names(For.MMPROJ)):
        found.append((recipe, estimate_encoders(recipe), estimate_encoders(recipe, audio=False)))
    found.sort(key=lambda row: -row[1].total_bytes)
    lines = ["| | with audio GiB | vision only GiB | types, with audio | |", "|---|--:|--:|---|---|"]
    for recipe, whole, vision in found:
        sizes = (f"{each.total_bytes / 2**30:.2f}" for each in (whole, vision))
        lines.append(f"| {' | '.join((f'`{recipe.name}`', *sizes, counts(whole), recipe.summary))} |")
    return "\n".join(lines) + "\n"


def counts(found: Estimate) -> str:
    """As in "189 Q4_K, 61 Q5_K"; norms and scales, F32 in every file, are left out."""
    counted = {qtype.name: count for qtype, count in found.type_counts.items()}
    if len(counted) > 1:
        del counted["F32"]
    return ", ".join(f"{count} {name}" for name, count in counted.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is not up to date")
    options = parser.parse_args()
    tables = ((RECIPES, "recipe-table", table()), (MMPROJ, "mmproj-table", encoder_table()))
    for path, marker, content in tables:
        page = path.read_text("utf-8")
        up_to_date = filled(page, marker, content)
        if options.check and page != up_to_date:
            sys.exit(f"{path} is not up to date")
        path.write_text(up_to_date, "utf-8")


if __name__ == "__main__":
    main()
