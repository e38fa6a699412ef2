"""Runs jobs on the Hub's own machines: a script and an estimate for each model, then they are submitted.

A machine's disk is lost at the end, so each model is one job, which makes, validates and uploads its files by
`gguf3n publish`; where it is cut off, the next one makes them again, and sends only what the Hub does not have.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import gguf3n
from gguf3n.conversion import read_source
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.hub import is_repo_id
from gguf3n.formats.hub_jobs import submit_job
from gguf3n.formats.rows import Stored
from gguf3n.gemma3n.source import Source
from gguf3n.planning import Plan
from gguf3n.publishing.jobs import Jobs, ModelJob
from gguf3n.publishing.publish import RESERVE_BYTES, parse_publication, plan_publication

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm-slim"
FLAVOR = "cpu-basic"
CORES = 2
DISK_BYTES = 50 * 10**9
DOLLARS_AN_HOUR = 0.01
"""Of a cpu-basic machine: two cores, 16 GB, 50 GB of disk. Source: the Hub's list of hardware, 2026."""

SLOW = 4
"""# Why: those cores are shared and without AVX-512; a quarter of the rates below is taken."""
MILLIONS_A_SECOND: Mapping[QType, float] = {
    QType.F32: 3022, QType.F16: 4458, QType.BF16: 4152, QType.Q4_0: 353, QType.Q4_1: 100, QType.Q5_0: 350,
    QType.Q5_1: 97, QType.Q8_0: 1014, QType.Q2_K: 86, QType.Q3_K: 310, QType.Q4_K: 99, QType.Q5_K: 96,
    QType.Q6_K: 349, QType.IQ4_NL: 235, QType.IQ4_XS: 227, QType.IQ3_S: 24, QType.IQ3_XXS: 14, QType.IQ2_XXS: 37,
    QType.IQ2_XS: 32, QType.IQ2_S: 40, QType.IQ1_S: 95, QType.IQ1_M: 86, QType.TQ1_0: 1506, QType.TQ2_0: 1743,
}  # fmt: skip
"""# measured: weights one core quantizes, with importances where the type has them, by scripts/bench_quants.py on
2026-11-21 (docs/speed.md)."""
NETWORK_BYTES_A_SECOND = 50e6
"""An assumption, not measured: of the download and of the upload."""
TIMEOUT_FACTOR, MIN_TIMEOUT = 3, 1800


@dataclass(frozen=True)
class HubJob:
    """A model's job. Units: seconds, bytes, dollars; all of them estimates."""

    repo: str
    source: str
    script: str
    download_bytes: int
    upload_bytes: int
    seconds: int
    dollars: float
    timeout_seconds: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan_hub_jobs(jobs: Jobs) -> list[HubJob]:
    """A job for each model; headers are fetched, no weights.

    Raises: UsageError for a model that such a machine can't get at or hold; as `plan_publication`.
    """
    return [_plan(jobs, model) for model in jobs.models]


def _plan(jobs: Jobs, model: ModelJob) -> HubJob:
    for what, given in (("importance", model.importance), ("imatrix", model.imatrix)):
        if given is not None:
            raise UsageError(
                f"{model.repo}: {what} with --executor hf-jobs", fix="its files are not there: measure first"
            )
    if not is_repo_id(model.source):
        raise UsageError(
            f"{model.repo}: a source that is not on the Hub", expected="ORG/NAME", found=model.source, fix="upload it"
        )
    if own := [quant for quant in (*model.quants, *model.mmproj) if os.path.exists(quant)]:
        raise UsageError(f"{model.repo}: a recipe file, which is not there", expected="names", found=own[0])
    options = parse_publication(
        model.repo, model.quants, mmproj=model.mmproj, vision=model.vision, audio=model.audio, validate=None
    )
    source = read_source(model.source, revision=model.source_revision, weights=False)
    plans = list(plan_publication(source, options).values())
    download, upload = _source_bytes(source), sum(plan.total_bytes for plan in plans)
    largest = max(plan.total_bytes for plan in plans)
    if download + largest + RESERVE_BYTES > DISK_BYTES:
        raise UsageError(
            f"{model.repo}: too large for {FLAVOR}", expected=f"{DISK_BYTES:,} bytes", found=f"{download + largest:,}"
        )
    seconds = seconds_of(download + upload, map(_weights, plans))
    return HubJob(
        model.repo,
        model.source,
        _script(model),
        download,
        upload,
        seconds,
        dollars_of(seconds),
        max(TIMEOUT_FACTOR * seconds, MIN_TIMEOUT),
    )


def _source_bytes(source: Source) -> int:
    stored = {rows for tensor in source.tensors.values() for rows in tensor.rows if isinstance(rows, Stored)}
    return sum(rows.stored_bytes for rows in stored)


def _weights(plan: Plan) -> Mapping[QType, int]:
    weights: Counter[QType] = Counter()
    for tensor in plan.tensors:
        weights[tensor.slot.qtype] += tensor.source.n_weights
    return weights


def seconds_of(network_bytes: int, files: Iterable[Mapping[QType, int]]) -> int:
    """What such a machine takes for what goes over the network, and to quantize files of so many weights of a type."""
    quantizing = sum(n / (MILLIONS_A_SECOND[qtype] * 1e6) for weights in files for qtype, n in weights.items())
    return round(network_bytes / NETWORK_BYTES_A_SECOND + SLOW * quantizing / CORES)


def dollars_of(seconds: int) -> float:
    """What such a machine costs."""
    return round(seconds / 3600 * DOLLARS_AN_HOUR, 4)


def _script(model: ModelJob) -> str:
    flags = {
        "--private": model.private,
        "--create-pr": model.create_pr,
        "--despite-findings": model.despite_findings,
        "--no-vision": bool(model.mmproj) and not model.vision,
        "--no-audio": bool(model.mmproj) and not model.audio,
    }
    values = (
        ("--source-revision", model.source_revision), ("--validate", model.validate), ("--revision", model.revision),
    )  # fmt: skip
    words: list[str] = [model.source, model.repo, "-q", ",".join(model.quants)]
    words += [word for quant in model.mmproj for word in ("--mmproj", quant)]
    words += [word for option, value in values if value is not None for word in (option, value)]
    words += [option for option, given in flags.items() if given]
    extra = "[validate]" if model.validate is not None else ""
    command = ["uv", "run", "--no-project", "--with", f"gguf3n{extra}=={gguf3n.__version__}", "--", "gguf3n", "publish"]
    return f"#!/bin/sh\nset -eu\n{shlex.join([*command, *words])}\n"


def submit(planned: Sequence[HubJob]) -> list[str]:
    """Start all of them; gives their addresses. Raises: HubError."""
    return [
        submit_job(
            job.repo.partition("/")[0],
            IMAGE,
            ["/bin/sh", "-c", job.script],
            flavor=FLAVOR,
            timeout_seconds=job.timeout_seconds,
        )[1]
        for job in planned
    ]
