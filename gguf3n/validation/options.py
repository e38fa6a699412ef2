"""What is wanted of a validation, parsed once: the same for the command line and for Python."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from gguf3n.engines.devices import check_words
from gguf3n.errors import UsageError, shown
from gguf3n.formats.correlations import Correlations, as_correlations
from gguf3n.formats.imatrix import ImportanceMatrix, as_imatrix
from gguf3n.validation.result import Stage
from gguf3n.workers import check_threads

N_TOKENS = 1024
"""Read by both engines unless told otherwise; half of them are scored."""
N_CTX = 512
MIN_TOKENS = 4
"""Of a text, and of what is read at a time."""


@dataclass(frozen=True)
class ValidationOptions:
    """All that can be chosen, checked; see `parse_validation` for what each means."""

    stages: tuple[Stage, ...] = tuple(Stage)
    text: str | None = None
    n_tokens: int = N_TOKENS
    n_ctx: int = N_CTX
    server: str | None = None
    text_model: Path | None = None
    device: str = "auto"
    dtype: str = "float32"
    save_reference: Path | None = None
    use_reference: Path | None = None
    imatrix: ImportanceMatrix | None = None
    correlations: Correlations | None = None
    threads: int | None = None
    force: bool = False


def parse_validation(
    stages: str | Collection[Stage | str] | None = None,
    *,
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
) -> ValidationOptions:
    """The options of a command line or a call as one checked value.

    Args:
        stages: which to run, as Stage or by name, or a text such as "tensors,logits"; all by default.
        text: read by both engines; by default a built-in text in many scripts.
        n_tokens: how much of it; `n_ctx` at a time.
        server: address of a running llama-server to ask instead of llama.cpp on this machine, as in
            "http://127.0.0.1:8080"; it must have loaded the file.
        text_model: the text model's file, through which an mmproj file is shown pictures; a small one is made.
        device, dtype: of the reference model: "auto", "cpu" or "cuda"; "float32" or "bfloat16".
        save_reference: where to keep the reference's log-probabilities; ending in .kld for llama-perplexity.
        use_reference: such a file; the reference model is not run.
        imatrix: what the file was quantized with, if it was: its tensors are then judged as sharply as others.
        refine: the correlations that its codes were refined with, likewise.
        threads: workers, and threads of llama.cpp.
        force: replace the file of save_reference.

    Raises: UsageError for a stage that there is not, for none, for a device or dtype that there is not, or for options
        that exclude each other; GGUFError for the importance matrix and the correlations.
    """
    if save_reference is not None and use_reference is not None:
        raise UsageError("--save-reference and --use-reference exclude each other", fix="leave one of them out")
    check_threads(threads)
    check_words(device, dtype)
    for name, value in (("n_tokens", n_tokens), ("n_ctx", n_ctx)):
        if type(value) is not int or value < MIN_TOKENS:
            raise UsageError(f"{name}: not a number of tokens", expected=f"{MIN_TOKENS} or more", found=shown(value))
    return ValidationOptions(
        parse_stages(stages),
        text,
        n_tokens,
        n_ctx,
        server,
        None if text_model is None else Path(text_model),
        device,
        dtype,
        None if save_reference is None else Path(save_reference),
        None if use_reference is None else Path(use_reference),
        as_imatrix(imatrix),
        as_correlations(refine),
        threads,
        force,
    )


def parse_stages(stages: str | Collection[Stage | str] | None) -> tuple[Stage, ...]:
    """Stages in the order in which they run. Raises: UsageError."""
    if stages is None:
        return tuple(Stage)
    known = {stage.value: stage for stage in Stage}
    if isinstance(stages, Stage):
        stages = (stages,)
    if not isinstance(stages, Iterable):
        raise UsageError("not stages", expected=", ".join(known), found=shown(stages))
    named = [name.strip() for name in stages.split(",")] if isinstance(stages, str) else list(stages)
    texts = [name.value if isinstance(name, Stage) else str(name) for name in named]
    for name in texts:
        if name not in known:
            raise UsageError(f"no stage {name!r}", expected=", ".join(known), found=", ".join(texts))
    if not texts:
        raise UsageError("no stage to run", expected=", ".join(known), found="none")
    return tuple(stage for stage in Stage if stage.value in texts)
