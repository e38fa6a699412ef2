"""Size against divergence: tuned recipes for a ladder of budgets, beside the mixtures that there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gguf3n.errors import QuantizationError
from gguf3n.planning import Plan
from gguf3n.recipes import Recipe, find_recipe, preset_names
from gguf3n.recipes.library import variant_names
from gguf3n.tuning.allocate import Tuning
from gguf3n.tuning.budget import Budget

N_STEPS = 24

THEIRS = "@llama.cpp"
"""How the names of llama.cpp's own mixtures end."""


@dataclass(frozen=True)
class Point:
    """A file that can be written. Units: bytes; nats a token, expected by the measured costs."""

    name: str
    n_bytes: int
    divergence: float


@dataclass(frozen=True)
class Ladder:
    """Tuned files, the smallest first, and stock ones."""

    tuned: tuple[Point, ...]
    stock: tuple[Point, ...]


def climb(tuning: Tuning, n_steps: int = N_STEPS) -> Ladder:
    """The best file for each of some sizes from the smallest to the one that has nothing to gain; and the mixtures
    whose types were all measured."""
    least, most = tuning.least_bytes, max(tuning.most_bytes, tuning.least_bytes)
    sizes = sorted({least + (most - least) * step // max(n_steps - 1, 1) for step in range(n_steps)})
    tuned = []
    for size in sizes:
        packing = tuning.pack(Budget(size, f"{size:,} bytes"))
        tuned.append(Point("tuned", tuning.fixed_bytes + packing.weight, packing.cost))
    stock = sorted(stock_points(tuning), key=lambda point: point.n_bytes)
    return Ladder(tuple(dict.fromkeys(tuned)), tuple(stock))


def stock_points(tuning: Tuning) -> Iterator[Point]:
    """The mixtures whose cost is known."""
    for recipe, plan in stock_plans(tuning):
        divergence = tuning.divergence(plan)
        if divergence is not None:
            yield Point(recipe.name, plan.total_bytes, divergence)


def stock_plans(tuning: Tuning) -> Iterator[tuple[Recipe, Plan]]:
    """Our mixtures and llama.cpp's of today, those that can be written of this model with these importances."""
    for preset in preset_names():
        for name in (preset, *(variant for variant in variant_names(preset) if variant == preset + THEIRS)):
            recipe = find_recipe(name)
            try:
                yield recipe, tuning.plan(recipe)
            except QuantizationError:  # needs importances
                continue


def same_size(tuning: Tuning, n_bytes: int) -> Plan | None:
    """The largest mixture of llama.cpp that is not larger; None where all are."""
    fitting = [
        plan for recipe, plan in stock_plans(tuning) if plan.total_bytes <= n_bytes and recipe.name.endswith(THEIRS)
    ]
    return max(fitting, key=lambda plan: plan.total_bytes, default=None)
