"""`gguf3n lint`: what is wrong with GGUF files of Gemma 3n, or with a repository of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, print_json
from gguf3n.cli.job_summary import append_summary, check_summary
from gguf3n.cli.paint import annotate, filled, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.errors import FindingsError, UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.inspection.lint import CHECKS, Check, Finding, Report, Severity
from gguf3n.inspection.lint import lint as run_lint
from gguf3n.progress import OnProgress
from gguf3n.publishing.checks import REPOSITORY_CHECKS, RepositoryReport, Tag, lint_repository
from gguf3n.publishing.repository import is_repository

SCHEMA = "gguf3n.lint/1"
SHOWN = 3
"""Findings of one check that are printed; the JSON has all."""
MAX_ANNOTATIONS = 10
"""Of one severity that GitHub shows of a step. Source: its documentation of workflow commands."""
STYLES = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "blue"}
LABELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.NOTE: "note"}


def lint(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE | DIR | ORG/REPO]...",
            help="GGUF files: paths, https URLs, or ORG/REPO:QUANT; a directory or ORG/REPO for a repository's names, "
            "tags and card.",
        ),
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read the tensors too; of a directory the checksums.")] = False,
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
    summary: Annotated[
        bool, typer.Option("--summary", help="Add a table to the job's summary, $GITHUB_STEP_SUMMARY.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what is wrong with GGUF files, for which engine, and how to fix it. Exit code 12 for errors."""
    if checks:
        _print_checks(as_json=json)
        return
    if not files:
        raise UsageError("no file", expected="a GGUF file, a directory or ORG/REPO, or --checks")
    for option, other in (("--mmproj", mmproj), ("--base", base)):
        if other is not None and (len(files) > 1 or is_repository(files[0])):
            raise UsageError(f"{option} is for one file", found=" ".join(files), fix="name that file alone")
    if summary:
        check_summary()
    with progress_bar(quiet=quiet or not deep) as progress:
        reports = _reports(files, mmproj, base, deep=deep, progress=progress)
    failed = [report.count(Severity.ERROR) > 0 or (strict and report.count(Severity.WARNING) > 0) for report in reports]
    if summary:
        append_summary(reports)
    if json:
        made = [_as_json(report, ok=not bad) for report, bad in zip(reports, failed, strict=True)]
        if mmproj is not None:
            print_json(made[0] | {"mmproj": made[1]})
        else:
            print_json(made[0] if len(made) == 1 else {"schema": SCHEMA, "ok": not any(failed), "reports": made})
    elif github:
        _print_annotations(reports)
    else:
        for report in reports:
            _print_report(report)
    if any(failed):
        raise typer.Exit(FindingsError.exit_code)


def _reports(
    files: Sequence[str], mmproj: str | None, base: str | None, *, deep: bool, progress: OnProgress | None
) -> list[Report]:
    beside = None if mmproj is None else open_gguf(_source(mmproj), strict=False)
    model = None if base is None else open_gguf(_source(base), strict=False)
    reports: list[Report] = []
    for file in files:
        if is_repository(file):
            reports.append(lint_repository(file, with_data=deep))
        else:
            reports.append(run_lint(_source(file), with_data=deep, progress=progress, beside=beside, base=model))
    if beside is not None:
        reports.append(run_lint(beside, with_data=deep, progress=progress))
    return reports


def _source(file: str) -> str | Path:
    return file if "://" in file or not os.path.exists(file) else Path(file)


def _print_report(report: Report) -> None:
    say(paint(report.name, "bold"))
    for line in _tag_lines(report.tags) if isinstance(report, RepositoryReport) else ():
        say(*filled(line))
    for _, found in groupby(report.findings, key=lambda finding: finding.check.id):
        print_findings(list(found))
    if report.skipped:
        say("", *filled(report.skipped, 0))
    say("", _summary(report))


def _tag_lines(tags: Sequence[Tag]) -> Iterator[str]:
    """What each tag gives: once where llama.cpp and Ollama agree."""
    names = ["no tag" if tag.tag is None else f":{tag.tag}" for tag in tags]
    width = max(map(len, names), default=0)
    for name, tag in zip(names, tags, strict=True):
        ours = tag.llama_cpp or "nothing"
        if tag.mmproj is not None:
            ours += f" with {tag.mmproj}"
        if tag.ollama != (tag.llama_cpp,):
            ours += f" (llama.cpp), {' or '.join(tag.ollama) or 'nothing'} (Ollama)"
        yield f"{name:<{width}}  {ours}"


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


def _print_annotations(reports: Sequence[Report]) -> None:
    """Those that GitHub shows of each severity; the last of them says how many are left, which are printed as text."""
    for severity in Severity:
        found = [
            (report.name, finding)
            for report in reports
            for finding in report.findings
            if finding.check.severity is severity
        ]
        n_shown = len(found) if len(found) <= MAX_ANNOTATIONS else MAX_ANNOTATIONS - 1
        for name, finding in found[:n_shown]:
            annotate(severity.value, finding.check.id, name, _message(finding))
        if len(found) > n_shown:
            left = len(found) - n_shown
            annotate(severity.value, "more", found[n_shown][0], f"{left} more: they stand in the step's log")
        for name, finding in found[n_shown:]:
            say(f"{LABELS[severity]} {finding.check.id}: {name}: {_message(finding)}")


def _message(finding: Finding) -> str:
    return f"{finding.found}: {finding.check.meaning}. To do: {finding.check.fix}"


def _as_json(report: Report, *, ok: bool) -> dict[str, Any]:
    result = {
        "schema": SCHEMA,
        "path": report.name,
        "ok": ok,
        "n_checks": report.n_checks,
        "skipped": report.skipped,
        "counts": {LABELS[severity]: report.count(severity) for severity in Severity},
        "findings": [finding.as_dict() for finding in report.findings],
    }
    if isinstance(report, RepositoryReport):
        result["tags"] = [
            {"tag": tag.tag, "llama_cpp": tag.llama_cpp, "mmproj": tag.mmproj, "ollama": list(tag.ollama)}
            for tag in report.tags
        ]
    return result


def _print_checks(*, as_json: bool) -> None:
    tables: dict[str, tuple[Check[Any], ...]] = {"checks": CHECKS, "repository_checks": REPOSITORY_CHECKS}
    if as_json:
        rows_of = {name: [{**c.as_dict(), "group": c.group.value} for c in table] for name, table in tables.items()}
        print_json({"schema": SCHEMA, **rows_of})
        return
    every: tuple[Check[Any], ...] = (*CHECKS, *REPOSITORY_CHECKS)
    rows = [(check.id, LABELS[check.severity], check) for check in every]
    for line, (_, _, check) in zip(columns([row[:2] for row in rows], "<<"), rows, strict=True):
        data = " (with --deep)" if check.group.reads_data else ""
        say(paint(line, STYLES[check.severity]) + data)
        for text in (check.meaning, f"→ {check.fix}"):
            say(*filled(text, 4))
