"""The recipe that loses least at a size, in one call."""

from __future__ import annotations

from pathlib import Path

from gguf3n.conversion import read_source
from gguf3n.errors import UsageError
from gguf3n.formats.imatrix import ImportanceMatrix, as_imatrix
from gguf3n.formats.sensitivity import Sensitivity, read_sensitivity
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.runtime_memory import RUN_CTX
from gguf3n.gemma3n.source import Source
from gguf3n.recipes import Recipe, find_recipe
from gguf3n.tuning.allocate import ENGINES, Tuned, Tuning, TypeLimits, check_engine
from gguf3n.tuning.budget import Budget, bits_budget, size_budget
from gguf3n.tuning.measure import parse_types


def tune(
    source: str | Path | Source,
    sensitivity: str | Path | Sensitivity,
    *,
    size: str | None = None,
    bpw: float | None = None,
    like: str | Recipe | None = None,
    imatrix: str | Path | ImportanceMatrix | None = None,
    types: str | None = None,
    engine: str = ENGINES[0],
    fast_cpu: bool = False,
    any_table_type: bool = False,
    n_ctx: int = RUN_CTX,
    name: str = "tuned",
) -> Tuned:
    """The recipe with the least expected divergence that a size allows.

    Args:
        source: a checkpoint directory, a Hub id, an unquantized GGUF file, or a Source.
        sensitivity: what was measured of this model, or its file.
        size, bpw, like: one of them: as in "4.2GB" or "fits:8GB", bits a weight, or a quantization.
        imatrix: what the file will be quantized with; as when it was measured.
        types: to choose from, separated by commas; by default all that were measured.
        engine: "llama.cpp", or "ollama-old" for Ollama before 0.30.
        fast_cpu: only types that llama.cpp repacks for CPUs.
        any_table_type: also types of the per-layer table whose rows only CPUs look up.
        n_ctx: tokens of context, for "fits:".
        name: of the recipe.

    Raises: UsageError: options that can't be used, a size that no file has, sensitivities of another model. SourceError
        or a class below it; GGUFError, QuantizationError for the importance matrix.
    """
    check_sizes(size, bpw, like)
    limits = TypeLimits(() if types is None else parse_types(types), any_table_type, fast_cpu)
    check_engine(engine, limits)
    measured = sensitivity if isinstance(sensitivity, Sensitivity) else read_sensitivity(sensitivity)
    opened = source if isinstance(source, Source) else read_source(source)
    tuning = Tuning(text_part(opened), measured, limits, as_imatrix(imatrix))
    return tuning.tune(budget_of(tuning, size, bpw, like, n_ctx), name)


def check_sizes(size: str | None, bpw: float | None, like: str | Recipe | None) -> None:
    """See that there is one. Raises: UsageError."""
    given = [option for option, value in (("--size", size), ("--bpw", bpw), ("--like", like)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", fix="give one of them")
    if not given:
        raise UsageError("no size", expected="--size 4.2GB, --bpw 4.5 or --like Q4_K_M", fix="give one of them")


def budget_of(tuning: Tuning, size: str | None, bpw: float | None, like: str | Recipe | None, n_ctx: int) -> Budget:
    """Bytes of a whole file. Raises: UsageError."""
    if size is not None:
        return size_budget(size, tuning.part, n_ctx)
    if bpw is not None:
        return bits_budget(bpw, tuning.part.n_weights, tuning.overhead_bytes)
    assert like is not None
    recipe = find_recipe(like) if isinstance(like, str) else like
    return Budget(tuning.plan(recipe).total_bytes, f"the size of {recipe.name}")
