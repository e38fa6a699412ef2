"""What `convert` and `quantize` share: from a source to files or to a printed plan."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, human_bytes, print_json, print_note, shape_text
from gguf3n.cli.lint import SHOWN
from gguf3n.cli.next_steps import next_steps
from gguf3n.cli.paint import say
from gguf3n.cli.progress import progress_bar
from gguf3n.cli.validate import print_validation, validation_json
from gguf3n.conversion import (
    Conversion,
    ConversionOptions,
    output_paths,
    parse_options,
    plan_all,
    plan_files,
    write_files,
)
from gguf3n.engines.vision_reference import check_packages
from gguf3n.errors import FindingsError, UsageError
from gguf3n.formats.whole_file import check_not_input, check_output, make_directory
from gguf3n.gemma3n.part import PartKind
from gguf3n.gemma3n.source import Checkpoint, Source
from gguf3n.inspection.lint import Finding
from gguf3n.planning import Plan, make_plan
from gguf3n.publishing.manifest import check_recordable, make_manifest, manifest_path, record_source, write_manifest
from gguf3n.recipes import For, find_recipe
from gguf3n.validation.logits import check_fits
from gguf3n.validation.options import ValidationOptions, parse_validation
from gguf3n.validation.report import check_report, write_report
from gguf3n.validation.result import Stage, Verdict
from gguf3n.validation.stages import check_extra
from gguf3n.validation.validate import Validation, run_all
from gguf3n.validation.vision import made_bytes

SCHEMA = "gguf3n.convert/1"


@dataclass(frozen=True)
class Writing:
    """What `convert` and `quantize` share: the files wanted, whether they are written and proved, what is printed."""

    quant: options.Quants = None
    mmproj: options.Mmproj = None
    output: options.Output = None
    no_vision: options.NoVision = False
    no_audio: options.NoAudio = False
    like: options.Like = None
    imatrix: options.Imatrix = None
    refine: options.Refine = None
    ple: options.Ple = None
    token_embd: options.TokenEmbd = None
    tensor_types: options.TensorTypes = None
    keep: options.Keep = None
    force_types: options.ForceTypes = False
    against: options.Against = None
    threads: options.Threads = None
    dry_run: options.DryRun = False
    manifest: options.Manifest = False
    validate: options.Validate = False
    stages: options.Stages = None
    report: options.Report = None
    json: options.Json = False
    quiet: options.Quiet = False
    force: options.Force = False

    def conversion(self) -> ConversionOptions:
        """Raises: UsageError for what can't be used; GGUFError or HubError for files that are named."""
        return parse_options(
            self.quant or (),
            self.output,
            mmproj=self.mmproj or (),
            vision=not self.no_vision,
            audio=not self.no_audio,
            force_types=self.force_types,
            like=self.like or (),
            ple=self.ple,
            token_embd=self.token_embd,
            tensor_types=self.tensor_types or (),
            keep=self.keep,
            imatrix=self.imatrix,
            refine=self.refine,
            threads=self.threads,
            force=self.force,
        )

    def validation(self) -> ValidationOptions | None:
        """None where nothing is to be validated. Raises: UsageError."""
        if not self.validate:
            for option, value in (("--stages", self.stages), ("--report", self.report)):
                if value is not None:
                    raise UsageError(f"{option} without --validate")
            return None
        if self.dry_run:
            raise UsageError("--validate with --dry-run, which writes nothing to validate")
        return parse_validation(self.stages, threads=self.threads)


def write_or_show(read: Callable[[ConversionOptions], Source], wanted: Writing) -> None:
    """Write the files and validate them, or print what would be written.

    Args:
        read: opens the source, once the options are known to be sound.
    """
    if wanted.against is not None and not wanted.dry_run:
        raise UsageError("--against without --dry-run", fix="add --dry-run, or leave --against out")
    validation = wanted.validation()
    conversion = wanted.conversion()
    source = read(conversion)
    if validation is not None:
        validation = replace(validation, imatrix=conversion.imatrix, correlations=conversion.correlations)
        check_extra(source, validation, validation.stages)
        if Stage.LOGITS in validation.stages:
            check_fits(source)
        parts = {recipe.part for recipe in conversion.recipes}
        if Stage.VISION in validation.stages and isinstance(source, Checkpoint) and For.MMPROJ in parts:
            check_packages()
            if For.TEXT not in parts:
                made_bytes(source, "--quant TYPE as well")
    if wanted.report is not None:
        if len(conversion.recipes) > 1:
            raise UsageError(f"one report for {len(conversion.recipes)} files", fix="validate them one by one")
        check_report(wanted.report, force=wanted.force)
    if wanted.manifest and wanted.dry_run:
        raise UsageError("--manifest with --dry-run, which writes nothing to describe")
    if wanted.manifest:
        check_recordable(source, conversion)
    plans = plan_files(source, conversion)
    notices = list(dict.fromkeys(notice for each in plans for notice in each.notices))
    for notice in notices:
        print_note("note", notice, quiet=wanted.quiet)
    tell_findings(list(dict.fromkeys(finding for each in plans for finding in each.findings)), quiet=wanted.quiet)
    result: dict[str, Any] = {"schema": SCHEMA, "source": source.origin, "notices": notices}
    if wanted.dry_run:
        _show(plans, conversion, wanted, result)
        return
    manifests = _manifest_paths(plans, conversion) if wanted.manifest else []
    with progress_bar(quiet=wanted.quiet) as progress:
        written = write_files(plans, conversion, progress)
    if manifests:
        recorded = record_source(source)
        for each, path in zip(written, manifests, strict=True):
            manifest = make_manifest(each, conversion, recorded, ["gguf3n", *sys.argv[1:]])
            write_manifest(manifest, path, force=conversion.force)
    if not wanted.json:
        print_written(written)
    validations: list[Validation] = []
    if validation is not None:
        validations += run_all(
            [(each.path, each.plan.part) for each in written],
            validation,
            watch=lambda: progress_bar(quiet=wanted.quiet),
            notice=lambda text: print_note("note", text, quiet=wanted.quiet),
        )
    if wanted.report is not None:
        write_report(validations[0], wanted.report, force=wanted.force)
    if wanted.json:
        result["seconds"] = round(written[0].seconds, 3)
        result["outputs"] = [plan_json(each.plan, each.path, with_tensors=False) for each in written]
        for entry, path in zip(result["outputs"], manifests, strict=False):
            entry["manifest"] = str(path)
        for entry, found in zip(result["outputs"], validations, strict=False):
            entry["validation"] = validation_json(found)
        print_json(result)
    else:
        for found in validations:
            print_validation(found)
    if any(found.verdict is Verdict.FAIL for found in validations):
        raise typer.Exit(FindingsError.exit_code)
    if not wanted.json and not wanted.quiet:
        say(*next_steps(written))


def tell_findings(findings: Sequence[Finding], *, quiet: bool) -> None:
    """What lint will say of the files."""
    for check in dict.fromkeys(finding.check for finding in findings):
        found = [finding.notice for finding in findings if finding.check is check]
        lines = found[:SHOWN]
        if len(found) > SHOWN:
            lines.append(f"{check.id}: {len(found) - SHOWN} more; gguf3n lint names them all")
        for line in lines:
            print_note("warning", line, quiet=quiet)


def _show(plans: Sequence[Plan], conversion: ConversionOptions, wanted: Writing, result: dict[str, Any]) -> None:
    """Print what would be written."""
    others: list[Plan | None] = [None] * len(plans)
    if wanted.against is not None:
        kind = plans[0].part.kind  # the text model's files come first
        others = [_other_plan(each, wanted.against, conversion) if each.part.kind is kind else None for each in plans]
    paths = output_paths([each.file_name for each in plans], conversion.output)
    if wanted.json:
        result["outputs"] = [
            plan_json(each, path, against=other) for each, path, other in zip(plans, paths, others, strict=True)
        ]
        print_json(result)
        return
    for each, path, other in zip(plans, paths, others, strict=True):
        print_plan(each, path, other)


def _manifest_paths(plans: Sequence[Plan], conversion: ConversionOptions) -> list[Path]:
    """Where the manifests will stand. Raises: OutputError where one can't, before any work."""
    paths = [manifest_path(path) for path in output_paths([each.file_name for each in plans], conversion.output)]
    for path in paths:
        make_directory(path.parent)
        check_not_input(path, *conversion.inputs)
        check_output(path, force=conversion.force)
    return paths


def _other_plan(plan: Plan, against: str, conversion: ConversionOptions) -> Plan:
    """The same file by another recipe."""
    recipe = find_recipe(against, plan.recipe.part)
    if plan.part.kind is PartKind.TEXT:
        return plan_all(plan.part, [recipe], conversion.imatrix, conversion.correlations)[0]
    return make_plan(plan.part, recipe)


def _type_counts(plan: Plan) -> str:
    return ", ".join(f"{count} {qtype.name}" for qtype, count in plan.type_counts.items())


def _refined(plan: Plan) -> str:
    """How much of a file is refined."""
    n_rows = sum(tensor.source.n_rows for tensor in plan.refined)
    return f"refined: {n_rows:,} rows of {len(plan.refined)} tensors"


def print_written(written: Sequence[Conversion]) -> None:
    for conversion in written:
        plan = conversion.plan
        say(str(conversion.path))
        say(f"  {human_bytes(plan.total_bytes)}, {plan.bits_per_weight:.2f} bits a weight, {_type_counts(plan)}")
        if plan.refined:
            say(f"  {_refined(plan)}")
    say(f"{written[0].seconds:.1f} s")


def print_plan(plan: Plan, path: Path, against: Plan | None) -> None:
    reasons = list(dict.fromkeys((tensor.rule, tensor.reason) for tensor in plan.tensors))
    rows = [("tensor", "shape", "type", "size", "why", "" if against is None else against.recipe.name)]
    for tensor, other in zip(plan.tensors, plan.tensors if against is None else against.tensors, strict=True):
        slot = tensor.slot
        why = f"[{reasons.index((tensor.rule, tensor.reason)) + 1}]"
        differs = "" if other.slot.qtype is slot.qtype else other.slot.qtype.name
        rows.append((slot.name, shape_text(slot.shape), slot.qtype.name, human_bytes(slot.n_bytes), why, differs))
    say(f"{path}: {plan.recipe.name}")
    for line in columns(rows, "<><><<"):
        say(line)
    for number, (rule, reason) in enumerate(reasons, 1):
        say(f"[{number}] {rule}: {reason}")
    say(f"{len(plan.tensors)} tensors: {_type_counts(plan)}")
    if plan.refined:
        say(_refined(plan))
    say(f"{plan.total_bytes:,} bytes ({human_bytes(plan.total_bytes)}), {plan.bits_per_weight:.2f} bits a weight")
    if against is not None:
        n_different = sum(row[-1] != "" for row in rows[1:])
        difference = plan.total_bytes - against.total_bytes
        say(
            f"against {against.recipe.name}: {n_different} tensors in another type, {difference:+,} bytes "
            f"({difference / against.total_bytes:+.2%})"
        )


def plan_json(plan: Plan, path: Path, *, with_tensors: bool = True, against: Plan | None = None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "path": str(path),
        "quant": plan.recipe.name,
        "bytes": plan.total_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "n_weights": plan.part.n_weights,
        "types": {qtype.name: count for qtype, count in plan.type_counts.items()},
        "refined": {"tensors": len(plan.refined), "rows": sum(tensor.source.n_rows for tensor in plan.refined)},
        "findings": [finding.as_dict() for finding in plan.findings],
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
                "refined": tensor.refinement is not None,
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
