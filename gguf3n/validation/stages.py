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
from gguf3n.gemma3n.part import Part, PartKind
from gguf3n.gemma3n.refinement import match_correlations
from gguf3n.gemma3n.source import Checkpoint, Source
from gguf3n.progress import OnProgress
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.logits import prepare_logits
from gguf3n.validation.options import ValidationOptions
from gguf3n.validation.result import Stage, StageResult
from gguf3n.validation.structure import check_structure
from gguf3n.validation.tensors import check_tensors
from gguf3n.validation.tokens import check_tokens
from gguf3n.validation.vision import prepare_vision

Run: TypeAlias = Callable[[OnProgress | None], StageResult]
"""A stage that is ready to be run."""
Notice: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class StageRow:
    """One row of the table.

    Args:
        kinds: the files that it is for.
        compares, against: what with what, for a report.
        packages: what must be installed to run it.
        options: names of parse_validation's arguments that only this stage uses.
        prepare: sees that it can be run, and says how; what keeps a stage from running is said before any is run.
    """

    stage: Stage
    kinds: tuple[PartKind, ...]
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


def _for_vision(_: Source, options: ValidationOptions) -> tuple[str, ...]:
    return ("psutil",) if options.server is not None else ("psutil", "xllamacpp")


def _structure(candidate: Candidate, part: Part, _: ValidationOptions, __: Notice | None) -> Run:
    return lambda progress: check_structure(candidate, part)


def _tensors(candidate: Candidate, part: Part, options: ValidationOptions, _: Notice | None) -> Run:
    weights = refinement = None
    if options.imatrix is not None and part.kind is PartKind.TEXT:
        weights = match_importance(options.imatrix, part).quant_weights
    if options.correlations is not None and part.kind is PartKind.TEXT:
        refinement = match_correlations(options.correlations, part)
    return lambda progress: check_tensors(
        candidate.gguf,
        part,
        threads=options.threads,
        quant_weights=weights,
        refinement=refinement,
        progress=progress,
    )


def _tokens(candidate: Candidate, part: Part, _: ValidationOptions, __: Notice | None) -> Run:
    return lambda progress: check_tokens(candidate, part.source)


def _logits(candidate: Candidate, part: Part, options: ValidationOptions, notice: Notice | None) -> Run:
    # the output row of the mark that ends a picture is not the model's, so the text's own tokens are compared
    n_compared = None
    if isinstance(part.source, Checkpoint) and any(tensor.plain_rows for tensor in part.tensors):
        n_compared = part.source.config.vocab_size_per_layer_input
    return prepare_logits(candidate, part, options, notice, n_compared=n_compared).run


def _vision(candidate: Candidate, part: Part, options: ValidationOptions, notice: Notice | None) -> Run:
    return prepare_vision(candidate, part, options, notice).run


TEXT, BOTH = (PartKind.TEXT,), (PartKind.TEXT, PartKind.MMPROJ)

STAGES: tuple[StageRow, ...] = (
    StageRow(
        Stage.STRUCTURE,
        BOTH,
        "keys, tensor table and layout",
        "what the source and llama.cpp ask for",
        _nothing,
        (),
        _structure,
    ),
    StageRow(
        Stage.TENSORS,
        BOTH,
        "every weight, dequantized,",
        "the source's weights",
        _nothing,
        ("imatrix", "refine"),
        _tensors,
    ),
    StageRow(Stage.TOKENS, TEXT, "llama.cpp's token ids", "the reference tokenizer's", _for_tokens, (), _tokens),
    StageRow(
        Stage.LOGITS,
        TEXT,
        "llama.cpp's next-token distributions",
        "the reference model's",
        _for_logits,
        ("text", "server", "save_reference", "use_reference"),
        _logits,
    ),
    StageRow(
        Stage.VISION,
        (PartKind.MMPROJ,),
        "llama.cpp's next-token distributions after pictures",
        "the reference model's",
        _for_vision,
        ("server", "text_model"),
        _vision,
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
