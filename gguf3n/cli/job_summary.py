"""The summary of a job of GitHub Actions: a page in Markdown that the steps of a job add to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gguf3n.errors import OutputError, UsageError
from gguf3n.inspection.lint import Report, Severity
from gguf3n.validation.document import Table, Text, markdown_block

VARIABLE = "GITHUB_STEP_SUMMARY"
MAX_BYTES = 1_000_000
"""Of one step; GitHub refuses more than a mebibyte, and shows none of it then."""
MAX_ROWS = 200
SEVERITIES = {Severity.ERROR: "error", Severity.WARNING: "warning"}


def check_summary() -> None:
    """Raises: UsageError where no job wants one."""
    if not os.environ.get(VARIABLE):
        raise UsageError(
            f"--summary: {VARIABLE} is not set", expected="a step of GitHub Actions", fix=f"{VARIABLE}=FILE"
        )


def append_summary(reports: Sequence[Report]) -> None:
    """Add what lint found, errors and warnings. Raises: OutputError."""
    counts = tuple(
        (report.name, str(report.count(Severity.ERROR)), str(report.count(Severity.WARNING)), str(report.n_checks))
        for report in reports
    )
    rows = tuple(
        (report.name, label, found.check.id, found.found, found.check.fix)
        for severity, label in SEVERITIES.items()
        for report in reports
        for found in report.findings
        if found.check.severity is severity
    )
    overview = Table(("file", "errors", "warnings", "checks"), "<>>>", counts, names=(0,))
    parts = ["### gguf3n lint", markdown_block(overview)]
    if rows:
        table = Table(("file", "", "check", "found", "to do"), "<<<<<", rows[:MAX_ROWS], names=(0,))
        parts.append(markdown_block(table))
    if len(rows) > MAX_ROWS:
        parts.append(markdown_block(Text(f"and {len(rows) - MAX_ROWS:,} more in the step's log")))
    path = Path(os.environ[VARIABLE])
    data = ("\n\n".join(parts) + "\n").encode()
    if len(data) > MAX_BYTES:
        data = "\n\n".join([*parts[:2], "What was found stands in the step's log.\n"]).encode()
    try:
        with open(path, "ab") as file:
            file.write(data)
    except OSError as error:
        raise OutputError(f"{path}: the job's summary cannot be written", found=error.strerror) from error
