"""Part + Recipe -> Plan: every tensor's type, its reason, its place in the file, before a weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gguf3n.deciding import decide, describe_tensors
from gguf3n.errors import QuantizationError, UsageError
from gguf3n.formats.byte_source import HeaderInMemory
from gguf3n.formats.ggml_types import GGML_TYPES, Importances
from gguf3n.formats.gguf_layout import KeyValue, QType
from gguf3n.formats.gguf_writer import Layout, TensorSlot, lay_out
from gguf3n.gemma3n.end_of_image import MARK
from gguf3n.gemma3n.importance import Importance
from gguf3n.gemma3n.mapping import MappedTensor, Storage
from gguf3n.gemma3n.metadata import file_keys
from gguf3n.gemma3n.mmproj import RUNS
from gguf3n.gemma3n.part import Part, PartKind
from gguf3n.gemma3n.refinement import Refinement
from gguf3n.inspection.lint import Finding, lint_headers
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, PLE_TYPES, Decision, For, ImageRows, Keep, Recipe, check_rules


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor: where its rows come from, its place, and why it has its type by which rule."""

    source: MappedTensor
    slot: TensorSlot
    reason: str
    rule: str
    quant_weights: NDArray[np.float32] | None = None
    """An importance for each column of a row, where the importance matrix has one."""
    refinement: Refinement | None = None
    """What its codes are refined with, where it has the tensor and the type allows it."""

    @property
    def wider(self) -> str:
        """What to do where a value is too large for the type."""
        if self.source.storage not in RUNS:
            return "use BF16 or F32 for this tensor"
        types = " or ".join(qtype.name for qtype in RUNS[self.source.storage][0] if qtype is not QType.F16)
        return f"use {types} for this tensor, as --mmproj lossless does"


@dataclass(frozen=True)
class Plan:
    """A GGUF file that does not exist yet."""

    part: Part
    recipe: Recipe
    layout: Layout
    tensors: tuple[PlannedTensor, ...]

    notices: tuple[str, ...]
    """What a user should know, of the source and of this plan."""

    findings: tuple[Finding, ...] = ()
    """What lint will say of the file, its notes left out; see `linted`."""

    @property
    def file_name(self) -> str:
        """What the file is called, unless its name is given."""
        return self.part.file_name(self.recipe.label)

    @property
    def total_bytes(self) -> int:
        return self.layout.total_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data a weight."""
        return 8 * sum(tensor.slot.n_bytes for tensor in self.tensors) / self.part.n_weights

    @property
    def refined(self) -> list[PlannedTensor]:
        """The tensors whose codes are refined."""
        return [tensor for tensor in self.tensors if tensor.refinement is not None]

    @property
    def type_counts(self) -> dict[QType, int]:
        """Tensors of each type, most frequent first."""
        return dict(Counter(tensor.slot.qtype for tensor in self.tensors).most_common())


def make_plan(
    part: Part,
    recipe: Recipe,
    importance: Importance | None = None,
    unfit_for_f16: Collection[str] = (),
    *,
    refinement: Refinement | None = None,
    force_types: bool = False,
) -> Plan:
    """Decide every type and lay out the file.

    Args:
        unfit_for_f16: names of tensors that F16 would harm.
        refinement: correlations to refine codes with.
        force_types: allow types that llama.cpp can't run.

    Raises: QuantizationError if a type needs an importance matrix and it has no entry for the tensor; UsageError for a
        rule of the user's that can't be used with this model, or a type that llama.cpp can't run.
    """
    facts = describe_tensors(part.tensors, None if importance is None else importance.quant_weights)
    check_rules(recipe, [fact for fact in facts if fact is not None])
    decisions = decide(part.tensors, facts, recipe, unfit_for_f16)
    weights = importance.quant_weights if importance is not None else {}
    for tensor, decision in zip(part.tensors, decisions, strict=True):
        required = GGML_TYPES[decision.qtype].importances is Importances.REQUIRED
        if decision.lacks_importance or (required and tensor.name not in weights):
            raise QuantizationError(
                f"{recipe.name}: {decision.qtype.name} needs an importance matrix",
                expected=f"an entry for {tensor.name}",
                found="none" if importance is None else f"none in {importance.path}",
                fix="give one with --imatrix, or choose another type",
            )
    if not force_types:
        _check_runs(part.tensors, decisions, recipe)
    layout = lay_out(
        [
            *_with_file_keys(part, recipe),
            *(importance.keys if importance is not None else ()),
            *(refinement.keys if refinement is not None else ()),
        ],
        [(tensor.name, tensor.shape, decision.qtype) for tensor, decision in zip(part.tensors, decisions, strict=True)],
    )
    return Plan(
        part,
        recipe,
        layout,
        tuple(
            PlannedTensor(
                _with_rows(tensor, recipe),
                slot,
                decision.reason,
                decision.rule,
                weights.get(tensor.name),
                refinement if refinement is not None and refinement.refines(tensor.name, decision.qtype) else None,
            )
            for tensor, slot, decision in zip(part.tensors, layout.slots, decisions, strict=True)
        ),
        (
            *part.notices,
            *(importance.notices if importance is not None else ()),
            *(refinement.notices if refinement is not None else ()),
            *_notices(part.tensors, decisions, recipe),
        ),
    )


def linted(plans: Sequence[Plan]) -> list[Plan]:
    """Plans of one part with what lint will say of their files."""
    headers = [HeaderInMemory(plan.file_name, plan.layout.header, plan.total_bytes) for plan in plans]
    return [replace(plan, findings=found) for plan, found in zip(plans, lint_headers(headers), strict=True)]


def _with_rows(tensor: MappedTensor, recipe: Recipe) -> MappedTensor:
    """A tensor with the rows that the recipe wants where there are two kinds."""
    wants_plain = recipe.image_rows is ImageRows.LLAMA_CPP and tensor.plain_rows
    return replace(tensor, rows=tensor.plain_rows) if wants_plain else tensor


def _with_file_keys(part: Part, recipe: Recipe) -> list[KeyValue]:
    """A part's keys with those that say how the file is quantized; of the mmproj file in the converter's order."""
    version, ftype = file_keys(recipe.ftype)
    if part.kind is PartKind.TEXT:
        return [*part.keys, version, ftype]
    if part.kind is PartKind.LORA:
        return [*part.keys, version]
    general = [key for key in part.keys if key.name.startswith("general.")]
    others = [key for key in part.keys if not key.name.startswith("general.")]
    return [*general, ftype, *others, version]


def _check_runs(tensors: Sequence[MappedTensor], decisions: Sequence[Decision], recipe: Recipe) -> None:
    """Refuse what llama.cpp is known to abort on. Raises: UsageError."""
    for tensor, decision in zip(tensors, decisions, strict=True):
        types, why = RUNS.get(tensor.storage, ((), ""))
        if types and decision.qtype not in types:
            raise UsageError(
                f"{recipe.name}: {tensor.name} can't be {decision.qtype.name}: {why}",
                expected=" or ".join(qtype.name for qtype in types),
                found=f"{decision.qtype.name} by {decision.rule}",
                fix="choose another type, or add --force-types if your engine is not llama.cpp",
            )


def _notices(tensors: Sequence[MappedTensor], decisions: Sequence[Decision], recipe: Recipe) -> list[str]:
    """What a user should know of the types chosen."""
    notices = [recipe.note] if recipe.part is For.MMPROJ and recipe.note else []
    if recipe.image_rows is ImageRows.MODEL and any(tensor.plain_rows for tensor in tensors):
        notices.append(
            f"{recipe.name}: the rows of {MARK} are the model's own, so that pictures are read as it reads them; "
            "llama.cpp's converter writes padding there, as NAME@llama.cpp does"
        )
    unfit = [
        tensor.name
        for tensor, decision in zip(tensors, decisions, strict=True)
        if tensor.storage is Storage.HALF and recipe.keep is Keep.F16 and decision.qtype is QType.BF16
    ]
    if unfit:
        notices.append(
            f"{recipe.name}: {len(unfit)} tensors stay BF16, as their values are too large or too small for F16: "
            + ", ".join(unfit[:3])
            + (", …" if len(unfit) > 3 else "")
        )
    for tensor, decision in zip(tensors, decisions, strict=True):
        if tensor.name == PER_LAYER_TOKEN_EMBD and decision.qtype not in PLE_TYPES:
            notices.append(
                f"{recipe.name}: per_layer_token_embd in {decision.qtype.name}: GPU backends can't look up rows of "
                "that type and leave it to the CPU, and Ollama before 0.30 can't read it; choose another with --ple"
            )
    return notices
