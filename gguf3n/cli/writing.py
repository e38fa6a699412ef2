"""What `convert` and `quantize` share: from a model to files or to a printed plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from gguf3n.cli.console import columns, human_bytes, print_json, print_note, progress_bar, shape_text
from gguf3n.cli.validate import parse_stages, print_validation, validate_written, validation_json
from gguf3n.conversion import Conversion, output_paths, plan_all, read_recipe, write
from gguf3n.errors import FindingsError, UsageError
from gguf3n.formats.imatrix import read_imatrix
from gguf3n.gemma3n.model import Model
from gguf3n.planning import Plan
from gguf3n.recipes import Recipe, find_recipe, override
from gguf3n.validation.report import check_report, write_report
from gguf3n.validation.result import Stage, Verdict
from gguf3n.validation.validate import check_extra, check_fits


def wanted_recipes(
    quants: Sequence[str] | None,
    like: Sequence[str] | None,
    output: Path | None,
    *,
    ple: str | None,
    token_embd: str | None,
    tensor_types: Sequence[str] | None,
    keep: str | None,
) -> list[Recipe]:
    """The recipes of a command line, before a source is fetched or read.

    Raises: UsageError for names or options that can't be used; GGUFError or HubError for a file to be like.
    """
    recipes = [*map(find_recipe, quants or ()), *map(read_recipe, like or ())]
    if not recipes:
        raise UsageError("no quantization named", expected="--quant NAME or --like FILE")
    recipes = [
        override(recipe, ple=ple, token_embd=token_embd, tensor_types=tensor_types or (), keep=keep)
        for recipe in recipes
    ]
    output_paths("", [recipe.name for recipe in recipes], output)
    return recipes


def write_or_show(
    model: Model,
    recipes: Sequence[Recipe],
    output: Path | None,
    *,
    imatrix: Path | None,
    against: str | None,
    threads: int | None,
    dry_run: bool,
    stages: Sequence[Stage],
    report: Path | None,
    json: bool,
    quiet: bool,
    force: bool,
) -> None:
    """Write the files and validate them, or print what would be written.

    Args:
        stages: of the validation; none for no validation.
    """
    check_extra(model, stages)
    if Stage.LOGITS in stages:
        check_fits(model)
    if report is not None:
        if len(recipes) > 1:
            raise UsageError(f"one report for {len(recipes)} files", fix="validate them one by one")
        check_report(report, force=force)
    matrix = None if imatrix is None else read_imatrix(imatrix)
    plans = plan_all(model, recipes, imatrix=matrix)
    notices = list(dict.fromkeys(notice for each in plans for notice in each.notices))
    for notice in notices:
        print_note("note", notice, quiet=quiet)
    result: dict[str, Any] = {"source": model.origin, "notices": notices}
    if dry_run:
        other = None if against is None else plan_all(model, [find_recipe(against)], imatrix=matrix)[0]
        paths = output_paths(model.name, [each.recipe.name for each in plans], output)
        if json:
            result["outputs"] = [_plan_json(each, path, against=other) for each, path in zip(plans, paths, strict=True)]
            print_json(result)
        else:
            for each, path in zip(plans, paths, strict=True):
                _print_plan(each, path, other)
        return
    with progress_bar(quiet=quiet) as progress:
        written = write(plans, output, threads=threads, force=force, progress=progress)
    if not json:
        _print_written(written)
    validations = validate_written(
        [each.path for each in written], model, stages, imatrix=matrix, threads=threads, quiet=quiet
    )
    if report is not None:
        write_report(validations[0], report, force=force)
    if json:
        result["seconds"] = round(written[0].seconds, 3)
        result["outputs"] = [_plan_json(each.plan, each.path, with_tensors=False) for each in written]
        for entry, validation in zip(result["outputs"], validations, strict=False):
            entry["validation"] = validation_json(validation)
        print_json(result)
    else:
        for validation in validations:
            print_validation(validation)
    if any(validation.verdict is Verdict.FAIL for validation in validations):
        raise typer.Exit(FindingsError.exit_code)


def wanted_stages(validate: bool, stages: str | None, report: Path | None, *, dry_run: bool) -> tuple[Stage, ...]:
    """The stages of `--validate` and `--stages`; none without. Raises: UsageError."""
    if not validate and (stages is not None or report is not None):
        raise UsageError(f"{'--stages' if stages is not None else '--report'} without --validate")
    if validate and dry_run:
        raise UsageError("--validate with --dry-run, which writes nothing to validate")
    return parse_stages(stages) if validate else ()


def _type_counts(plan: Plan) -> str:
    return ", ".join(f"{count} {qtype.name}" for qtype, count in plan.type_counts.items())


def _print_written(written: Sequence[Conversion]) -> None:
    for conversion in written:
        plan = conversion.plan
        print(conversion.path)
        print(f"  {human_bytes(plan.total_bytes)}, {plan.bits_per_weight:.2f} bits a weight, {_type_counts(plan)}")
    print(f"{written[0].seconds:.1f} s")


def _print_plan(plan: Plan, path: Path, against: Plan | None) -> None:
    reasons = list(dict.fromkeys((tensor.rule, tensor.reason) for tensor in plan.tensors))
    rows = [("tensor", "shape", "type", "size", "why", "" if against is None else against.recipe.name)]
    for tensor, other in zip(plan.tensors, plan.tensors if against is None else against.tensors, strict=True):
        slot = tensor.slot
        why = f"[{reasons.index((tensor.rule, tensor.reason)) + 1}]"
        differs = "" if other.slot.qtype is slot.qtype else other.slot.qtype.name
        rows.append((slot.name, shape_text(slot.shape), slot.qtype.name, human_bytes(slot.n_bytes), why, differs))
    print(f"{path}: {plan.recipe.name}")
    for line in columns(rows, "<><><<"):
        print(line)
    for number, (rule, reason) in enumerate(reasons, 1):
        print(f"[{number}] {rule}: {reason}")
    print(f"{len(plan.tensors)} tensors: {_type_counts(plan)}")
    print(f"{plan.total_bytes:,} bytes ({human_bytes(plan.total_bytes)}), {plan.bits_per_weight:.2f} bits a weight")
    if against is not None:
        n_different = sum(row[-1] != "" for row in rows[1:])
        difference = plan.total_bytes - against.total_bytes
        print(
            f"against {against.recipe.name}: {n_different} tensors in another type, {difference:+,} bytes "
            f"({difference / against.total_bytes:+.2%})"
        )


def _plan_json(plan: Plan, path: Path, *, with_tensors: bool = True, against: Plan | None = None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "path": str(path),
        "quant": plan.recipe.name,
        "bytes": plan.total_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "n_weights": plan.model.n_weights,
        "types": {qtype.name: count for qtype, count in plan.type_counts.items()},
    }
    if with_tensors:
        result["tensors"] = [
            {
                "name": tensor.slot.name,
                "shape": list(tensor.slot.shape),
                "type": tensor.slot.qtype.name,
                "bytes": tensor.slot.n_bytes,
                "offset": tensor.slot.offset,
                "rule": tensor.rule,
                "reason": tensor.reason,
            }
            for tensor in plan.tensors
        ]
    if against is not None:
        result["against"] = {
            "quant": against.recipe.name,
            "bytes": against.total_bytes,
            "types": {
                other.slot.name: other.slot.qtype.name
                for tensor, other in zip(plan.tensors, against.tensors, strict=True)
                if other.slot.qtype is not tensor.slot.qtype
            },
        }
    return result
