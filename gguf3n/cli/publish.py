"""`gguf3n publish`: from a checkpoint to a repository of GGUF files."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gguf3n.cli import options
from gguf3n.cli.console import columns, human_bytes, print_json, print_note
from gguf3n.cli.paint import filled, paint, say
from gguf3n.cli.progress import progress_bar
from gguf3n.conversion import read_source
from gguf3n.errors import FindingsError, UsageError
from gguf3n.formats.whole_file import make_directory, write_whole
from gguf3n.gemma3n.source import Source
from gguf3n.publishing.hf_jobs import plan_hub_jobs, submit
from gguf3n.publishing.jobs import Jobs, plan_dict, read_jobs, run_here, steps_of
from gguf3n.publishing.jobs import as_dict as jobs_dict
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
JOBS_SCHEMA = "gguf3n.jobs/1"
HF_JOBS_SCHEMA = "gguf3n.hf-jobs/1"
JOBS_PLAN_SCHEMA = "gguf3n.jobs-plan/1"
HERE = "here"
HF_JOBS = "hf-jobs"
EXECUTORS = (HERE, "dask", "dask:ADDRESS", HF_JOBS)
PLAN_SCHEMA = "gguf3n.publish-plan/1"


def publish(
    source: Annotated[
        str, typer.Argument(help="A checkpoint directory, a Hub id, a GGUF file; or jobs.toml, with many models.")
    ],
    repo: Annotated[str | None, typer.Argument(help="The repository to publish to: ORG/NAME. Not with jobs.")] = None,
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
    executor: Annotated[
        str, typer.Option(metavar="EXECUTOR", help="Of jobs: here, dask[:ADDRESS] or hf-jobs.", show_default="here")
    ] = HERE,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Of --executor dask without an address.", show_default="one a processor"),
    ] = None,
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
    if repo is None or executor != HERE or workers is not None:
        _refuse_with_jobs(
            source,
            repo,
            {
                "--quant": quant,
                "--mmproj": mmproj,
                "--no-vision": no_vision,
                "--no-audio": no_audio,
                "--imatrix": imatrix,
                "--validate": validate,
                "--source-revision": source_revision,
                "--private": private,
                "--create-pr": create_pr,
                "--revision": revision,
                "--despite-findings": despite_findings,
                "--force": force,
            },
        )
        jobs = read_jobs(source, local=local is not None, threads=threads, command=["gguf3n", *sys.argv[1:]])
        if local is not None or output is not None:
            jobs = replace(jobs, directory=(local or output or jobs.directory).absolute())
        _run_jobs(jobs, executor, workers, dry_run=dry_run, as_json=json, quiet=quiet)
        return
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


def _refuse_with_jobs(source: str, repo: str | None, given: Mapping[str, object]) -> None:
    """Raises: UsageError for what a file of jobs says itself, and for executors without one."""
    if repo is not None or not source.lower().endswith(".toml"):
        raise UsageError(
            f"{source}: no repository to publish to" if repo is None else "--executor and --workers are for jobs",
            expected="gguf3n publish SRC ORG/NAME, or gguf3n publish JOBS.toml",
        )
    for option, value in given.items():
        if value:
            raise UsageError(f"{option} with a file of jobs", fix=f"write it in {source}, for each model")


def _run_jobs(jobs: Jobs, executor: str, workers: int | None, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Carry out jobs, or show their steps. Raises: UsageError; the error of a step."""
    name, _, address = executor.partition(":")
    if name not in EXECUTORS or (address and name != "dask"):
        raise UsageError(f"--executor {executor}: no such executor", expected=" or ".join(EXECUTORS), found=executor)
    if workers is not None and (name != "dask" or address):
        raise UsageError("--workers is for --executor dask without an address", fix="leave it out")
    if name == HF_JOBS:
        _run_on_the_hub(jobs, dry_run=dry_run, as_json=as_json)
        return
    if dry_run:
        steps = steps_of(jobs, spread=name != HERE)
        if as_json:
            print_json({"schema": JOBS_PLAN_SCHEMA, **plan_dict(jobs, spread=name != HERE)})
        else:
            rows = [("step", "after"), *((step.id, ", ".join(step.needs)) for step in steps)]
            for line in columns(rows, "<<"):
                say(line)
        return

    def told(step: str) -> None:
        print_note("note", step, quiet=quiet)

    if name == HERE:
        done = run_here(jobs, told)
    else:
        from gguf3n.publishing.dask_executor import run_on_dask

        done = run_on_dask(jobs, address or None, workers=workers, told=told)
    found = jobs_dict(jobs, done)
    if as_json:
        print_json({"schema": JOBS_SCHEMA, **found})
    else:
        for publication in found["publications"]:
            state = "done" if publication["ok"] else f"stopped: {publication['stopped'][0]}"
            say(*filled(f"{publication['repo']}: {len(publication['files'])} files, {state}", 0))
    if not found["ok"]:
        raise typer.Exit(FindingsError.exit_code)


def _run_on_the_hub(jobs: Jobs, *, dry_run: bool, as_json: bool) -> None:
    """Show what each job will take, write its script, start it. Raises: UsageError, HubError."""
    if not jobs.upload:
        raise UsageError("--local with --executor hf-jobs, whose disks are lost", fix="leave one of them out")
    planned = plan_hub_jobs(jobs)
    if not as_json:
        rows = [("repository", "download", "upload", "hours", "dollars")]
        for job in planned:
            sizes = (human_bytes(job.download_bytes), human_bytes(job.upload_bytes))
            rows.append((job.repo, *sizes, f"{job.seconds / 3600:.2f}", f"{job.dollars:.4f}"))
        for line in columns(rows, "<>>>>"):
            say(line)
        say(*filled("estimates, by the quantizers' measured rates and an assumed network of 50 MB/s", 0))
    scripts: list[str] = []
    addresses: list[str] = []
    if not dry_run:
        make_directory(jobs.directory)
        for job in planned:
            path = jobs.directory / f"{job.repo.replace('/', '-')}.job.sh"
            write_whole(path, job.script, force=True)
            scripts.append(str(path))
        addresses = submit(planned)
    if as_json:
        found = [job.as_dict() for job in planned]
        print_json({"schema": HF_JOBS_SCHEMA, "jobs": found, "scripts": scripts, "addresses": addresses})
        return
    for script, address in zip(scripts, addresses, strict=True):
        say(f"{script}: {address}")


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
