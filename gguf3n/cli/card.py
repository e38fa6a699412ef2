"""`gguf3n card`: a repository's README.md, Notice and SHA256SUMS."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguf3n.cli import options
from gguf3n.cli.console import print_json, print_note
from gguf3n.cli.paint import say
from gguf3n.cli.progress import progress_bar
from gguf3n.publishing.card import PICTURE, make_card

SCHEMA = "gguf3n.card/1"


def card(
    directory: Annotated[Path, typer.Argument(help="A directory with GGUF files.")],
    repo: Annotated[
        str | None, typer.Option(metavar="ORG/REPO", help="Where the files will be: for the card's commands.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="The original on the Hub.")] = None,
    quantized_by: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who made the files.", show_default="ORG")
    ] = None,
    picture: Annotated[bool, typer.Option("--picture", help=f"Draw size against KL divergence: {PICTURE}.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a repository's card: README.md, Notice and SHA256SUMS. Text outside its marks stays."""
    with progress_bar(quiet=quiet) as progress:
        made = make_card(
            directory,
            repo=repo,
            base_model=base_model,
            quantized_by=quantized_by,
            picture=picture,
            progress=progress,
        )
    paths = made.write()
    for notice in made.notices:
        print_note("note", notice, quiet=quiet)
    if json:
        print_json(
            {
                "schema": SCHEMA,
                "path": str(directory),
                "repo": made.repo,
                "outputs": [str(path) for path in paths],
                "files": [row.as_dict() for row in made.rows],
                "notices": made.notices,
            }
        )
        return
    for path in paths:
        say(str(path))
