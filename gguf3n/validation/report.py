"""A validation as one page that a publisher can link: HTML with the plot inside, or Markdown for a model card.

The page is made once as a document of sections, tables and texts (see document.py), then written in either form.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shlex
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from gguf.constants import Keys

from gguf3n.dates import source_date
from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.hub import is_repo_id
from gguf3n.formats.whole_file import check_output, write_whole
from gguf3n.inspection.summary import file_type_name
from gguf3n.plots import check_matplotlib
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.document import (
    Block,
    Command,
    Document,
    Problems,
    Section,
    Table,
    Text,
    as_html,
    as_markdown,
)
from gguf3n.validation.result import Stage, StageResult, Verdict
from gguf3n.validation.stages import STAGES
from gguf3n.validation.validate import Validation

SUFFIXES = (".html", ".md")
HASH_BYTES = 1 << 22

PACKAGES: tuple[tuple[str, str], ...] = (
    ("gguf3n", "gguf3n"),
    ("xllamacpp", "llama.cpp (xllamacpp)"),
    ("transformers", "transformers"),
    ("torch", "torch"),
)
"""Distribution, what it is called on the page; those that are not installed are left out."""


def check_report(path: Path, *, force: bool) -> None:
    """Refuse a report that can't be written, before any work is done.

    Raises: UsageError for another suffix, or for a page with a picture and no matplotlib; OutputError for a path that
        can't be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: no such kind of report", expected=f"a name ending in {' or '.join(SUFFIXES)}")
    if path.suffix.lower() == ".html":
        check_matplotlib()
    check_output(path, force=force)


def write_report(
    validation: Validation,
    path: str | Path,
    *,
    force: bool = False,
    command: str | None = None,
    now: datetime | None = None,
) -> None:
    """Write the page.

    Args:
        path: ends in .html or .md.
        command: what was typed; by default the shortest command that runs the same stages.
        now: the date on the page; by default that of SOURCE_DATE_EPOCH, or the present one.

    Raises: as `check_report`.
    """
    path = Path(path)
    check_report(path, force=force)
    is_html = path.suffix.lower() == ".html"
    page = document(validation, command=command, now=now, with_pictures=is_html)
    write_whole(path, as_html(page) if is_html else as_markdown(page), force=force)


def document(
    validation: Validation, *, command: str | None = None, now: datetime | None = None, with_pictures: bool = True
) -> Document:
    """Everything that stands on the page."""
    date = (now or source_date() or datetime.now(timezone.utc)).astimezone(timezone.utc)
    reference = _public_name(validation.reference)
    facts = [
        *_file_facts(validation.candidate),
        ("reference", reference),
        ("validated", f"{date:%Y-%m-%d %H:%M} UTC"),
        ("versions", ", ".join(_versions())),
    ]
    stages = validation.stages.items()
    compares = {row.stage: f"{row.compares} with {row.against}" for row in STAGES}
    rows = tuple(
        (stage.value, compares[stage], result.verdict.value, str(len(result.problems)), f"{result.seconds:.1f} s")
        for stage, result in stages
    )
    overview = Table(("stage", "compares", "verdict", "problems", "took"), "<<<>>", rows)
    left_out = _left_out(validation)
    blocks: tuple[Block, ...] = (overview,)
    if left_out:
        blocks = (overview, Text(f"Not run: {', '.join(left_out)}."))
    return Document(
        validation.path.name,
        validation.verdict,
        tuple(facts),
        (
            Section("Stages", None, blocks),
            *(_section(stage, result, with_pictures) for stage, result in stages),
            Section("To reproduce", None, (Command(command or _command(validation, reference)),)),
        ),
    )


def _public_name(reference: str) -> str:
    """Of a local path its last part. Why: where a publisher keeps files is nobody's business."""
    return reference if is_repo_id(reference) else os.path.basename(os.path.abspath(reference))


def _file_facts(candidate: Candidate) -> Iterator[tuple[str, str]]:
    """Name, size and hash of the file, or of each part of a split one, and its quantization."""
    files, quantization = [candidate.path], None
    try:
        gguf = candidate.gguf
        files = [Path(part.name) for part in gguf.parts]
        key = gguf.keys.get(Keys.General.FILE_TYPE)
        quantization = "not said" if key is None else file_type_name(key.value)
        quantization += f", {gguf.bits_per_weight:.2f} bits a weight"
    except GGUFError:
        pass  # what is wrong stands under its stage
    for file in files:
        try:
            yield "file", f"{file.name}, {file.stat().st_size:,} bytes"
            yield "SHA-256", _sha256(file)
        except OSError as error:
            raise GGUFError(f"{file}: cannot be read", found=error.strerror or str(error)) from error
    if quantization is not None:
        yield "quantization", quantization


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _versions() -> Iterator[str]:
    for package, name in PACKAGES:
        try:
            yield f"{name} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _command(validation: Validation, reference: str) -> str:
    words = ["gguf3n", "validate", validation.path.name, "--reference", reference]
    if _left_out(validation):
        words += ["--stages", ",".join(stage.value for stage in validation.stages)]
    return shlex.join(words)


def _left_out(validation: Validation) -> list[str]:
    """The stages for such a file that were not run."""
    known = [row.stage for row in STAGES if validation.kind in row.kinds]
    return [stage.value for stage in known if stage not in validation.stages]


def _section(stage: Stage, result: StageResult, with_pictures: bool) -> Section:
    ordered = sorted(result.problems, key=lambda problem: -list(Verdict).index(problem.verdict))
    problems: Block = Problems(tuple(ordered)) if ordered else Text("No problems.")
    blocks = (problems, *result.blocks(with_pictures=with_pictures))
    return Section(stage.value.capitalize(), result.verdict, blocks)
