"""Tensors + Recipe -> the type of each, and what that makes of a model that is not at hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gguf3n.formats.gguf_layout import QType, aligned, tensor_bytes
from gguf3n.gemma3n.config import Config
from gguf3n.gemma3n.mapping import MappedTensor
from gguf3n.gemma3n.published import ENCODER_HEADER_BYTES, HEADER_BYTES, encoder_outline, outline
from gguf3n.recipes import Decision, Keep, Recipe, Tensor


def describe_tensors(tensors: Sequence[MappedTensor], covered: Container[str] | None = None) -> list[Tensor | None]:
    """What a recipe may ask of each tensor; None for those that are never quantized.

    Args:
        covered: names with an entry in the importance matrix, if one is given.
    """
    n_layers = 1 + max((tensor.bid for tensor in tensors if tensor.bid is not None), default=-1)
    n_rows = {tensor.name: tensor.n_rows for tensor in tensors}
    gqa = n_rows.get("blk.0.attn_q.weight", 0) // n_rows.get("blk.0.attn_k.weight", 1)
    return [
        Tensor(
            tensor.name,
            tensor.shape[-1],
            tensor.bid,
            n_layers,
            gqa,
            tensor.evaluated,
            covered is not None,
            covered is not None and tensor.name in covered,
        )
        if tensor.storage.by_recipe
        else None
        for tensor in tensors
    ]


def decide(
    tensors: Sequence[MappedTensor], facts: Sequence[Tensor | None], recipe: Recipe, unfit_for_f16: Collection[str]
) -> list[Decision]:
    """The type of each tensor and why.

    Args:
        facts: as `describe_tensors` has them.
        unfit_for_f16: names of tensors that F16 would harm.

    Raises: UsageError for a rule of the user's that can't be used with a tensor.
    """
    return [
        _keep(tensor, recipe, unfit_for_f16) if fact is None else recipe.resolve(fact)
        for tensor, fact in zip(tensors, facts, strict=True)
    ]


def _keep(tensor: MappedTensor, recipe: Recipe, unfit_for_f16: Collection[str]) -> Decision:
    """The type of a tensor that is never quantized."""
    if tensor.storage.forced is not None:
        return Decision(tensor.storage.forced, tensor.storage.reason, "never quantized")
    qtype, why = QType.BF16, tensor.storage.reason
    if recipe.keep is Keep.F32:
        qtype = QType.F32
    elif recipe.keep is Keep.F16 and tensor.name in unfit_for_f16:
        why = "stays BF16: values too large or too small for F16"
    elif recipe.keep is Keep.F16 or (recipe.keep is Keep.SOURCE and tensor.source_dtypes == {"F16"}):
        qtype = QType.F16
    return Decision(qtype, why, f"keep {recipe.keep.value}")


@dataclass(frozen=True)
class Estimate:
    """What a recipe makes of a model of some size: tensors and weights by type.

    Units: bytes of the whole file, its usual vocabulary included.
    """

    type_counts: Mapping[QType, int]
    weights: Mapping[QType, int]
    total_bytes: int
    bits_per_weight: float
    needs_imatrix: bool


def estimate(recipe: Recipe, config: Config) -> Estimate:
    """A file's types and size without a checkpoint; with an importance matrix only where the recipe needs one."""
    return _estimate(recipe, _text_outline(config))


def estimate_encoders(recipe: Recipe, *, vision: bool = True, audio: bool = True) -> Estimate:
    """The same of an mmproj file."""
    return _estimate(recipe, _encoder_outline(vision, audio))


@dataclass(frozen=True)
class _Outline:
    """A model without its weights, and what a recipe may ask of each tensor that it decides.

    Args:
        kept: one of each kind of tensors that are never quantized, and how many there are of it.
        facts: of `decided`, without an importance matrix.
        measured_facts: with one of all that can be measured.
    """

    kept: tuple[tuple[MappedTensor, int], ...]
    decided: tuple[MappedTensor, ...]
    facts: list[Tensor | None]
    measured_facts: list[Tensor | None]
    header_bytes: int


def _outline(tensors: Sequence[MappedTensor], header_bytes: int) -> _Outline:
    measured = {tensor.name for tensor in tensors if tensor.evaluated and tensor.bid is not None}
    kept = [tensor for tensor in tensors if not tensor.storage.by_recipe]
    kinds = {(tensor.storage, tensor.shape): tensor for tensor in kept}
    counts = Counter((tensor.storage, tensor.shape) for tensor in kept)
    return _Outline(
        tuple((kinds[kind], count) for kind, count in counts.items()),
        tuple(tensor for tensor in tensors if tensor.storage.by_recipe),
        [fact for fact in describe_tensors(tensors) if fact is not None],
        [fact for fact in describe_tensors(tensors, measured) if fact is not None],
        header_bytes,
    )


@lru_cache(maxsize=4)
def _text_outline(config: Config) -> _Outline:
    return _outline(outline(config), HEADER_BYTES)


@lru_cache(maxsize=4)
def _encoder_outline(vision: bool, audio: bool) -> _Outline:
    return _outline(encoder_outline(vision=vision, audio=audio), ENCODER_HEADER_BYTES)


def _estimate(recipe: Recipe, model: _Outline) -> Estimate:
    for facts in (model.facts, model.measured_facts):
        decisions = decide(model.decided, facts, recipe, ())
        if not any(decision.lacks_importance for decision in decisions):
            break
    kinds: Counter[tuple[QType, tuple[int, ...]]] = Counter()
    for tensor, count in model.kept:
        kinds[_keep(tensor, recipe, ()).qtype, tensor.shape] += count
    kinds.update((decision.qtype, tensor.shape) for tensor, decision in zip(model.decided, decisions, strict=True))
    types: Counter[QType] = Counter()
    weights: Counter[QType] = Counter()
    for (qtype, shape), count in kinds.items():
        types[qtype] += count
        weights[qtype] += count * math.prod(shape)
    n_bytes = sum(count * aligned(tensor_bytes(qtype, shape)) for (qtype, shape), count in kinds.items())
    return Estimate(
        dict(types.most_common()),
        weights,
        n_bytes + model.header_bytes,
        8 * n_bytes / weights.total(),
        facts is model.measured_facts,
    )
