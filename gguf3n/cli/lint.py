"""`gguf3n lint`: what is wrong with a GGUF file of Gemma 3n."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, print_json
from gguf3n.cli.paint import annotate, filled, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.errors import FindingsError, UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.inspection.lint import CHECKS, Finding, Report, Severity
from gguf3n.inspection.lint import lint as run_lint

SCHEMA = "gguf3n.lint/1"
SHOWN = 3
"""Findings of one check that are printed; the JSON has all."""
STYLES = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "blue"}
LABELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "note"}


def lint(
    file: Annotated[str | None, typer.Argument(help="A GGUF file: a path, an https URL, or ORG/REPO[:QUANT].")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read the tensors too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail for warnings too.")] = False,
    checks: Annotated[bool, typer.Option("--checks", help="Print the table of checks.")] = False,
    mmproj: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The mmproj file to be used with it: check both, and whether they fit."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Of an adapter: the text model to be used with it: check whether they fit."),
    ] = None,
    github: Annotated[bool, typer.Option("--github", help="Print annotations for GitHub Actions.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what is wrong with a GGUF file, for which engine, and how to fix it. Exit code 12 for errors."""
    if checks:
        _print_checks(as_json=json)
        return
    if file is None:
        raise UsageError("no file", expected="a GGUF file, or --checks")
    reports = []
    with progress_bar(quiet=quiet or not deep) as progress:
        beside = None if mmproj is None else open_gguf(_source(mmproj), strict=False)
        model = None if base is None else open_gguf(_source(base), strict=False)
        reports.append(run_lint(_source(file), with_data=deep, progress=progress, beside=beside, base=model))
        if beside is not None:
            reports.append(run_lint(beside, with_data=deep, progress=progress))
    failed = [report.count(Severity.ERROR) > 0 or (strict and report.count(Severity.WARNING) > 0) for report in reports]
    if json:
        result = _as_json(reports[0], ok=not failed[0])
        print_json(result | {"mmproj": _as_json(reports[1], ok=not failed[1])} if mmproj is not None else result)
    for report in () if json else reports:
        if github:
            _print_annotations(report)
        else:
            _print_report(report)
    if any(failed):
        raise typer.Exit(FindingsError.exit_code)


def _source(file: str) -> str | Path:
    return file if "://" in file or not os.path.exists(file) else Path(file)


def _print_report(report: Report) -> None:
    say(paint(report.name, "bold"))
    for check in CHECKS:
        found = [finding for finding in report.findings if finding.check is check]
        if found:
            print_findings(found)
    if report.skipped:
        say("", *filled(report.skipped, 0))
    say("", _summary(report))


def print_findings(found: Sequence[Finding]) -> None:
    """The findings of one check: what, what it means, what to do."""
    check = found[0].check
    label = LABELS[check.severity]
    say("", f"{paint(label, STYLES[check.severity])} {paint(check.id, 'bold')}")
    lines = [finding.found for finding in found[:SHOWN]]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} more")
    for line in (*lines, f"→ {check.meaning}", f"→ {check.fix}"):
        say(*filled(line))


def _summary(report: Report) -> str:
    counts = ", ".join(_counted(report.count(severity), LABELS[severity]) for severity in Severity)
    return f"{report.n_checks} checks: {counts}"


def _counted(n: int, word: str) -> str:
    return f"{n} {word}" + ("" if n == 1 else "s")


def _print_annotations(report: Report) -> None:
    for finding in report.findings:
        message = f"{finding.found}: {finding.check.meaning}. To do: {finding.check.fix}"
        annotate(finding.check.severity.value, finding.check.id, report.name, message)


def _as_json(report: Report, *, ok: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "path": report.name,
        "ok": ok,
        "n_checks": report.n_checks,
        "skipped": report.skipped,
        "counts": {LABELS[severity]: report.count(severity) for severity in Severity},
        "findings": [finding.as_dict() for finding in report.findings],
    }


def _print_checks(*, as_json: bool) -> None:
    if as_json:
        print_json({"schema": SCHEMA, "checks": [{**c.as_dict(), "group": c.group.value} for c in CHECKS]})
        return
    rows = [(check.id, LABELS[check.severity], check) for check in CHECKS]
    for line, (_, _, check) in zip(columns([row[:2] for row in rows], "<<"), rows, strict=True):
        data = " (with --deep)" if check.group.reads_data else ""
        say(paint(line, STYLES[check.severity]) + data)
        for text in (check.meaning, f"→ {check.fix}"):
            say(*filled(text, 4))
