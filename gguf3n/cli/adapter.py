"""`gguf3n adapter`: a PEFT adapter to the GGUF LoRA that llama.cpp loads beside the model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gguf3n.adapter_file import TYPES, plan_adapter
from gguf3n.cli import options
from gguf3n.cli.console import print_json, print_note
from gguf3n.cli.progress import progress_bar
from gguf3n.cli.writing import SCHEMA, plan_json, print_plan, print_written, tell_findings
from gguf3n.conversion import output_paths, write


def adapter(
    source: Annotated[str, typer.Argument(help="A directory with a PEFT adapter, or a Hub id.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="A .gguf file or a directory.", show_default="./NAME-TYPE-LoRA.gguf"),
    ] = None,
    type_: Annotated[str, typer.Option("--type", metavar="TYPE", help=f"{', '.join(TYPES)}.")] = "F32",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model that it is for, to see that it fits: a checkpoint, a Hub id or a GGUF file.",
        ),
    ] = None,
    scale: Annotated[float, typer.Option(metavar="X", help="How much of what it adds is added.")] = 1.0,
    drop_unsupported: Annotated[
        bool, typer.Option("--drop-unsupported", help="Leave out what llama.cpp does not apply, instead of refusing.")
    ] = False,
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Write a PEFT adapter as a GGUF LoRA, which llama.cpp loads beside the model."""
    plan = plan_adapter(
        source, type_, base=base, scale=scale, drop_unsupported=drop_unsupported, show_progress=not quiet
    )
    for notice in plan.notices:
        print_note("note", notice, quiet=quiet)
    tell_findings(plan.findings, quiet=quiet)
    result: dict[str, Any] = {"schema": SCHEMA, "source": plan.part.source.origin, "notices": list(plan.notices)}
    if dry_run:
        (path,) = output_paths([plan.part.file_name(plan.recipe.name)], output)
        if json:
            print_json(result | {"outputs": [plan_json(plan, path)]})
        else:
            print_plan(plan, path, None)
        return
    with progress_bar(quiet=quiet) as progress:
        written = write([plan], output, threads=threads, force=force, progress=progress)
    if json:
        outputs = [plan_json(each.plan, each.path, with_tensors=False) for each in written]
        print_json(result | {"seconds": round(written[0].seconds, 3), "outputs": outputs})
    else:
        print_written(written)
