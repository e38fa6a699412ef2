"""From a checkpoint to a repository of GGUF files in one call, which can be interrupted anywhere and run again.

    plan        every file: types, size, name; what was done before, and in which batches the rest fits the disk
    convert     a batch at a time, from one read of the source each
    lint        what llama.cpp, Ollama or LM Studio will not like of a file, its data included
    validate    the stages that are chosen
    describe    the card and what stands beside it; SHA256SUMS
    upload      what the Hub does not have already; then each hash again, by the Hub's own metadata

A step's key is a hash of what goes into it, so no step is done twice for the same (see ledger.py). A file that has its
name is complete. Where the disk does not hold all files, those of a batch are removed here, and only here, when the Hub
has been seen to have them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gguf3n.conversion import Conversion, ConversionOptions, parse_options, plan_files, read_source
from gguf3n.errors import OutputError, UsageError
from gguf3n.formats.hub import file_hash
from gguf3n.formats.hub_upload import LocalCopy, Repository, check_repo_id
from gguf3n.formats.imatrix import as_imatrix
from gguf3n.formats.whole_file import check_not_input, check_output, make_directory, move, write_whole
from gguf3n.gemma3n.source import Source
from gguf3n.inspection.lint import Severity, lint
from gguf3n.pipeline import run
from gguf3n.planning import Plan
from gguf3n.progress import OnProgress
from gguf3n.publishing import ledger as ledgers
from gguf3n.publishing.card import FileFacts, make_card, read_facts
from gguf3n.publishing.checks import CARD, NOTICE_FILE, lint_repository
from gguf3n.publishing.checksums import SUMS, directory_sums, format_sums
from gguf3n.publishing.ledger import Ledger
from gguf3n.publishing.manifest import (
    SourceRecord,
    hash_imatrix,
    hash_of,
    make_manifest,
    manifest_path,
    record_recipe,
    record_source,
    versions,
    write_manifest,
)
from gguf3n.publishing.measured import measured_in
from gguf3n.recipes import For, Recipe
from gguf3n.validation.options import ValidationOptions, parse_validation
from gguf3n.validation.result import Verdict
from gguf3n.validation.stages import STAGES, check_extra
from gguf3n.validation.validate import run_all

RESERVE_BYTES = 256 << 20
"""Of the disk that is left free: for manifests, the card, and what else a system needs."""
TITLE = "GGUF files by gguf3n"
"""Of a pull request, by which a later run finds it."""

MAX_MESSAGE = 200
"""Characters of a commit's message."""

Watch = Callable[[], AbstractContextManager[OnProgress | None]]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class PublishOptions:
    """What is wanted of a publication, checked before a source is fetched or read; see `parse_publication`."""

    repo_id: str
    conversion: ConversionOptions
    directory: Path
    validation: ValidationOptions | None = None
    upload: bool = True
    private: bool | None = None
    create_pr: bool = False
    revision: str | None = None
    despite_findings: bool = False
    command: tuple[str, ...] = ()
    imatrix_sha256: str | None = None

    @property
    def where(self) -> str:
        """The repository and its revision, as a ledger names them."""
        return f"{self.repo_id}@{self.revision or 'main'}"


@dataclass(frozen=True)
class WantedFile:
    """A file of a publication: its plan, its name, and the key of all that goes into it."""

    name: str
    plan: Plan
    key: str


@dataclass(frozen=True)
class PublishedFile:
    """A file that is made. `state`: what was done for it: "made", "kept" from a run before, or "on the Hub" already.

    `validation` is what `gguf3n.validate/1` says, `findings` what lint says of it.
    """

    name: str
    quant: str
    n_bytes: int
    sha256: str
    state: str
    findings: tuple[str, ...] = ()
    validation: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "quant": self.quant,
            "bytes": self.n_bytes,
            "sha256": self.sha256,
            "state": self.state,
            "findings": list(self.findings),
            "validation": self.validation,
        }


@dataclass(frozen=True)
class Publication:
    """What was published. `stopped`: why nothing was uploaded, where lint or validation says so; `sent`: what was."""

    source: str
    repo_id: str
    revision: str | None
    directory: Path
    files: tuple[PublishedFile, ...]
    beside: tuple[str, ...]
    sent: tuple[str, ...]
    stopped: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.stopped

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "source": self.source,
            "repo": self.repo_id,
            "revision": self.revision,
            "directory": str(self.directory),
            "ok": self.ok,
            "files": [file.as_dict() for file in self.files],
            "beside": list(self.beside),
            "sent": list(self.sent),
            "stopped": list(self.stopped),
        }


def parse_publication(
    repo_id: str,
    quants: str | Recipe | Sequence[str | Recipe],
    *,
    mmproj: str | Recipe | Sequence[str | Recipe] = (),
    vision: bool = True,
    audio: bool = True,
    imatrix: str | Path | None = None,
    validate: str | None = None,
    directory: str | Path | None = None,
    local: bool = False,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    despite_findings: bool = False,
    threads: int | None = None,
    force: bool = False,
    command: Sequence[str] = (),
    bare_imatrix: bool = False,
    needs_text: bool = True,
) -> PublishOptions:
    """The options of a command line or a call as one checked value.

    Args:
        repo_id: the repository, as in "me/gemma-3n-E2B-it-GGUF"; the card names it, uploaded or not.
        quants, mmproj, vision, audio, imatrix, threads: as for `parse_options`.
        validate: stages, separated by commas, or "all"; nothing is validated by default.
        directory: where files are made; by default one of the repository's name here.
        local: make everything, upload nothing.
        private: of a repository that is made.
        create_pr: upload to a pull request.
        revision: a branch of the repository, which is made where it is not there.
        despite_findings: upload files although lint has errors for them.
        force: replace files in the directory that no publication has made.
        command: as it was typed, for the manifests.
        bare_imatrix: name the importance matrix in the files without its directories.
        needs_text: refuse to publish without a file of the text model.

    Raises: UsageError, HubError for the repository's name; as `parse_options`.
    """
    check_repo_id(repo_id)
    for option, value in (("--private", private), ("--create-pr", create_pr), ("--revision", revision)):
        if local and value:
            raise UsageError(f"{option} with --local, which uploads nothing", fix="leave one of them out")
    if create_pr and revision is not None:
        raise UsageError(
            "--create-pr with --revision", fix="leave one of them out; a pull request that is there is taken up again"
        )
    if needs_text and not quants:
        raise UsageError(
            "no quantization named", expected="one or more of the text model, such as Q4_K_M", fix="add --quant NAME"
        )
    matrix = as_imatrix(imatrix)
    imatrix_sha256 = None if matrix is None else hash_imatrix(matrix)
    if matrix is not None and bare_imatrix:
        matrix = replace(matrix, path=Path(matrix.path.name))
    conversion = parse_options(
        quants, mmproj=mmproj, vision=vision, audio=audio, imatrix=matrix, threads=threads, force=force
    )
    chosen = None
    if validate is not None:
        chosen = parse_validation(None if validate == "all" else validate, imatrix=matrix, threads=threads)
    return PublishOptions(
        repo_id,
        conversion,
        Path(repo_id.partition("/")[2]) if directory is None else Path(directory),
        chosen,
        upload=not local,
        private=private,
        create_pr=create_pr,
        revision=revision,
        despite_findings=despite_findings,
        command=tuple(command),
        imatrix_sha256=imatrix_sha256,
    )


def publish(
    source: str | Path | Source,
    repo_id: str,
    quants: str | Recipe | Sequence[str | Recipe],
    *,
    source_revision: str | None = None,
    watch: Watch = nullcontext,
    notice: Notice = lambda text: None,
    show_progress: bool = False,
    **options: Any,
) -> Publication:
    """Make GGUF files, their manifests, card and checksums, and upload them.

    Args:
        source: as for `read_source`, or what it returned.
        source_revision: branch, tag or commit of a source on the Hub.
        watch: opens what shows the progress of a step.
        notice: called with a line that a user should know.
        repo_id, quants, options: as for `parse_publication`.

    Raises: UsageError, SourceError or a class below it, HubError, GGUFError, QuantizationError, OutputError,
        Interrupted. What is done stays, and the same call goes on with it.
    """
    chosen = parse_publication(repo_id, quants, **options)
    if not isinstance(source, Source):
        source = read_source(source, revision=source_revision, show_progress=show_progress)
    return run_publication(source, chosen, watch=watch, notice=notice, show_progress=show_progress)


def plan_publication(source: Source, options: PublishOptions) -> dict[str, Plan]:
    """Every file by its name, in the order in which they are made; nothing is written.

    Raises: as `plan_files`; UsageError for a file that is wanted twice, or packages that a stage needs.
    """
    if options.validation is not None:
        check_extra(source, options.validation, options.validation.stages)
    plans = plan_files(source, options.conversion)
    names = [plan.file_name for plan in plans]
    if len(set(names)) < len(names):
        raise UsageError("the same quantization twice", found=", ".join(names), fix="name each once")
    return dict(zip(names, plans, strict=True))


def _key(name: str, plan: Plan, chosen: PublishOptions, source: SourceRecord) -> str:
    options = chosen.conversion
    matrix = options.imatrix if plan.recipe.part is For.TEXT else None
    return hash_of(
        {
            "name": name,
            "source": source.sha256,
            "recipe": record_recipe(plan.recipe).sha256,
            "importance": None if matrix is None else [str(matrix.path), chosen.imatrix_sha256],
            "encoders": [options.vision, options.audio, options.force_types],
            "versions": dict(versions()),
        }
    )


def batches(sizes: Mapping[str, int], free_bytes: int) -> list[list[str]]:
    """Files that the disk holds together, in as few reads of the source as their order allows. Units: bytes.

    Raises: OutputError for a file that it does not hold alone.
    """
    found: list[list[str]] = []
    left = 0
    for name, n_bytes in sizes.items():
        if n_bytes > free_bytes:
            raise OutputError(
                f"{name}: not enough space on the disk",
                expected=f"{n_bytes + RESERVE_BYTES:,} bytes",
                found=f"{free_bytes + RESERVE_BYTES:,} bytes free",
                fix="free some space or choose another place",
            )
        if not found or n_bytes > left:
            found.append([])
            left = free_bytes
        found[-1].append(name)
        left -= n_bytes
    return found


def free_bytes(directory: Path) -> int:
    """What a batch may take of the disk."""
    return max(shutil.disk_usage(directory).free - RESERVE_BYTES, 0)


def run_publication(
    source: Source,
    options: PublishOptions,
    *,
    watch: Watch = nullcontext,
    notice: Notice = lambda text: None,
    show_progress: bool = False,
) -> Publication:
    """The same with parsed options and a source that is open; arguments and errors as for `publish`."""
    with _opened(source, options, watch, notice) as (work, wanted):
        hub = None
        if options.upload:
            hub = Repository(options.repo_id, revision=options.revision, show_progress=show_progress, notice=notice)
            work.prepare(hub)
        return work.run(wanted, hub)


def make_files(
    source: Source, options: PublishOptions, *, watch: Watch = nullcontext, notice: Notice = lambda text: None
) -> None:
    """Make, lint and validate the files alone; a publication adopts them. Errors as for `publish`."""
    with _opened(source, options, watch, notice) as (work, wanted):
        work.make(wanted)


def adopt(source: Source, options: PublishOptions, directories: Sequence[Path]) -> None:
    """Move files that `make_files` has made elsewhere on the disk to their place. Errors as for `publish`."""
    with _opened(source, options, nullcontext, lambda text: None) as (work, wanted):
        for directory in directories:
            with ledgers.opened(directory) as other:
                work.adopt(wanted, other)


@contextmanager
def _opened(
    source: Source, options: PublishOptions, watch: Watch, notice: Notice
) -> Iterator[tuple[_Publication, list[WantedFile]]]:
    """A publication and its files, its directory locked. Raises: as `publish`."""
    plans = plan_publication(source, options)
    for text in dict.fromkeys(text for plan in plans.values() for text in plan.notices):
        notice(text)
    recorded = record_source(source)
    wanted = [WantedFile(name, plan, _key(name, plan, options, recorded)) for name, plan in plans.items()]
    make_directory(options.directory)
    with ledgers.opened(options.directory) as ledger:
        work = _Publication(source, recorded, options, ledger, watch, notice)
        work.check_names(wanted)
        yield work, wanted


class _Publication:
    """One run: what every step of it needs."""

    def __init__(
        self,
        source: Source,
        recorded: SourceRecord,
        options: PublishOptions,
        ledger: Ledger,
        watch: Watch,
        notice: Notice,
    ) -> None:
        self.source, self.recorded, self.options, self.ledger = source, recorded, options, ledger
        self.directory = options.directory
        self.watch, self.notice = watch, notice
        self.where = options.where
        self.sent: list[str] = []
        self.states: dict[str, str] = {}

    def check_names(self, wanted: Sequence[WantedFile]) -> None:
        """Refuse to replace what is not ours, before any work. Raises: OutputError."""
        for file in wanted:
            path = self.directory / file.name
            check_not_input(path, *self.options.conversion.inputs, *self.source.files)
            force = self.options.conversion.force or self.ledger.is_ours(file.name)
            if not force and file.name in self.ledger.files:
                raise OutputError(
                    f"{path} was changed since it was made",
                    expected=f"SHA-256 {self.ledger.files[file.name]['sha256']}",
                    fix="move it away, or add --force to make it again",
                )
            check_output(path, force=force)
            known = file.name in self.ledger.pending or file.name in self.ledger.files
            check_output(manifest_path(path), force=force and (known or self.options.conversion.force))

    def prepare(self, hub: Repository) -> None:
        """Make the repository, so that a token that may not write is told before hours of work. Raises: HubError."""
        hub.create(private=self.options.private)
        if self.options.create_pr:
            known = self.ledger.pulls.get(self.options.repo_id)
            hub.revision = known or hub.open_pull_request(TITLE, "Made by `gguf3n publish`.")
            self.ledger.pulls[self.options.repo_id] = hub.revision
            self.ledger.save()
            self.where = f"{self.options.repo_id}@{hub.revision}"

    def run(self, wanted: Sequence[WantedFile], hub: Repository | None) -> Publication:
        """All steps of all files, a batch at a time."""
        there = set() if hub is None else self._on_the_hub(wanted, hub)
        missing = [file for file in wanted if file.name not in there and not self._is_made(file)]
        for file in wanted:
            if file not in missing:
                self.states[file.name] = "on the Hub" if file.name in there else "kept"
        sizes = {file.name: file.plan.total_bytes for file in missing}
        groups = [
            [file for file in missing if file.name in names] for names in batches(sizes, free_bytes(self.directory))
        ]
        if len(groups) > 1 and hub is None:
            raise OutputError(
                f"{self.directory}: not enough space on the disk for all files",
                expected=f"{sum(sizes.values()) + RESERVE_BYTES:,} bytes",
                found=f"{free_bytes(self.directory) + RESERVE_BYTES:,} bytes free",
                fix="choose another place; or upload, which needs room for the largest only",
            )
        stopped: list[str] = []
        done: list[WantedFile] = [file for file in wanted if file not in missing]
        for group in groups or [[]]:
            self._convert(group)
            some = [*done, *group]
            done = []
            stopped += self._judge([file for file in some if self.ledger.is_intact(file.name)])
            if hub is not None and not stopped:
                self._upload(hub, self._copies(some))
                if len(groups) > 1 and group is not groups[-1]:
                    self._remove(group)
        beside = self._describe(wanted, hub)
        stopped += self._lint_repository()
        if hub is not None and not stopped:
            self._upload(hub, [self._copy(name) for name in beside])
        return Publication(
            self.source.origin,
            self.options.repo_id,
            None if hub is None else hub.revision,
            self.directory,
            tuple(self._published(file) for file in wanted),
            tuple(beside),
            tuple(self.sent),
            tuple(stopped),
        )

    def make(self, wanted: Sequence[WantedFile]) -> None:
        """The files alone, and what lint and validation say of them."""
        missing = [file for file in wanted if not self._is_made(file)]
        for names in batches({file.name: file.plan.total_bytes for file in missing}, free_bytes(self.directory)):
            self._convert([file for file in missing if file.name in names])
        list(self._judge(wanted))

    def adopt(self, wanted: Sequence[WantedFile], other: Ledger) -> None:
        """Take over files from another directory, with what is known of them."""
        for file in wanted:
            entry = other.files.get(file.name)
            if entry is None or entry["key"] != file.key or not other.is_intact(file.name) or self._is_made(file):
                continue
            self.ledger.begin({file.name: file.key})
            manifest = manifest_path(other.directory / file.name)
            move(manifest, self.directory / manifest.name)
            move(other.directory / file.name, self.directory / file.name)
            self.ledger.validations[file.name] = other.validations.get(file.name, {})
            self.ledger.finish(file.name, file.key, entry["bytes"], entry["sha256"])

    def _on_the_hub(self, wanted: Sequence[WantedFile], hub: Repository) -> set[str]:
        """Files that an earlier run has sent and removed here, and that are still there as they were sent."""
        known = [
            file.name
            for file in wanted
            if not (self.directory / file.name).exists()
            and self.ledger.has_sent(self.where, file.name)
            and self.ledger.files[file.name]["key"] == file.key
        ]
        return {name for name, copy in hub.files(known).items() if copy.hash == self.ledger.files[name]["sha256"]}

    def _is_made(self, file: WantedFile) -> bool:
        entry = self.ledger.files.get(file.name)
        has_manifest = manifest_path(self.directory / file.name).is_file()
        return entry is not None and entry["key"] == file.key and has_manifest and self.ledger.is_intact(file.name)

    def _convert(self, group: Sequence[WantedFile]) -> None:
        """Make the files of a batch from one read, with their manifests."""
        complete = [file for file in group if self._has_its_name(file)]
        left = [file for file in group if file not in complete]
        self.ledger.begin({file.name: file.key for file in left})
        started = time.monotonic()
        if left:
            with self.watch() as progress:
                run(
                    [(file.plan, self.directory / file.name) for file in left],
                    threads=self.options.conversion.threads,
                    force=True,
                    progress=progress,
                )
        seconds = time.monotonic() - started
        for file in group:
            path = self.directory / file.name
            conversion = Conversion(path, file.plan, seconds)
            manifest = make_manifest(
                conversion,
                self.options.conversion,
                self.recorded,
                self.options.command,
                imatrix_sha256=self.options.imatrix_sha256,
            )
            write_manifest(manifest, manifest_path(path), force=True)
            self.ledger.finish(file.name, file.key, manifest.n_bytes, manifest.sha256)
            self.states[file.name] = "made"

    def _has_its_name(self, file: WantedFile) -> bool:
        """Whether a run that was killed had completed the file, and not yet noted it."""
        path = self.directory / file.name
        if self.ledger.pending.get(file.name) != file.key or not path.is_file():
            return False
        header = file.plan.layout.header
        with open(path, "rb") as found:
            return path.stat().st_size == file.plan.total_bytes and found.read(len(header)) == header

    def _judge(self, files: Sequence[WantedFile]) -> Iterator[str]:
        """Lint and validate; yields why something should not be published."""
        for file in files:
            findings = self._findings(file)
            if findings and not self.options.despite_findings:
                yield f"{file.name}: lint: {findings[0]}" + (f", and {len(findings) - 1} more" * (len(findings) > 1))
        yield from self._validate(files)

    def _findings(self, file: WantedFile) -> list[str]:
        """Lint's errors. Why not its warnings: those of the plan were told."""
        key = hash_of(["lint", self.ledger.files[file.name]["sha256"]])
        noted = self.ledger.validations.setdefault(file.name, {})
        if noted.get("lint") != key:
            with self.watch() as progress:
                report = lint(self.directory / file.name, with_data=True, progress=progress)
            errors = [finding.notice for finding in report.findings if finding.check.severity is Severity.ERROR]
            noted |= {"lint": key, "findings": errors}
            self.ledger.save()
        return [str(text) for text in noted["findings"]]

    def _validate(self, files: Sequence[WantedFile]) -> Iterator[str]:
        wanted = self.options.validation
        if wanted is None:
            return
        keys = {
            file.name: hash_of([[stage.value for stage in wanted.stages], self.ledger.files[file.name]["sha256"]])
            for file in files
        }
        todo = [
            file
            for file in files
            if self.ledger.validations[file.name].get("key") != keys[file.name]
            and any(file.plan.part.kind in row.kinds and row.stage in wanted.stages for row in STAGES)
        ]
        found = run_all(
            [(self.directory / file.name, file.plan.part) for file in todo],
            wanted,
            watch=self.watch,
            notice=self.notice,
        )
        for file, validation in zip(todo, found, strict=True):
            result = {**validation.as_dict(), "path": file.name}
            self.ledger.validations[file.name] |= {"key": keys[file.name], "result": result}
            self.ledger.save()
        for file in files:
            seen = self.ledger.validations[file.name].get("result")
            if seen is not None and seen["verdict"] == Verdict.FAIL.value:
                failed = [name for name, stage in seen["stages"].items() if stage["verdict"] == Verdict.FAIL.value]
                yield f"{file.name}: validation fails: {', '.join(failed)}"

    def _describe(self, wanted: Sequence[WantedFile], hub: Repository | None) -> list[str]:
        """The card, the Notice and the checksums, of these and other files in the directory; their names."""
        if hub is not None and not (self.directory / CARD).exists() and hub.files([CARD]):
            write_whole(self.directory / CARD, hub.fetch(CARD), force=False)  # what people wrote in it stays
        entries = {file.name: self.ledger.files[file.name] for file in wanted}
        away = {name: entry for name, entry in entries.items() if not (self.directory / name).exists()}
        sums = directory_sums(self.directory, []) | {name: entry["sha256"] for name, entry in entries.items()}
        write_whole(self.directory / SUMS, format_sums(sums), force=True)
        results = {name: self.ledger.validations.get(name, {}).get("result") for name in entries}
        card = make_card(
            self.directory,
            repo=self.options.repo_id,
            base_model=self.recorded.repo,
            measured={name: measured_in(result, name) for name, result in results.items() if result is not None},
            elsewhere={name: (FileFacts(**entry["facts"]), entry["sha256"]) for name, entry in away.items()},
        )
        for notice in card.notices:
            self.notice(notice)
        card.write()
        matrix = self.options.conversion.imatrix
        own = [] if matrix is None or matrix.path.parent != Path() else [matrix.path.name]
        return list(dict.fromkeys((*card.texts, NOTICE_FILE, *(own if self._is_here(own) else ()))))

    def _is_here(self, names: Sequence[str]) -> bool:
        return all((self.directory / name).is_file() for name in names)

    def _lint_repository(self) -> list[str]:
        """Why the directory as a whole should not be published."""
        if self.options.despite_findings:
            return []
        findings = lint_repository(self.directory).findings
        return [f"lint: {finding.notice}" for finding in findings if finding.check.severity is Severity.ERROR]

    def _copies(self, files: Sequence[WantedFile]) -> list[LocalCopy]:
        """Files and manifests that are on the disk, to be sent."""
        here = [file.name for file in files if self.ledger.is_intact(file.name)]
        return [self._copy(each) for name in here for each in (name, manifest_path(Path(name)).name)]

    def _copy(self, name: str) -> LocalCopy:
        path = self.directory / name
        entry = self.ledger.files.get(name)
        sha256 = file_hash(path, is_sha256=True) if entry is None else str(entry["sha256"])
        return LocalCopy(name, path, path.stat().st_size, sha256)

    def _upload(self, hub: Repository, copies: Sequence[LocalCopy]) -> None:
        if not copies:
            return
        names = ", ".join(copy.name for copy in copies if copy.name.endswith(".gguf")) or "card and checksums"
        self.sent += hub.upload(copies, f"gguf3n: {names}"[:MAX_MESSAGE])
        self.ledger.sent.setdefault(self.where, {}).update({copy.name: copy.sha256 for copy in copies})
        self.ledger.save()

    def _remove(self, group: Sequence[WantedFile]) -> None:
        """Make room for the next batch: of files that the Hub has been seen to have."""
        for file in group:
            path = self.directory / file.name
            self.ledger.files[file.name]["facts"] = asdict(read_facts(path))
            self.ledger.save()
            path.unlink()
            self.notice(f"{file.name} is on the Hub, and was removed here to make room")

    def _published(self, file: WantedFile) -> PublishedFile:
        entry = self.ledger.files[file.name]
        noted = self.ledger.validations.get(file.name, {})
        return PublishedFile(
            file.name,
            file.plan.recipe.name,
            int(entry["bytes"]),
            str(entry["sha256"]),
            self.states[file.name],
            tuple(noted.get("findings", ())),
            noted.get("result"),
        )
