"""Whole models as a recipe sees them, and what a recipe makes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from gguf3n.deciding import describe_tensors
from gguf3n.formats.gguf_layout import QType, aligned, tensor_bytes
from gguf3n.gemma3n.config import Config
from gguf3n.gemma3n.mapping import MappedTensor, Storage
from gguf3n.gemma3n.published import outline
from gguf3n.recipes import Decision, Keep, Recipe, Tensor
from workshop.snapshots import SIZES


@dataclass(frozen=True)
class Facts:
    """The tensors of one size; `quantizable` in the same order as those of `tensors` that are."""

    tensors: tuple[MappedTensor, ...]
    quantizable: tuple[Tensor, ...]


@lru_cache
def facts(size: str, *, imatrix: bool = False, complete: bool = False, vocab_size: int | None = None) -> Facts:
    """What is known of the tensors of a size.

    Args:
        imatrix: with the entries that llama-imatrix writes: all evaluated matrices of layers.
        complete: with entries for weights that are never evaluated too.
    """
    config: Config = SIZES[size]
    if vocab_size is not None:
        config = replace(config, vocab_size=vocab_size)
    tensors = outline(config)
    described = []
    for fact in describe_tensors(tensors):
        if fact is not None:
            covered = imatrix and (complete or (fact.evaluated and fact.bid is not None))
            described.append(replace(fact, imatrix=imatrix, quant_weights=covered))
    return Facts(tensors, tuple(described))


def decisions(recipe: Recipe, size: str, *, imatrix: bool = False, complete: bool = False) -> dict[str, Decision]:
    """What a recipe decides for each matrix that may be quantized, by name."""
    known = facts(size, imatrix=imatrix, complete=complete)
    return {tensor.name: recipe.resolve(tensor) for tensor in known.quantizable}


def types(recipe: Recipe, size: str, *, imatrix: bool = False, complete: bool = False) -> dict[str, str]:
    """The same as names of types."""
    found = decisions(recipe, size, imatrix=imatrix, complete=complete)
    return {name: decision.qtype.name for name, decision in found.items()}


def data_bytes(recipe: Recipe, size: str, *, imatrix: bool = True, vocab_size: int | None = None) -> int:
    """Bytes of all tensors in a file, padding included."""
    return sum(
        aligned(tensor_bytes(qtype, tensor.shape))
        for tensor, qtype in all_types(recipe, size, imatrix=imatrix, vocab_size=vocab_size)
    )


def type_counts(recipe: Recipe, size: str, *, imatrix: bool = True) -> dict[str, int]:
    """Tensors of each type in a file."""
    return dict(Counter(qtype.name for _, qtype in all_types(recipe, size, imatrix=imatrix)))


def all_types(
    recipe: Recipe, size: str, *, imatrix: bool, vocab_size: int | None = None
) -> list[tuple[MappedTensor, QType]]:
    """Every tensor of a file and its type."""
    known = facts(size, imatrix=imatrix, vocab_size=vocab_size)
    decided = {tensor.name: recipe.resolve(tensor).qtype for tensor in known.quantizable}
    half = QType.F32 if recipe.keep is Keep.F32 else QType.F16
    kept = {Storage.FLOAT32: QType.F32, Storage.HALF: half}
    return [(t, decided[t.name] if t.name in decided else kept[t.storage]) for t in known.tensors]


def tensor(name: str = "blk.5.ffn_up.weight", **known: object) -> Tensor:
    """One tensor of an imagined model of 32 layers."""
    bid = int(name.split(".")[1]) if name.startswith("blk.") else None
    facts: dict[str, object] = {"n_per_row": 2048, "bid": bid, "n_layers": 32}
    return Tensor(name, **(facts | known))  # type: ignore[arg-type]
