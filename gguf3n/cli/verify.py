"""`gguf3n verify`: make a file again from its source, and compare bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import print_json, print_note
from gguf3n.cli.paint import filled, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.errors import FindingsError
from gguf3n.publishing.verify import Verification
from gguf3n.publishing.verify import verify as run_verify

SCHEMA = "gguf3n.verify/1"
SHOWN = 10
"""Differences that are printed; the JSON has all."""


def verify(
    file: Annotated[Path, typer.Argument(help="A GGUF file with a manifest beside it.")],
    source: Annotated[
        str, typer.Option(help="What it was made from: a checkpoint directory, a Hub id, or a GGUF file.")
    ],
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a Hub id.", show_default="the manifest's commit"),
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(help="Its manifest.", show_default="NAME.manifest.json beside it")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Its importance matrix.", show_default="where the manifest says")
    ] = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a GGUF file again from its source and its manifest; say where it differs. Exit code 12 if it does."""
    with progress_bar(quiet=quiet) as progress:
        found = run_verify(
            file,
            source,
            revision=revision,
            manifest=manifest,
            imatrix=imatrix,
            threads=threads,
            show_progress=not quiet,
            progress=progress,
        )
    if json:
        print_json(verification_json(found))
    else:
        _print(found, quiet=quiet)
    if not found.ok:
        raise typer.Exit(FindingsError.exit_code)


def verification_json(found: Verification) -> dict[str, Any]:
    """Everything that was found."""
    return {"schema": SCHEMA, **found.as_dict()}


def _print(found: Verification, *, quiet: bool) -> None:
    for note in found.notes:
        print_note("note", note, quiet=quiet)
    say(paint(str(found.path), "bold"))
    differences = list(found.differences())
    for difference in differences[:SHOWN]:
        say(*filled(difference))
    if len(differences) > SHOWN:
        say(*filled(f"and {len(differences) - SHOWN} more"))
    for claim in found.claims:
        say(*filled(claim))
    if found.ok:
        say(paint(f"the same, bit for bit: {found.manifest.recipe.name} of {found.source}", "green"))
    elif found.is_same:
        say(paint("the file is what the source gives, and not what its manifest says", "red"))
    else:
        say(paint("not what the source gives", "red"))
