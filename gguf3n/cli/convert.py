"""`gguf3n convert`: a checkpoint to GGUF files."""

from __future__ import annotations

from typing import Annotated

import typer

from gguf3n.cli import options
from gguf3n.cli.writing import wanted_recipes, wanted_stages, write_or_show
from gguf3n.conversion import read_source


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, or a Hub id like google/gemma-3n-E4B-it.")],
    quant: options.Quants = None,
    output: options.Output = None,
    like: options.Like = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    imatrix: options.Imatrix = None,
    ple: options.Ple = None,
    token_embd: options.TokenEmbd = None,
    tensor_types: options.TensorTypes = None,
    keep: options.Keep = None,
    against: options.Against = None,
    threads: options.Threads = None,
    dry_run: options.DryRun = False,
    validate: options.Validate = False,
    stages: options.Stages = None,
    report: options.Report = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Convert a Gemma 3n checkpoint to one GGUF file, or to several from one read."""
    wanted = wanted_stages(validate, stages, report, dry_run=dry_run)
    recipes = wanted_recipes(quant, like, output, ple=ple, token_embd=token_embd, tensor_types=tensor_types, keep=keep)
    write_or_show(
        read_source(source, revision=revision, weights=not dry_run, show_progress=not quiet),
        recipes,
        output,
        imatrix=imatrix,
        against=against,
        threads=threads,
        dry_run=dry_run,
        stages=wanted,
        report=report,
        json=json,
        quiet=quiet,
        force=force,
    )
