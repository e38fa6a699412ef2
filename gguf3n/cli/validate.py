"""`gguf3n validate`: is a GGUF file what its source says it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import print_json, print_note
from gguf3n.cli.paint import filled, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.engines.activations import read_texts
from gguf3n.errors import FindingsError, UsageError
from gguf3n.formats.whole_file import check_not_input
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.options import MIN_TOKENS, N_CTX, N_TOKENS, parse_stages, parse_validation
from gguf3n.validation.report import check_report, write_report
from gguf3n.validation.result import Verdict
from gguf3n.validation.stages import STAGES
from gguf3n.validation.validate import Validation, check_file, part_for, read_reference, run_stages

SCHEMA = "gguf3n.validate/1"
SHOWN = 5
"""Problems of one stage, and worst tensors, that are printed; the JSON and the report have more."""
STYLES = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}


def validate(
    file: Annotated[Path, typer.Argument(help="A GGUF file of Gemma 3n.")],
    reference: Annotated[
        str, typer.Option("--reference", help="Its source: a checkpoint, a Hub id, or an unquantized GGUF file.")
    ],
    stages: options.Stages = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    adapter: options.Adapters = None,
    adapter_scale: options.AdapterScale = 1.0,
    text: Annotated[Path | None, typer.Option(help="A text for the logits.", show_default="a built-in one")] = None,
    tokens: Annotated[
        int, typer.Option(min=MIN_TOKENS, help="How many of its tokens; half of them are scored.")
    ] = N_TOKENS,
    ctx: Annotated[int, typer.Option(min=MIN_TOKENS, help="Tokens read at a time.")] = N_CTX,
    server: Annotated[
        str | None, typer.Option(help="Address of a llama-server that has loaded FILE, to ask it for the logits.")
    ] = None,
    text_model: Annotated[
        Path | None, typer.Option(help="The text model's file, to show pictures to an mmproj FILE through it.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for the reference model.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for the reference model.")] = "float32",
    save_reference: Annotated[
        Path | None, typer.Option(help="Save the reference's log-probabilities; ending in .kld for llama-perplexity.")
    ] = None,
    use_reference: Annotated[
        Path | None, typer.Option(help="Use such a file; the reference model is not run again.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="The importance matrix that FILE was made with: it is judged more strictly.")
    ] = None,
    refine: Annotated[
        Path | None, typer.Option(help="The correlations that FILE's codes were refined with, to do it again.")
    ] = None,
    report: options.Report = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail for warnings too.")] = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Compare a GGUF file with its source, tensor by tensor, token by token. Exit code 12 if it fails."""
    chosen = parse_stages(stages)
    given = {"text": text, "server": server, "save_reference": save_reference, "use_reference": use_reference}
    given |= {"imatrix": imatrix, "refine": refine, "text_model": text_model}
    for name, value in given.items():
        users = [row.stage for row in STAGES if name in row.options]
        if value is not None and not set(users) & set(chosen):
            option, names = f"--{name.replace('_', '-')}", " or ".join(stage.value for stage in users)
            raise UsageError(f"{option} without the stage {names}", fix=f"add {names} to --stages")
    for written in filter(None, (report, save_reference)):
        check_not_input(written, file, text)
    if report is not None:
        check_report(report, force=force)
    check_file(file)
    wanted = parse_validation(
        chosen,
        text=None if text is None else read_texts([text]),
        n_tokens=tokens,
        n_ctx=ctx,
        server=server,
        text_model=text_model,
        device=device,
        dtype=dtype,
        save_reference=save_reference,
        use_reference=use_reference,
        imatrix=imatrix,
        refine=refine,
        threads=threads,
        force=force,
    )
    source = read_reference(
        reference, revision=revision, adapters=adapter or (), adapter_scale=adapter_scale, show_progress=not quiet
    )
    candidate = Candidate(file)
    part = part_for(candidate, source)
    for notice in part.notices:
        print_note("note", notice, quiet=quiet)
    with progress_bar(quiet=quiet) as progress:
        validation = run_stages(
            candidate, part, wanted, progress=progress, notice=lambda text: print_note("note", text, quiet=quiet)
        )
    if report is not None:
        write_report(validation, report, force=force)
    if json:
        print_json(validation_json(validation))
    else:
        print_validation(validation)
    if validation.verdict is Verdict.FAIL or (strict and validation.verdict is Verdict.WARN):
        raise typer.Exit(FindingsError.exit_code)


def print_validation(validation: Validation) -> None:
    """A line or two for each stage, what is wrong, the verdict."""
    say(paint(str(validation.path), "bold"))
    say(*filled(f"against {validation.reference}"))
    for stage, result in validation.stages.items():
        label = paint(f"{result.verdict.value:<4}", STYLES[result.verdict])
        said = result.lines()
        say(f"  {label}  {stage.value:<9}  {said[0]}")
        for line in said[1:]:
            say(f"{'':19}{line}")
        for problem in result.problems[:SHOWN]:
            say(*filled(f"{problem.verdict.value}: {problem.where}: {problem.what}", 8))
        if len(result.problems) > SHOWN:
            say(*filled(f"and {len(result.problems) - SHOWN} more", 8))
        for remark in result.remarks[:SHOWN]:
            say(*filled(f"note: {remark}", 8))
    say(paint(f"verdict: {validation.verdict.value}", STYLES[validation.verdict]))


def validation_json(validation: Validation) -> dict[str, Any]:
    """Everything that was found."""
    return {"schema": SCHEMA, **validation.as_dict()}
