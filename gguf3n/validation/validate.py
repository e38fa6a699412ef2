"""Is a GGUF file what its source says it should be: the stages in turn, a verdict for the whole.

validation = validate("model-Q4_K_M.gguf", "google/gemma-3n-E4B-it")
validation.verdict, validation.stages[Stage.LOGITS].divergence.mean
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gguf3n.conversion import read_gguf, read_source
from gguf3n.engines.memory import SMALLER_STAGES, Alternative, check_memory, llama_cpp_need, reference_need
from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.gguf_layout import MAGIC
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.imatrix import ImportanceMatrix, read_imatrix
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.model import Model
from gguf3n.validation.logits import N_CTX, N_TOKENS, LogitsRun, prepare_logits
from gguf3n.validation.result import Problem, Stage, StageResult, Verdict, worst
from gguf3n.validation.structure import check_structure
from gguf3n.validation.tensors import check_tensors
from gguf3n.validation.tokens import check_tokens

Result = TypeVar("Result")

SWAPPED = "name the file to be proved as FILE, and what it was made from with --reference"

LATER = Alternative(f"{SMALLER_STAGES}, and for the logits gguf3n validate, with --dtype bfloat16")
"""Where a file is still to be written and validated."""


@dataclass(frozen=True)
class Validation:
    """What was found of one file. `stages` are those that were run, in their order."""

    path: Path
    reference: str
    stages: Mapping[Stage, StageResult]

    @property
    def verdict(self) -> Verdict:
        return worst(result.verdict for result in self.stages.values())


def read_reference(reference: str | Path, *, revision: str | None = None, show_progress: bool = False) -> Model:
    """What a file is held against: a checkpoint directory, a Hub id, or an unquantized GGUF file.

    Raises: SourceError or a class below it, HubError, GGUFError; UsageError for a quantized GGUF file.
    """
    if os.path.isfile(reference):
        if revision is not None:
            raise UsageError(f"--revision is for Hub ids; {reference} is a local path", fix="leave --revision out")
        try:
            return read_gguf(reference)
        except UsageError as error:
            raise UsageError(
                error.what,
                expected="what FILE was made from: a checkpoint, a Hub id, or a file in F32, F16 or BF16",
                found=error.found,
                fix=SWAPPED,
            ) from error
    return read_source(reference, revision=revision, show_progress=show_progress)


def check_extra(
    reference: Model, stages: Collection[Stage], *, server: str | None = None, is_saved: bool = False
) -> None:
    """See that the packages are there that the stages need.

    Args:
        is_saved: the reference's log-probabilities are there already.

    Raises: UsageError.
    """
    is_checkpoint = reference.path.is_dir()
    runs_reference = (Stage.LOGITS,) if not is_saved else ()
    runs_llama_cpp = (Stage.LOGITS,) if server is None else () if is_checkpoint else runs_reference
    needed: dict[str, Sequence[Stage]] = {
        "xllamacpp": (Stage.TOKENS, *runs_llama_cpp),
        "transformers": (Stage.TOKENS, *runs_reference) if is_checkpoint else (),
        "torch": runs_reference if is_checkpoint else (),
        "psutil": (Stage.LOGITS,),
    }
    for package, users in needed.items():
        lacking = [stage.value for stage in users if stage in stages]
        if lacking and importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{' and '.join(lacking)} cannot be validated: {package} is not installed",
                fix="pip install 'gguf3n[validate]', or --stages structure,tensors",
            )


def check_fits(reference: Model) -> None:
    """See that the reference fits as `validate` runs it by default, before a file is written to be held against it.

    Raises: UsageError.
    """
    if reference.path.is_dir():
        need = reference_need(reference.path, "float32")
    else:
        need = llama_cpp_need(open_gguf(reference.path), N_CTX)
    check_memory([replace(need, alternatives=(LATER,))])


def validate(
    path: str | Path,
    reference: str | Path | Model,
    *,
    stages: Collection[Stage] = tuple(Stage),
    text: str | None = None,
    n_tokens: int = N_TOKENS,
    n_ctx: int = N_CTX,
    server: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    save_reference: str | Path | None = None,
    use_reference: str | Path | None = None,
    imatrix: str | Path | ImportanceMatrix | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Callable[[Stage, int, int], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> Validation:
    """Hold a GGUF file against its source.

    Args:
        reference: a checkpoint directory, a Hub id, an unquantized GGUF file, or what `read_reference` returned.
        text: read by both engines; by default a built-in text in many scripts.
        n_tokens: how much of it; `n_ctx` at a time.
        server: address of a running llama-server to ask instead of llama.cpp in this process, as in
            "http://127.0.0.1:8080"; it must have loaded the file.
        device, dtype: of the reference model: "auto", "cpu" or "cuda"; "float32" or "bfloat16".
        save_reference: where to keep the reference's log-probabilities; ending in .kld for llama-perplexity.
        use_reference: such a file; the reference model is not run.
        imatrix: what the file was quantized with, if it was: its tensors are then judged as sharply as others.
        progress: called with a stage, and how much of it is done and to be done.
        notice: called with a line on the memory that the logits take, before any stage starts.

    Raises: UsageError for options, packages or memory; GGUFError for a path that is not a file; the errors of
        `read_reference`. What is wrong with the file is in the result, never an error.
    """
    path = Path(path)
    check_file(path)
    model = reference if isinstance(reference, Model) else read_reference(reference)
    check_extra(model, stages, server=server, is_saved=use_reference is not None)
    quant_weights = None if imatrix is None else _quant_weights(imatrix, model)

    def report(stage: Stage) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(stage, done, total)

    checks: dict[Stage, Callable[[], StageResult]] = {
        Stage.STRUCTURE: lambda: check_structure(path, model),
        Stage.TENSORS: lambda: check_tensors(
            path, model, threads=threads, quant_weights=quant_weights, progress=report(Stage.TENSORS)
        ),
        Stage.TOKENS: lambda: check_tokens(path, model.path),
    }
    if Stage.LOGITS in stages:  # what keeps it from running is said before the others take their time
        prepared = _result(
            path,
            lambda: prepare_logits(
                path,
                model.path,
                text=text,
                n_tokens=n_tokens,
                n_ctx=n_ctx,
                server=server,
                device=device,
                dtype=dtype,
                save_reference=None if save_reference is None else Path(save_reference),
                use_reference=None if use_reference is None else Path(use_reference),
                force=force,
                notice=notice,
            ),
        )
        checks[Stage.LOGITS] = lambda: (
            prepared.run(threads=threads, progress=report(Stage.LOGITS))
            if isinstance(prepared, LogitsRun)
            else prepared
        )
    return Validation(path, model.origin, {stage: _result(path, checks[stage]) for stage in Stage if stage in stages})


def _quant_weights(imatrix: str | Path | ImportanceMatrix, model: Model) -> Mapping[str, NDArray[np.float32]]:
    matrix = imatrix if isinstance(imatrix, ImportanceMatrix) else read_imatrix(imatrix)
    return match_importance(matrix, model).quant_weights


def check_file(path: Path) -> None:
    """See that there is a GGUF file, before a reference is fetched. Raises: GGUFError."""
    try:
        with open(path, "rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read", found=error.strerror or str(error), fix=SWAPPED) from error
    if magic != MAGIC:
        raise GGUFError(f"{path}: not a GGUF file", expected=f"{MAGIC!r} at its start", found=repr(magic), fix=SWAPPED)


def _result(path: Path, check: Callable[[], Result]) -> Result | StageResult:
    """A file that cannot be read or loaded fails the stage; it is what validation is there to say."""
    try:
        return check()
    except GGUFError as error:
        return StageResult((Problem(Verdict.FAIL, path.name, error.one_line),), 0.0)
