"""The stages of validation as a table: what each compares, what it needs, which options are its own, how it is run.

How a stage's result prints is its result's own affair (see `StageResult`). To add a stage is to add a member to Stage,
a row here, and a module with its check and its result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from gguf3n.errors import UsageError
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.source import Checkpoint, Source
from gguf3n.progress import OnProgress
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.logits import prepare_logits
from gguf3n.validation.options import ValidationOptions
from gguf3n.validation.result import Stage, StageResult
from gguf3n.validation.structure import check_structure
from gguf3n.validation.tensors import check_tensors
from gguf3n.validation.tokens import check_tokens

Run: TypeAlias = Callable[[OnProgress | None], StageResult]
"""A stage that is ready to be run."""
Notice: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class StageRow:
    """One row of the table.

    Args:
        compares, against: what with what, for a report.
        packages: what must be installed to run it.
        options: names of the ValidationOptions that only this stage uses.
        prepare: sees that it can be run, and says how; what keeps a stage from running is said before any is run.
    """

    stage: Stage
    compares: str
    against: str
    packages: Callable[[Source, ValidationOptions], tuple[str, ...]]
    options: tuple[str, ...]
    prepare: Callable[[Candidate, Part, ValidationOptions, Notice | None], Run]


def _nothing(_: Source, __: ValidationOptions) -> tuple[str, ...]:
    return ()


def _for_tokens(source: Source, _: ValidationOptions) -> tuple[str, ...]:
    return ("xllamacpp", "transformers") if isinstance(source, Checkpoint) else ("xllamacpp",)


def _for_logits(source: Source, options: ValidationOptions) -> tuple[str, ...]:
    runs_reference = options.use_reference is None
    is_checkpoint = isinstance(source, Checkpoint)
    packages = ["psutil"]
    if options.server is None or (runs_reference and not is_checkpoint):
        packages.append("xllamacpp")
    if runs_reference and is_checkpoint:
        packages += ["transformers", "torch"]
    return tuple(packages)


def _structure(candidate: Candidate, part: Part, _: ValidationOptions, __: Notice | None) -> Run:
    return lambda progress: check_structure(candidate, part)


def _tensors(candidate: Candidate, part: Part, options: ValidationOptions, _: Notice | None) -> Run:
    weights = None if options.imatrix is None else match_importance(options.imatrix, part).quant_weights
    return lambda progress: check_tensors(
        candidate.gguf, part, threads=options.threads, quant_weights=weights, progress=progress
    )


def _tokens(candidate: Candidate, part: Part, _: ValidationOptions, __: Notice | None) -> Run:
    return lambda progress: check_tokens(candidate, part.source)


def _logits(candidate: Candidate, part: Part, options: ValidationOptions, notice: Notice | None) -> Run:
    return prepare_logits(candidate, part, options, notice).run


STAGES: tuple[StageRow, ...] = (
    StageRow(
        Stage.STRUCTURE,
        "keys, tensor table and layout",
        "what the source and llama.cpp ask for",
        _nothing,
        (),
        _structure,
    ),
    StageRow(Stage.TENSORS, "every weight, dequantized,", "the source's weights", _nothing, ("imatrix",), _tensors),
    StageRow(Stage.TOKENS, "llama.cpp's token ids", "the reference tokenizer's", _for_tokens, (), _tokens),
    StageRow(
        Stage.LOGITS,
        "llama.cpp's next-token distributions",
        "the reference model's",
        _for_logits,
        ("text", "server", "save_reference", "use_reference"),
        _logits,
    ),
)
"""In the order in which they run."""


def check_extra(source: Source, options: ValidationOptions, stages: Collection[Stage]) -> None:
    """See that the packages are there that the stages need. Raises: UsageError."""
    needed: dict[str, list[str]] = {}
    for row in STAGES:
        if row.stage in stages:
            for package in row.packages(source, options):
                needed.setdefault(package, []).append(row.stage.value)
    for package, users in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{' and '.join(users)} cannot be validated: {package} is not installed",
                fix="pip install 'gguf3n[validate]', or --stages structure,tensors",
            )
