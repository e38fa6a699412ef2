"""`gguf3n publish`: from a checkpoint to a repository of GGUF files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, human_bytes, print_json, print_note
from gguf3n.cli.paint import filled, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.conversion import read_source
from gguf3n.errors import FindingsError, UsageError
from gguf3n.gemma3n.source import Source
from gguf3n.publishing.publish import (
    Publication,
    PublishOptions,
    batches,
    free_bytes,
    parse_publication,
    plan_publication,
    run_publication,
)
from gguf3n.validation.result import Stage

SCHEMA = "gguf3n.publish/1"
PLAN_SCHEMA = "gguf3n.publish-plan/1"


def publish(
    source: Annotated[str, typer.Argument(help="A checkpoint directory, a Hub id, or a GGUF file.")],
    repo: Annotated[str, typer.Argument(help="The repository to publish to: ORG/NAME.")],
    quant: Annotated[
        list[str],
        typer.Option("--quant", "-q", help="Quantizations, separated by commas: names or recipe files. Repeatable."),
    ] = [],  # noqa: B006 (typer copies it)
    mmproj: options.Mmproj = None,
    no_vision: options.NoVision = False,
    no_audio: options.NoAudio = False,
    imatrix: options.Imatrix = None,
    validate: Annotated[
        str | None,
        typer.Option(
            metavar="STAGES",
            help=f"Validate first: all, or some of {', '.join(stage.value for stage in Stage)}, separated by commas.",
        ),
    ] = None,
    source_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a SOURCE on the Hub.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The directory to make files in.", show_default="NAME of the repository"),
    ] = None,
    local: Annotated[Path | None, typer.Option(help="Make everything in this directory, and upload nothing.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Of a repository that is made: private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Upload to a pull request.")] = False,
    revision: Annotated[str | None, typer.Option(help="Upload to this branch; it is made if need be.")] = None,
    despite_findings: Annotated[
        bool, typer.Option("--despite-findings", help="Upload files although lint has errors for them.")
    ] = False,
    dry_run: options.DryRun = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files in the directory that no publication has made.")
    ] = False,
) -> None:
    """Make GGUF files with card, checksums and manifests, and upload them; run again, it goes on. Exit code 12 where
    lint or validation keeps it from uploading."""
    if local is not None and output is not None:
        raise UsageError("--local with --output", fix="leave --output out: --local names the directory")
    wanted = parse_publication(
        repo,
        split(quant),
        mmproj=mmproj or (),
        vision=not no_vision,
        audio=not no_audio,
        imatrix=imatrix,
        validate=validate,
        directory=local or output,
        local=local is not None,
        private=private or None,
        create_pr=create_pr,
        revision=revision,
        despite_findings=despite_findings,
        threads=threads,
        force=force,
        command=["gguf3n", *sys.argv[1:]],
    )
    opened = read_source(source, revision=source_revision, weights=not dry_run, show_progress=not quiet)
    if dry_run:
        _show(opened, wanted, as_json=json)
        return
    found = run_publication(
        opened,
        wanted,
        watch=lambda: progress_bar(quiet=quiet),
        notice=lambda text: print_note("note", text, quiet=quiet),
        show_progress=not quiet,
    )
    if json:
        print_json({"schema": SCHEMA, **found.as_dict()})
    else:
        print_publication(found, uploaded=wanted.upload)
    if not found.ok:
        raise typer.Exit(FindingsError.exit_code)


def split(names: list[str]) -> list[str]:
    """Names that are separated by commas, but for files that have one in theirs."""
    return [
        name.strip() for each in names for name in ([each] if os.path.exists(each) else each.split(",")) if name.strip()
    ]


def _show(source: Source, wanted: PublishOptions, *, as_json: bool) -> None:
    """What would be made, and in how many reads."""
    plans = plan_publication(source, wanted)
    sizes = {name: plan.total_bytes for name, plan in plans.items()}
    place = next(path for path in (wanted.directory.absolute(), *wanted.directory.absolute().parents) if path.is_dir())
    groups = batches(sizes, free_bytes(place))
    files: list[dict[str, Any]] = [
        {
            "name": name,
            "quant": plan.recipe.name,
            "bytes": plan.total_bytes,
            "batch": next(number for number, names in enumerate(groups, 1) if name in names),
            "findings": [finding.as_dict() for finding in plan.findings],
        }
        for name, plan in plans.items()
    ]
    stages = [] if wanted.validation is None else [stage.value for stage in wanted.validation.stages]
    result: dict[str, Any] = {
        "schema": PLAN_SCHEMA,
        "source": source.origin,
        "repo": wanted.repo_id if wanted.upload else None,
        "directory": str(wanted.directory),
        "files": files,
        "batches": len(groups),
        "validate": stages,
        "notices": list(dict.fromkeys(notice for plan in plans.values() for notice in plan.notices)),
    }
    if as_json:
        print_json(result)
        return
    rows = [("file", "quantization", "size", "batch")]
    rows += [(each["name"], each["quant"], human_bytes(each["bytes"]), str(each["batch"])) for each in files]
    for line in columns(rows, "<<>>"):
        say(line)
    reads = "one read" if len(groups) == 1 else f"{len(groups)} reads"
    say(f"{len(files)} files, {human_bytes(sum(sizes.values()))}, from {reads} of {source.origin}")
    if stages:
        say(f"validate: {', '.join(stages)}")
    say(f"upload to {wanted.where}" if wanted.upload else f"in {wanted.directory}; nothing is uploaded")


def print_publication(found: Publication, *, uploaded: bool) -> None:
    """A line a file, and where they are."""
    rows = [("file", "size", "state", "verdict")]
    for file in found.files:
        verdict = "" if file.validation is None else str(file.validation["verdict"])
        rows.append((file.name, human_bytes(file.n_bytes), file.state, verdict))
    for line in columns(rows, "<><<"):
        say(line)
    for reason in found.stopped:
        say(*filled(paint(reason, "red"), 0))
    if not uploaded:
        say(f"in {found.directory}")
    elif found.stopped:
        say("not uploaded; see --despite-findings for what lint says")
    else:
        n = len(found.sent)
        say(f"{found.repo_id}@{found.revision}: {n} files sent, and all are there with their checksums")
