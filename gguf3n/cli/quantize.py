"""`gguf3n quantize`: a GGUF file to others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gguf3n.cli import options
from gguf3n.cli.writing import wanted_recipes, wanted_stages, write_or_show
from gguf3n.conversion import read_gguf


def quantize(
    source: Annotated[Path, typer.Argument(help="A GGUF file in F32, F16 or BF16, or any part of a split one.")],
    quant: options.Quants = None,
    output: options.Output = None,
    like: options.Like = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take a source that is quantized already; quality is lost twice.")
    ] = False,
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
    """Quantize a GGUF file of Gemma 3n to one file, or to several from one read."""
    wanted = wanted_stages(validate, stages, report, dry_run=dry_run)
    recipes = wanted_recipes(quant, like, output, ple=ple, token_embd=token_embd, tensor_types=tensor_types, keep=keep)
    write_or_show(
        read_gguf(source, allow_requantize=allow_requantize),
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
