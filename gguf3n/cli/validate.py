"""`gguf3n validate`: is a GGUF file what its source says it should be."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import print_json, print_note, steps_bar
from gguf3n.cli.paint import filled, paint
from gguf3n.engines.activations import read_texts
from gguf3n.errors import FindingsError, UsageError
from gguf3n.formats.imatrix import ImportanceMatrix
from gguf3n.gemma3n.model import Model
from gguf3n.validation.logits import N_CTX, N_TOKENS, LogitsResult
from gguf3n.validation.report import check_report, write_report
from gguf3n.validation.result import Stage, StageResult, Verdict
from gguf3n.validation.structure import StructureResult
from gguf3n.validation.tensors import TensorError, TensorsResult
from gguf3n.validation.tokens import TokensResult
from gguf3n.validation.validate import Validation, check_file, read_reference
from gguf3n.validation.validate import validate as run_validation

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
    text: Annotated[Path | None, typer.Option(help="A text for the logits.", show_default="a built-in one")] = None,
    tokens: Annotated[int, typer.Option(min=4, help="How many of its tokens; half of them are scored.")] = N_TOKENS,
    ctx: Annotated[int, typer.Option(min=4, help="Tokens read at a time.")] = N_CTX,
    server: Annotated[
        str | None, typer.Option(help="Address of a llama-server that has loaded FILE, to ask it for the logits.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for the reference model.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, likewise.")] = "float32",
    save_reference: Annotated[
        Path | None, typer.Option(help="Keep the reference's log-probabilities; a name in .kld for llama-perplexity.")
    ] = None,
    use_reference: Annotated[
        Path | None, typer.Option(help="Such a file: the reference model is not run again.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="The importance matrix FILE was quantized with: its tensors are judged sharper.")
    ] = None,
    report: options.Report = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail for warnings too.")] = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Prove a GGUF file against its source, tensor by tensor, token by token. Exit code 12 if it fails."""
    wanted = parse_stages(stages)
    if text is not None and use_reference is not None:
        raise UsageError("--text with --use-reference, which brings its own text", fix="leave one of them out")
    for option, value, stage in (
        ("--text", text, Stage.LOGITS),
        ("--server", server, Stage.LOGITS),
        ("--save-reference", save_reference, Stage.LOGITS),
        ("--use-reference", use_reference, Stage.LOGITS),
        ("--imatrix", imatrix, Stage.TENSORS),
    ):
        if value is not None and stage not in wanted:
            raise UsageError(f"{option} without the stage {stage.value}", fix=f"add {stage.value} to --stages")
    if report is not None:
        check_report(report, force=force)
    check_file(file)
    sample = None if text is None else read_texts([text])
    source = read_reference(reference, revision=revision, show_progress=not quiet)
    for notice in source.notices:
        print_note("note", notice, quiet=quiet)
    with steps_bar(quiet=quiet) as show:
        validation = run_validation(
            file,
            source,
            stages=wanted,
            text=sample,
            n_tokens=tokens,
            n_ctx=ctx,
            server=server,
            device=device,
            dtype=dtype,
            save_reference=save_reference,
            use_reference=use_reference,
            imatrix=imatrix,
            threads=threads,
            force=force,
            progress=by_stage(show),
            notice=lambda text: print_note("note", text, quiet=quiet),
        )
    if report is not None:
        write_report(validation, report, force=force)
    if json:
        print_json(validation_json(validation))
    else:
        print_validation(validation)
    if validation.verdict is Verdict.FAIL or (strict and validation.verdict is Verdict.WARN):
        raise typer.Exit(FindingsError.exit_code)


def parse_stages(stages: str | None) -> tuple[Stage, ...]:
    """The stages of a list such as "tensors,logits". Raises: UsageError."""
    if stages is None:
        return tuple(Stage)
    names = [name.strip() for name in stages.split(",")]
    known = {stage.value: stage for stage in Stage}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"no stage {unknown[0]!r}", expected=", ".join(known), found=stages)
    return tuple(stage for stage in Stage if stage.value in names)


def by_stage(show: Callable[[str, int, int], None] | None) -> Callable[[Stage, int, int], None] | None:
    """Shows the progress of a stage under its name."""
    if show is None:
        return None
    return lambda stage, done, total: show(stage.value, done, total)


def print_validation(validation: Validation) -> None:
    """A line or two for each stage, what is wrong, the verdict."""
    print(paint(str(validation.path), "bold"))
    print(filled(f"against {validation.reference}"))
    for stage, result in validation.stages.items():
        label = paint(f"{result.verdict.value:<4}", STYLES[result.verdict])
        said = _said(result)
        print(f"  {label}  {stage.value:<9}  {said[0]}")
        for line in said[1:]:
            print(f"{'':19}{line}")
        for problem in result.problems[:SHOWN]:
            print(filled(f"{problem.verdict.value}: {problem.where}: {problem.what}", 8))
        if len(result.problems) > SHOWN:
            print(filled(f"and {len(result.problems) - SHOWN} more", 8))
        notes = result.notes if isinstance(result, TensorsResult) else ()
        for note in notes[:SHOWN]:
            print(filled(f"note: {note}", 8))
    print(paint(f"verdict: {validation.verdict.value}", STYLES[validation.verdict]))


def _said(result: StageResult) -> list[str]:
    """What a stage measured, in lines that fit beside its name."""
    match result:
        case StructureResult():
            return [f"{result.lint.n_checks} checks; keys and vocabulary against the source's"]
        case TensorsResult():
            lines = [f"{len(result.errors):,} tensors, {result.n_identical:,} with our quantizers' bytes (sampled)"]
            if result.errors:
                worst = result.errors[0]
                low, high = worst.expected
                lines.append(f"worst: {worst.name}, {worst.qtype.name}:")
                lines.append(f"relative error {worst.rms_error:.3g}, expected {low:.3g} to {high:.3g}")
            return lines
        case TokensResult():
            return [f"{result.n_texts} texts, {result.n_tokens:,} tokens"]
        case LogitsResult():
            found = result.divergence
            return [
                f"mean KL {found.mean:.3g} nats, at most {result.limits.good:.3g} for {result.base_qtype.name}",
                f"median {found.median:.3g}, 95th {found.p95:.3g}, 99th {found.p99:.3g}, max {found.maximum:.3g}",
                f"top-1 {found.top1_agreement:.1%}, top-5 {found.top5_agreement:.1%}",
                f"perplexity {found.candidate_perplexity:.4g}, reference {found.reference_perplexity:.4g}",
                f"{found.n_positions:,} positions, tokens {result.n_chunks} x {result.n_ctx}",
            ]
        case _:
            return ["could not be run"]


def validate_written(
    paths: Sequence[Path],
    source: Model,
    stages: Collection[Stage],
    *,
    imatrix: ImportanceMatrix | None,
    threads: int | None,
    quiet: bool,
) -> list[Validation]:
    """Validate files of one source; the reference model is run once for all."""
    if not stages:
        return []
    validations: list[Validation] = []
    with tempfile.TemporaryDirectory(prefix="gguf3n-") as folder:
        kept = Path(folder, "reference.safetensors") if len(paths) > 1 and Stage.LOGITS in stages else None
        for path in paths:
            is_there = kept is not None and kept.exists()
            with steps_bar(quiet=quiet) as show:
                validation = run_validation(
                    path,
                    source,
                    stages=stages,
                    threads=threads,
                    save_reference=None if is_there else kept,
                    use_reference=kept if is_there else None,
                    imatrix=imatrix,
                    progress=by_stage(show),
                    notice=lambda text: print_note("note", text, quiet=quiet),
                )
            validations.append(validation)
    return validations


def validation_json(validation: Validation) -> dict[str, Any]:
    """Everything that was found."""
    stages = {stage.value: _stage_json(result) for stage, result in validation.stages.items()}
    return {
        "schema": SCHEMA,
        "path": str(validation.path),
        "reference": validation.reference,
        "verdict": validation.verdict.value,
        "stages": stages,
    }


def _stage_json(result: StageResult) -> dict[str, Any]:
    problems = [{**asdict(problem), "verdict": problem.verdict.value} for problem in result.problems]
    stage: dict[str, Any] = {
        "verdict": result.verdict.value,
        "seconds": round(result.seconds, 3),
        "problems": problems,
    }
    match result:
        case StructureResult():
            stage["findings"] = [finding.as_dict() for finding in result.lint.findings]
        case TensorsResult():
            stage |= {"weighted": result.weighted, "n_identical": result.n_identical, "notes": list(result.notes)}
            stage["tensors"] = [_tensor_json(error) for error in result.errors]
        case TokensResult():
            stage |= {"n_texts": result.n_texts, "n_tokens": result.n_tokens}
        case LogitsResult():
            stage |= {
                "divergence": asdict(result.divergence),
                "limits": asdict(result.limits),
                "base_qtype": result.base_qtype.name,
                "engine": result.engine,
                "reference": result.reference,
                "n_ctx": result.n_ctx,
                "n_chunks": result.n_chunks,
                "n_vocab": result.n_vocab,
            }
    return stage


def _tensor_json(error: TensorError) -> dict[str, Any]:
    return {**asdict(error), "qtype": error.qtype.name, "shape": list(error.shape), "expected": list(error.expected)}
