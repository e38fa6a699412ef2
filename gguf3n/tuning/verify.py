"""A tuned file and a stock one of its size in llama.cpp, over one text, against the model itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gguf3n.conversion import write
from gguf3n.engines.llama_library import version
from gguf3n.engines.memory import check_memory, source_need
from gguf3n.errors import UsageError
from gguf3n.formats.whole_file import check_space
from gguf3n.planning import Plan
from gguf3n.progress import OnProgress
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.divergence import Divergence
from gguf3n.validation.logits import prepare_logits
from gguf3n.validation.options import ValidationOptions


@dataclass(frozen=True)
class Measured:
    """A recipe's file in llama.cpp."""

    name: str
    n_bytes: int
    divergence: Divergence


def verify(
    plans: list[Plan],
    options: ValidationOptions,
    *,
    notice: Callable[[str], None] | None = None,
    progress: OnProgress | None = None,
) -> list[Measured]:
    """Write each plan's file, run it, remove it; the reference is run once for all.

    Raises: UsageError: too little memory, a text that is too short, packages that are not installed. OutputError: no
        room for a file. What `write` and llama.cpp raise.
    """
    part = plans[0].part
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="gguf3n-") as directory:
        saved = Path(directory) / "reference.safetensors"
        for plan in plans:
            path = Path(directory) / "candidate.gguf"
            check_space(path, plan.total_bytes)
            write([plan], path, threads=options.threads, progress=progress)
            first = not measured
            wanted = replace(options, save_reference=saved) if first else replace(options, use_reference=saved)
            result = prepare_logits(Candidate(path), part, wanted, notice if first else None).run(progress)
            measured.append(Measured(plan.recipe.name, plan.total_bytes, result.divergence))
            path.unlink()
    return measured


def check_engines(plan: Plan, options: ValidationOptions) -> None:
    """See that both can be run, before any work is done. Raises: UsageError."""
    try:
        version()
    except ImportError as error:
        raise UsageError(
            "--verify runs llama.cpp: no module xllamacpp", fix="pip install 'gguf3n[validate]'"
        ) from error
    check_memory([source_need(plan.part.source, options.dtype, options.n_ctx)])
