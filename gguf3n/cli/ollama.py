"""`gguf3n ollama`: what Ollama wants beside a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguf3n.cli import options
from gguf3n.cli.console import print_json, print_note
from gguf3n.cli.paint import say
from gguf3n.publishing.ollama import MODELFILE, ollama_files

SCHEMA = "gguf3n.ollama/1"


def ollama(
    file: Annotated[Path, typer.Argument(help="The text model's GGUF file.")],
    mmproj: Annotated[Path | None, typer.Option(metavar="FILE", help="The mmproj file to be used with it.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A directory.", show_default="FILE's")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A chat template of your own, in Go's language.")
    ] = None,
    num_ctx: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context.", show_default="the model's, 32768 at most")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Write a Modelfile for Ollama, and the template, params and system files that the Hub gives to it."""
    made = ollama_files(file, mmproj, output, system=system, template=template, num_ctx=num_ctx)
    paths = made.write(force=force)
    for notice in made.notices:
        print_note("warning", notice, quiet=quiet)
    if json:
        print_json(
            {
                "schema": SCHEMA,
                "path": str(file),
                "outputs": [str(path) for path in paths],
                "params": made.params,
                "notices": made.notices,
            }
        )
        return
    for path in paths:
        say(str(path))
    say(f"to run it: ollama create NAME -f {made.directory / MODELFILE}")
