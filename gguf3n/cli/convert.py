"""`gguf3n convert`: a checkpoint to GGUF files."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gguf3n.cli import options
from gguf3n.cli.writing import Writing, write_or_show
from gguf3n.conversion import read_source
from gguf3n.errors import UsageError


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, or a Hub id like google/gemma-3n-E4B-it.")],
    wanted: Writing,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    adapter: options.Adapters = None,
    adapter_scale: options.AdapterScale = 1.0,
) -> None:
    """Convert a Gemma 3n checkpoint to one GGUF file, or to several from one read."""
    if os.path.isfile(source):
        raise UsageError(
            f"{source}: a file",
            expected="a checkpoint directory, or a Hub id",
            fix="gguf3n quantize, if it is a GGUF file; else name the directory that it is in",
        )
    write_or_show(
        lambda: read_source(
            source,
            revision=revision,
            weights=not wanted.dry_run,
            adapters=adapter or (),
            adapter_scale=adapter_scale,
            show_progress=not wanted.quiet,
        ),
        wanted,
    )
