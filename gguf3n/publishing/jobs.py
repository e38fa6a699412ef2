"""Many models at once: a file of jobs as steps that need one another, and what runs them.

    measure   a piece of a model's calibration chunks      by itself
    merge     the pieces, in their order                   all its measure steps
    convert   one file, or all of a model from one read    merge, where importances are measured
    publish   card, checksums, upload                      all converts of the repository

A step is data, and `do` carries out any of them in whatever process it is called: all that passes between steps is
files in the jobs' directory, which all workers share. Every step can be done again and does then what is left, so a
worker that is lost costs its step only. Pieces are what the file says, not what workers there are, and float32 sums are
added in the order of the pieces: the bytes are the same with one worker and with many.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gguf3n import errors
from gguf3n.conversion import read_source
from gguf3n.engines.activations import measure_importance
from gguf3n.errors import Gguf3nError, UsageError, shown
from gguf3n.formats.imatrix import merge_imatrices, read_imatrix, write_imatrix
from gguf3n.formats.small_file import MAX_RECIPE_BYTES, read_text
from gguf3n.formats.whole_file import make_directory
from gguf3n.gemma3n.source import Source
from gguf3n.publishing.ledger import FOLDER
from gguf3n.publishing.manifest import hash_file, hash_of, record_source
from gguf3n.publishing.publish import PublishOptions, adopt, make_files, parse_publication, run_publication

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

N_CTX = 512
PARTS = "parts"
"""Below a ledger's folder: what single steps have made, each with a ledger of its own."""


@dataclass(frozen=True)
class Importance:
    """What a model's importance matrix is measured on: `chunks` of `ctx` tokens each, in so many `pieces`."""

    texts: tuple[str, ...]
    chunks: int
    ctx: int = N_CTX
    pieces: int = 1

    def piece(self, number: int) -> tuple[int, int]:
        """First chunk and how many, of a piece counted from 0; the first pieces are the longer ones."""
        size, more = divmod(self.chunks, self.pieces)
        return number * size + min(number, more), size + (number < more)


@dataclass(frozen=True)
class ModelJob:
    """A model to publish; the names are those of `gguf3n publish`."""

    source: str
    repo: str
    quants: tuple[str, ...]
    mmproj: tuple[str, ...] = ()
    source_revision: str | None = None
    imatrix: str | None = None
    importance: Importance | None = None
    validate: str | None = None
    vision: bool = True
    audio: bool = True
    private: bool = False
    create_pr: bool = False
    revision: str | None = None
    despite_findings: bool = False


@dataclass(frozen=True)
class Jobs:
    """All models, and the directory that everything is made in; `upload`: whether anything is uploaded."""

    directory: Path
    models: tuple[ModelJob, ...]
    upload: bool = True
    threads: int | None = None
    command: tuple[str, ...] = ()

    def folder(self, model: ModelJob) -> Path:
        """Where a model's files are made."""
        return self.directory / model.repo.partition("/")[2]

    def imatrix(self, model: ModelJob) -> Path | None:
        """The importance matrix that is given or will have been measured."""
        if model.importance is None:
            return None if model.imatrix is None else Path(model.imatrix)
        return self.folder(model) / f"{model.repo.partition('/')[2].removesuffix('-GGUF')}-imatrix.gguf"


@dataclass(frozen=True)
class Step:
    """Something to do for a model, when what it needs is done. `quants` of a convert step; `number` of a piece."""

    id: str
    kind: str
    model: int
    needs: tuple[str, ...] = ()
    number: int = 0
    quants: tuple[str, ...] = ()
    mmproj: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """What came of a step: what `publish` says, or an error's parts."""

    step: str
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    def check(self) -> Done:
        """Raises: the error of the step, of its own class."""
        if self.error is None:
            return self
        kind = getattr(errors, str(self.error["error"]), Gguf3nError)
        parts = {name: self.error[name] for name in ("expected", "found", "fix")}
        raise kind(f"{self.step}: {self.error['what']}", **parts)


def read_jobs(
    path: str | Path, *, local: bool = False, threads: int | None = None, command: Sequence[str] = ()
) -> Jobs:
    """The jobs that a TOML file says; paths in it are seen from where it stands.

    Raises: UsageError that names the key.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(read_text(path, MAX_RECIPE_BYTES, UsageError))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML", found=str(error)) from error
    home = path.absolute().parent
    table = _Table(str(path), raw, {"directory": str, "model": list})
    models = tuple(_model(f"{path}: model {number}", each, home) for number, each in enumerate(raw.get("model", ()), 1))
    if not models:
        raise UsageError(f"{path}: no model", expected="[[model]] with source, repo and quants")
    repos = [model.repo.lower() for model in models]
    for repo in repos:
        if repos.count(repo) > 1:
            raise UsageError(f"{path}: two models for one repository", found=repo, fix="give each one of its own")
    directory = home / str(table.get("directory", "published"))
    return Jobs(directory, models, not local, threads, tuple(command))


class _Table:
    """A table of the file, every key of which is known and of its type. Raises: UsageError."""

    def __init__(self, place: str, raw: Any, kinds: Mapping[str, type]) -> None:
        if not isinstance(raw, dict):
            raise UsageError(f"{place}: not a table", found=shown(raw))
        self.place, self.raw = place, raw
        for key, value in raw.items():
            if key not in kinds:
                raise UsageError(f"{place}: unknown key {key!r}", expected=", ".join(kinds), found=key)
            if type(value) is not kinds[key]:
                raise UsageError(
                    f"{place}: impossible value of {key!r}", expected=kinds[key].__name__, found=shown(value)
                )

    def get(self, key: str, default: Any = None) -> Any:
        return self.raw.get(key, default)

    def needed(self, key: str) -> Any:
        if not self.raw.get(key):
            raise UsageError(f"{self.place}: no {key}", expected=f"{key} = …")
        return self.raw[key]

    def texts(self, key: str) -> tuple[str, ...]:
        values = self.get(key, [])
        if not all(isinstance(value, str) for value in values):
            raise UsageError(f"{self.place}: impossible value of {key!r}", expected="texts", found=shown(values))
        return tuple(values)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.needed(key) if default is None else self.get(key, default)
        if value < 1:
            raise UsageError(f"{self.place}: impossible value of {key!r}", expected="1 or more", found=shown(value))
        return int(value)


MODEL_KEYS: Mapping[str, type] = {
    "source": str, "source_revision": str, "repo": str, "quants": list, "mmproj": list, "imatrix": str,
    "importance": dict, "validate": str, "vision": bool, "audio": bool, "private": bool, "create_pr": bool,
    "revision": str, "despite_findings": bool,
}  # fmt: skip
IMPORTANCE_KEYS: Mapping[str, type] = {"texts": list, "chunks": int, "ctx": int, "pieces": int}


def _model(place: str, raw: Any, home: Path) -> ModelJob:
    table = _Table(place, raw, MODEL_KEYS)
    importance = None
    if "importance" in table.raw:
        own = _Table(f"{place}: importance", table.get("importance"), IMPORTANCE_KEYS)
        own.needed("texts")
        importance = Importance(
            tuple(str(home / text) for text in own.texts("texts")),
            own.count("chunks"),
            own.count("ctx", N_CTX),
            own.count("pieces", 1),
        )
        if importance.pieces > importance.chunks:
            raise UsageError(
                f"{own.place}: more pieces than chunks",
                expected=f"{importance.chunks} at most",
                found=str(importance.pieces),
            )
        if "imatrix" in table.raw:
            raise UsageError(f"{place}: imatrix and importance", fix="leave one of them out")
    table.needed("quants")
    source, imatrix = str(table.needed("source")), table.get("imatrix")
    table.needed("repo")
    given = {key: value for key, value in table.raw.items() if key not in ("quants", "mmproj", "importance")}
    given["source"] = str(home / source) if (home / source).exists() else source
    if imatrix is not None:
        given["imatrix"] = str(home / imatrix)
    model = ModelJob(
        **given,
        quants=tuple(_recipe(home, name) for name in table.texts("quants")),
        mmproj=tuple(_recipe(home, name) for name in table.texts("mmproj")),
        importance=importance,
    )
    try:
        _options(Jobs(home, (model,)), replace(model, imatrix=None, importance=None))
    except Gguf3nError as error:
        raise UsageError(f"{place}: {error.what}", expected=error.expected, found=error.found, fix=error.fix) from error
    return model


def _recipe(home: Path, name: str) -> str:
    """A quantization's name, or the path of its file."""
    return str(home / name) if name.lower().endswith(".toml") else name


def steps_of(jobs: Jobs, *, spread: bool) -> list[Step]:
    """Every step, after those that it needs.

    Args:
        spread: a convert step for each file, for many workers; else one for each model, which reads its source once.
    """
    return [step for number, model in enumerate(jobs.models) for step in _steps(number, model, spread=spread)]


def _steps(number: int, model: ModelJob, *, spread: bool) -> Iterator[Step]:
    ready: tuple[str, ...] = ()
    if model.importance is not None:
        pieces = [f"measure {model.repo} {piece + 1}" for piece in range(model.importance.pieces)]
        for piece, name in enumerate(pieces):
            yield Step(name, "measure", number, number=piece)
        ready = (f"merge {model.repo}",)
        yield Step(ready[0], "merge", number, tuple(pieces))
    made = []
    if spread:
        for quant in model.quants:
            made.append(Step(f"convert {model.repo} {quant}", "convert", number, ready, quants=(quant,)))
        for quant in model.mmproj:
            made.append(Step(f"convert {model.repo} mmproj {quant}", "convert", number, mmproj=(quant,)))
    yield from made
    yield Step(f"publish {model.repo}", "publish", number, (*ready, *(step.id for step in made)))


def do(jobs: Jobs, step: Step, *_: object) -> Done:
    """Carry out a step, whose needs are done, in any process; an error of ours is in what it gives.

    Args:
        _: what the steps before it gave, for an executor that waits for them so.
    """
    model = jobs.models[step.model]
    try:
        return Done(step.id, KINDS[step.kind](jobs, model, step))
    except Gguf3nError as error:
        return Done(step.id, error=error.as_dict())


def _measure(jobs: Jobs, model: ModelJob, step: Step) -> None:
    """A piece of the calibration chunks, to a file that is there when it is complete."""
    assert model.importance is not None
    source = read_source(model.source, revision=model.source_revision)
    path = _pieces(jobs, model, source)[step.number]
    if path.exists():
        return
    make_directory(path.parent)
    first, n_chunks = model.importance.piece(step.number)
    measured = measure_importance(
        source, model.importance.texts, n_ctx=model.importance.ctx, n_chunks=n_chunks, first_chunk=first
    )
    write_imatrix(measured, path)


def _pieces(jobs: Jobs, model: ModelJob, source: Source) -> list[Path]:
    """A file for each piece, in a folder of all that goes into them."""
    assert model.importance is not None
    texts = [hash_file(Path(text))[0] for text in model.importance.texts]
    key = hash_of([record_source(source).sha256, texts, {**asdict(model.importance), "texts": None}])
    folder = jobs.folder(model) / FOLDER / "importance" / key[:16]
    return [folder / f"{number:04d}.gguf" for number in range(model.importance.pieces)]


def _merge(jobs: Jobs, model: ModelJob, step: Step) -> None:
    """All pieces in their order. Exact: float32 additions, as llama-imatrix makes them."""
    assert model.importance is not None
    path = jobs.imatrix(model)
    assert path is not None
    source = read_source(model.source, revision=model.source_revision)
    merged = merge_imatrices(
        [read_imatrix(piece) for piece in _pieces(jobs, model, source)], chunk_size=model.importance.ctx
    )
    names = tuple(dict.fromkeys(Path(dataset).name for dataset in merged.datasets))
    write_imatrix(replace(merged, datasets=names), path, force=True)


def _convert(jobs: Jobs, model: ModelJob, step: Step) -> None:
    """One file, with a ledger of its own, to be adopted by the publication."""
    options = _options(jobs, model, step.quants, step.mmproj)
    folder = jobs.folder(model) / FOLDER / PARTS / hash_of(step.id)[:16]
    source = read_source(model.source, revision=model.source_revision)
    make_files(source, replace(options, directory=folder))


def _publish(jobs: Jobs, model: ModelJob, step: Step) -> Mapping[str, Any]:
    """What is left, from one read; the files of the single steps are moved to their place first."""
    options = _options(jobs, model, model.quants, model.mmproj)
    source = read_source(model.source, revision=model.source_revision)
    parts = jobs.folder(model) / FOLDER / PARTS
    if parts.is_dir():
        adopt(source, options, sorted(parts.iterdir()))
    found = run_publication(source, options)
    if parts.is_dir() and found.ok:
        shutil.rmtree(parts)
    return found.as_dict()


def _options(
    jobs: Jobs, model: ModelJob, quants: Sequence[str] | None = None, mmproj: Sequence[str] | None = None
) -> PublishOptions:
    return parse_publication(
        model.repo,
        model.quants if quants is None else quants,
        mmproj=model.mmproj if mmproj is None else mmproj,
        vision=model.vision,
        audio=model.audio,
        imatrix=jobs.imatrix(model) if quants is None or quants else None,
        validate=model.validate,
        directory=jobs.folder(model),
        local=not jobs.upload,
        private=(model.private or None) if jobs.upload else None,
        create_pr=model.create_pr and jobs.upload,
        revision=model.revision if jobs.upload else None,
        despite_findings=model.despite_findings,
        threads=jobs.threads,
        command=jobs.command,
        bare_imatrix=model.importance is not None,
        needs_text=quants is None or bool(quants),
    )


KINDS: Mapping[str, Callable[[Jobs, ModelJob, Step], Mapping[str, Any] | None]] = {
    "measure": _measure,
    "merge": _merge,
    "convert": _convert,
    "publish": _publish,
}
"""What is done for each kind of step."""


def run_here(jobs: Jobs, told: Callable[[str], None] = lambda text: None) -> list[Done]:
    """All steps in this process, one after another. Raises: the first step's error."""
    done = []
    for step in steps_of(jobs, spread=False):
        told(step.id)
        done.append(do(jobs, step).check())
    return done


def as_dict(jobs: Jobs, done: Sequence[Done]) -> dict[str, Any]:
    """What `gguf3n.jobs/1` says."""
    results = [each.result for each in done if each.result is not None]
    return {
        "directory": str(jobs.directory),
        "ok": all(result["ok"] for result in results),
        "steps": [each.step for each in done],
        "publications": results,
    }


def plan_dict(jobs: Jobs, *, spread: bool) -> dict[str, Any]:
    """What `gguf3n.jobs-plan/1` says."""
    steps = [
        {**asdict(step), "model": jobs.models[step.model].repo, "needs": list(step.needs)}
        for step in steps_of(jobs, spread=spread)
    ]
    return {"directory": str(jobs.directory), "steps": steps}
