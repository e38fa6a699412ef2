"""Is a GGUF file what its source says it should be: the stages in turn, a verdict for the whole.

validation = validate("model-Q4_K_M.gguf", "google/gemma-3n-E4B-it")
validation.verdict, validation.stages[Stage.LOGITS].divergence.mean
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gguf.constants import Keys

from gguf3n.conversion import read_gguf, read_source
from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.correlations import Correlations
from gguf3n.formats.gguf_layout import MAGIC
from gguf3n.formats.imatrix import ImportanceMatrix
from gguf3n.gemma3n import mmproj
from gguf3n.gemma3n.lora import check_no_adapter
from gguf3n.gemma3n.part import ENCODERS, Part, PartKind, mmproj_part, text_part
from gguf3n.gemma3n.slice_keys import as_in_file
from gguf3n.gemma3n.source import Checkpoint, Source
from gguf3n.progress import OnProgress
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.options import N_CTX, N_TOKENS, ValidationOptions, parse_validation
from gguf3n.validation.result import Problem, Stage, StageResult, Verdict, worst
from gguf3n.validation.stages import STAGES, Notice, check_extra

Result = TypeVar("Result")

SWAPPED = "name the file to check as FILE, and what it was made from with --reference"


@dataclass(frozen=True)
class Validation:
    """What was found of one file. `stages` are those that were run, in their order."""

    candidate: Candidate
    reference: str
    stages: Mapping[Stage, StageResult]
    kind: PartKind = PartKind.TEXT

    @property
    def path(self) -> Path:
        return self.candidate.path

    @property
    def verdict(self) -> Verdict:
        return worst(result.verdict for result in self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """Everything that was found."""
        return {
            "path": str(self.path),
            "reference": self.reference,
            "verdict": self.verdict.value,
            "stages": {stage.value: result.as_dict() for stage, result in self.stages.items()},
        }


def read_reference(
    reference: str | Path,
    *,
    revision: str | None = None,
    adapters: Sequence[str | Path] = (),
    adapter_scale: float = 1.0,
    show_progress: bool = False,
) -> Source:
    """What a file is held against: a checkpoint directory, a Hub id, or an unquantized GGUF file.

    Args:
        adapters, adapter_scale: merged into a checkpoint, as for `read_source`.

    Raises: SourceError or a class below it, HubError, GGUFError; UsageError for a quantized GGUF file.
    """
    if not os.path.isfile(reference) or revision is not None or adapters:
        return read_source(
            reference,
            revision=revision,
            adapters=adapters,
            adapter_scale=adapter_scale,
            show_progress=show_progress,
        )
    try:
        return read_gguf(reference)
    except UsageError as error:
        raise UsageError(
            error.what,
            expected="what FILE was made from: a checkpoint, a Hub id, or a file in F32, F16 or BF16",
            found=error.found,
            fix=SWAPPED,
        ) from error


def validate(
    path: str | Path,
    reference: str | Path | Source,
    *,
    stages: str | Collection[Stage | str] | None = None,
    text: str | None = None,
    n_tokens: int = N_TOKENS,
    n_ctx: int = N_CTX,
    server: str | None = None,
    text_model: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    save_reference: str | Path | None = None,
    use_reference: str | Path | None = None,
    imatrix: str | Path | ImportanceMatrix | None = None,
    refine: str | Path | Correlations | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: OnProgress | None = None,
    notice: Notice | None = None,
) -> Validation:
    """Hold a GGUF file against its source.

    Args:
        reference: a checkpoint directory, a Hub id, an unquantized GGUF file, or what `read_source` returned.
        progress: called about ten times a second, with the name of a stage.
        notice: called with a line on the memory that the logits take, before any stage starts.
        stages and the others: as for `parse_validation`.

    Raises: UsageError for options, packages or memory; GGUFError for a path that is not a file; the errors of
        `read_reference`. What is wrong with the file is in the result, never an error.
    """
    options = parse_validation(
        stages,
        text=text,
        n_tokens=n_tokens,
        n_ctx=n_ctx,
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
    check_file(Path(path))
    source = reference if isinstance(reference, Source) else read_reference(reference)
    candidate = Candidate(Path(path))
    return run_stages(candidate, part_for(candidate, source), options, progress=progress, notice=notice)


def part_for(candidate: Candidate, source: Source) -> Part:
    """What a file should be: its source's text model, the slice of it, or those encoders that the file says it has.

    Raises: SourceError or a class below it, also for an adapter; GGUFError for a source.
    """
    try:
        keys = candidate.gguf.keys
    except GGUFError:  # the stages say what is wrong with it
        return text_part(source, beside=ENCODERS)

    check_no_adapter(candidate.gguf)

    def says(name: str) -> bool:
        return name in keys and keys[name].value is True

    if Keys.General.ARCHITECTURE not in keys or keys[Keys.General.ARCHITECTURE].value != mmproj.ARCH:
        return text_part(as_in_file(source, keys) if isinstance(source, Checkpoint) else source, beside=ENCODERS)
    vision, audio = (says(f"clip.has_{what}_encoder") for what in ("vision", "audio"))
    neither = not vision and not audio  # a fault that the stages find
    return mmproj_part(source, vision=vision or neither, audio=audio or neither)


def run_stages(
    candidate: Candidate,
    part: Part,
    options: ValidationOptions,
    *,
    progress: OnProgress | None = None,
    notice: Notice | None = None,
) -> Validation:
    """The same with parsed options and a source that is open; arguments and errors as for `validate`."""
    path = candidate.path
    check_file(path)
    stages = stages_for(part, options.stages)
    if notice is not None and part.kind is PartKind.MMPROJ and Stage.VISION in set(options.stages).difference(stages):
        notice("vision is not compared: that takes a vision encoder, and a checkpoint as the reference")
    check_extra(part.source, options, stages)
    prepared = {
        row.stage: _attempt(path, lambda row=row: row.prepare(candidate, part, options, notice))  # type: ignore[misc]
        for row in STAGES
        if row.stage in stages
    }
    results = {
        stage: run if isinstance(run, StageResult) else _attempt(path, lambda run=run: run(progress))  # type: ignore[misc]
        for stage, run in prepared.items()
    }
    return Validation(candidate, part.source.origin, results, part.kind)


def run_all(
    files: Sequence[tuple[Path, Part]],
    options: ValidationOptions,
    *,
    watch: Callable[[], AbstractContextManager[OnProgress | None]] = nullcontext,
    notice: Notice | None = None,
) -> Iterator[Validation]:
    """Validate files of one source in turn; the reference model is run once for all.

    Args:
        watch: opens what shows the progress of one file.
        notice and the errors: as for `run_stages`.
    """
    with tempfile.TemporaryDirectory(prefix="gguf3n-") as folder:
        kept = Path(folder, "reference.safetensors") if len(files) > 1 and Stage.LOGITS in options.stages else None
        texts = [path for path, part in files if part.kind is PartKind.TEXT]
        for path, part in files:
            is_there = kept is not None and kept.exists()
            chosen = replace(
                options,
                save_reference=None if is_there else kept,
                use_reference=kept if is_there else None,
                text_model=texts[0] if texts else None,
            )
            with watch() as progress:
                validation = run_stages(Candidate(path), part, chosen, progress=progress, notice=notice)
            yield validation


def stages_for(part: Part, wanted: Collection[Stage]) -> tuple[Stage, ...]:
    """Of the stages that are wanted, those that are for such a file and reference. Raises: UsageError: none is."""
    kind = part.kind
    known = [row.stage for row in STAGES if kind in row.kinds and (row.stage is not Stage.VISION or _can_see(part))]
    if not (found := tuple(stage for stage in known if stage in wanted)):
        raise UsageError(
            f"no stage to run for {'a text model' if kind is PartKind.TEXT else 'an mmproj file'}",
            expected=", ".join(stage.value for stage in known),
            found=", ".join(stage.value for stage in wanted),
        )
    return found


def _can_see(part: Part) -> bool:
    return isinstance(part.source, Checkpoint) and any(key.name == mmproj.IMAGE_SIZE for key in part.keys)


def check_file(path: Path) -> None:
    """See that there is a GGUF file, before a reference is fetched. Raises: GGUFError."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read", found=error.strerror or str(error), fix=SWAPPED) from error
    if magic != MAGIC:
        raise GGUFError(f"{path}: not a GGUF file", expected=f"{MAGIC!r} at its start", found=repr(magic), fix=SWAPPED)


def _attempt(path: Path, step: Callable[[], Result]) -> Result | StageResult:
    """A file that cannot be read or loaded fails the stage; it is what validation is there to say."""
    try:
        return step()
    except GGUFError as error:
        return StageResult((Problem(Verdict.FAIL, path.name, error.one_line),), 0.0)
