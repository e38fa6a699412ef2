"""`gguf3n slice`: a MatFormer slice as a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguf3n.cli import options
from gguf3n.cli.console import human_bytes, print_json, print_note
from gguf3n.cli.paint import say
from gguf3n.cli.progress import progress_bar
from gguf3n.conversion import read_source
from gguf3n.gemma3n.named_slices import find_slice
from gguf3n.gemma3n.slices import take_slice
from gguf3n.gemma3n.source import open_checkpoint
from gguf3n.slicing import write_slice

SCHEMA = "gguf3n.slice/1"


def slice(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, or a Hub id like google/gemma-3n-E4B-it.")],
    name: Annotated[str, typer.Argument(help="As `gguf3n slices` lists them, or a .toml file with skip and widths.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write, a new one.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a MatFormer slice as a checkpoint of its own, with true FFN widths, as transformers loads it."""
    named = find_slice(name)
    whole = open_checkpoint(read_source(source, revision=revision, show_progress=not quiet))
    made = take_slice(whole, named.of(whole.config), pad=False)
    for notice in made.notices:
        print_note("note", notice, quiet=quiet)
    with progress_bar(quiet=quiet) as progress:
        written = write_slice(made, output, progress=progress)
    sizes = {path: path.stat().st_size for path in written}
    if json:
        files = [{"path": str(path), "bytes": n_bytes} for path, n_bytes in sizes.items()]
        result = {"schema": SCHEMA, "source": made.origin, "output": str(output), "notices": list(made.notices)}
        print_json({**result, "files": files})
        return
    say(str(output))
    say(f"  {human_bytes(sum(sizes.values()))} in {len(sizes)} files, {made.config.num_hidden_layers} layers")
