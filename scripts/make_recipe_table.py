"""Writes the table of all quantizations into docs/quantizations.md, between its markers.

python scripts/make_recipe_table.py           write
python scripts/make_recipe_table.py --check   only say whether it is up to date
"""

from __future__ import annotations

import argparse
import sys

from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.planning import Estimate, estimate
from gguf3n.recipes import find_recipe, preset_names
from workshop.pages import RECIPES, filled


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


def counts(found: Estimate) -> str:
    """As in "189 Q4_K, 61 Q5_K"; norms and scales, F32 in every file, are left out."""
    counted = {qtype.name: count for qtype, count in found.type_counts.items()}
    if len(counted) > 1:
        del counted["F32"]
    return ", ".join(f"{count} {name}" for name, count in counted.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 if docs/quantizations.md is not up to date")
    options = parser.parse_args()
    page = RECIPES.read_text("utf-8")
    up_to_date = filled(page, "recipe-table", table())
    if options.check:
        sys.exit(page != up_to_date)
    RECIPES.write_text(up_to_date, "utf-8")


if __name__ == "__main__":
    main()
