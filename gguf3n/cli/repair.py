"""`gguf3n repair`: the fixes that are safe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import print_json
from gguf3n.cli.lint import LABELS
from gguf3n.cli.paint import filled, paint, say
from gguf3n.errors import FindingsError
from gguf3n.inspection.lint import Severity
from gguf3n.inspection.repair import Repair
from gguf3n.inspection.repair import repair as run_repair

SCHEMA = "gguf3n.repair/1"
SHOWN = 6
HOW = {
    "unchanged": "nothing to write",
    "in place": "changed in place: a few bytes of the header, each written whole or not at all",
    "copied": "copied to a new file, which then took the name",
}
WOULD = {
    "unchanged": "nothing would be written",
    "in place": "would be changed in place: a few bytes of the header",
    "copied": "would be copied to a new file, which then takes the name",
}


def repair(
    file: Annotated[Path, typer.Argument(help="A GGUF file.")],
    fix: Annotated[
        list[str] | None,
        typer.Option(help="Fix only what this check finds; repeatable.", show_default="all errors and warnings"),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write another file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the fixes and write nothing.")] = False,
    json: options.Json = False,
) -> None:
    """Fix what can be fixed safely; leave every other tensor alone. Exit code 12 if errors are left."""
    result = run_repair(file, output=output, only=fix or (), dry_run=dry_run)
    if json:
        print_json(_as_json(result, dry_run=dry_run))
    else:
        _print(result, dry_run=dry_run)
    if any(finding.check.severity is Severity.ERROR for finding in result.left):
        raise typer.Exit(FindingsError.exit_code)


def _print(result: Repair, *, dry_run: bool) -> None:
    say(paint(str(result.path), "bold"))
    for check_id, n in Counter(fix.check_id for fix in result.fixes).items():
        say("", f"{paint(check_id, 'green')}")
        fixes = [fix.what for fix in result.fixes if fix.check_id == check_id]
        for line in (*fixes[:SHOWN], *([f"and {n - SHOWN} more"] if n > SHOWN else [])):
            say(*filled(line))
    say("", f"{(WOULD if dry_run else HOW)[result.how]}")
    for severity in Severity:
        left = Counter(finding.check.id for finding in result.left if finding.check.severity is severity)
        if left:
            names = ", ".join(f"{check_id} ({n})" if n > 1 else check_id for check_id, n in left.items())
            say(*filled(f"left: {LABELS[severity]} {names}", 0))


def _as_json(result: Repair, *, dry_run: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "path": str(result.path),
        "dry_run": dry_run,
        "how": result.how,
        "fixes": [{"id": fix.check_id, "what": fix.what} for fix in result.fixes],
        "left": [finding.as_dict() for finding in result.left],
    }
