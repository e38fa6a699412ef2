"""What running the models takes, before they are loaded.

    reference    its weights in the dtype they are computed in; attention of a chunk; logits of some positions
    llama.cpp    the file; keys and values of a chunk; logits of some positions
    disk         the reference's log-probabilities, unless they are there already

The two models are never in memory together.

# measured: 2026-11-21, largest resident sizes with a checkpoint of E2B's size and its Q4_K_M, chunks of 512 tokens:
reference in bfloat16 5.72 GB, 5.77 expected; llama.cpp 4.35 GB, 4.6 expected
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import Keys

from gguf3n.engines.llama_library import N_BATCH
from gguf3n.engines.reference import HEAD_POSITIONS, HEAD_ROWS
from gguf3n.errors import UsageError
from gguf3n.formats.rows import FLOAT_DTYPES
from gguf3n.gemma3n.mapping import Storage, map_tensors
from gguf3n.gemma3n.source import Checkpoint, GGUFSource, Source
from gguf3n.gemma3n.text import table
from gguf3n.inspection.subject import Subject
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD

TORCH_BYTES = 650_000_000
"""Of a process that has loaded torch and transformers, and of the activations of 512 tokens."""
SCORES_BYTES = 3 * 4
"""Of each pair of positions and each head: attention is computed plainly, its scores are copied when they are masked
and when their softmax is taken.

# measured: 2026-11-21, the tests' checkpoint, four heads: 0.55 GB with 512 tokens, 1.43 GB with 4,096, 0.79 GB expected
# to be added
"""
LLAMA_BYTES = 100_000_000
"""Of a process that has loaded llama.cpp, and of its buffers for everything but logits."""

PICTURE_TOKENS = 300
PICTURE_PIXELS = 768**2
PICTURE_BYTES = 2_000
"""Of activations, for each pixel: the widest are 512 channels on a quarter of the width and height, and are copied."""

CGROUP = Path("/sys/fs/cgroup")
"""Where a container's own limit stands, which may be less than what the machine has."""


@dataclass(frozen=True)
class Alternative:
    """An option that takes less; nothing where it is not known how much."""

    option: str
    n_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.option} ({gigabytes(self.n_bytes)})" if self.n_bytes else self.option


@dataclass(frozen=True)
class ModelNeed:
    """Memory that one model takes. `what` names it and says how it is run."""

    what: str
    n_bytes: int
    alternatives: tuple[Alternative, ...]


SMALLER_STAGES = Alternative("--stages structure,tensors,tokens")


def gigabytes(n_bytes: int) -> str:
    """As in "8.9 GB"; small sizes in MB."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.0f} MB"


def models_needs(
    reference: Source | None, subject: Subject, n_ctx: int, dtype: str, server: str | None
) -> tuple[ModelNeed, ...]:
    """What is needed one after the other.

    Args:
        reference: None where its log-probabilities are there already.
        subject: the file that is held against it.
        server: a llama-server elsewhere has loaded the file.
    """
    needs = []
    if reference is not None:
        needs.append(source_need(reference, dtype, n_ctx, Alternative("--use-reference FILE"), SMALLER_STAGES))
    if server is None:
        needs.append(llama_cpp_need(subject, n_ctx, Alternative("--server URL"), SMALLER_STAGES))
    return tuple(needs)


def source_need(source: Source, dtype: str, n_ctx: int, *others: Alternative) -> ModelNeed:
    """Of a source's own model, with chunks of n_ctx tokens: in torch, or in llama.cpp where it is a GGUF file."""
    if isinstance(source, GGUFSource):
        return llama_cpp_need(Subject(source.gguf), n_ctx, *others)
    assert isinstance(source, Checkpoint), source
    return reference_need(source, dtype, n_ctx, *others)


def reference_need(source: Checkpoint, dtype: str, n_ctx: int, *others: Alternative) -> ModelNeed:
    """Of a checkpoint's text model in torch, with chunks of n_ctx tokens.

    Why: weights that are in bfloat16 already stay in the file, which is mapped where transformers reads it itself; of
    the per-layer table only those rows are ever read that the text has tokens for.

    Raises: SourceError or a class below it.
    """
    source = source.unpadded
    config = source.config
    mapping = map_tensors(table(config), source.tensors, source.origin)
    # logits of some positions, their soft cap, and of one position the log-probabilities in float64
    logits = (2 * 4 * HEAD_POSITIONS + 3 * 8) * config.vocab_size
    working = logits + SCORES_BYTES * config.num_attention_heads * n_ctx**2 + TORCH_BYTES
    in_float32 = 4 * mapping.n_weights + working
    n_unread = sum(
        tensor.n_weights
        for tensor in mapping.tensors
        if source.as_it_stands and tensor.name == PER_LAYER_TOKEN_EMBD and tensor.source_dtypes == {"BF16"}
    )
    widened = 4 * HEAD_ROWS * config.hidden_size
    in_bfloat16 = 2 * (mapping.n_weights - n_unread) + widened + working
    if dtype == "float32":
        others = (Alternative("--dtype bfloat16", in_bfloat16), *others)
    return ModelNeed(f"the reference in {dtype}", in_float32 if dtype == "float32" else in_bfloat16, others)


def vision_reference_need(source: Checkpoint, dtype: str, *others: Alternative) -> ModelNeed:
    """Of a checkpoint's vision tower and text model in torch, with a picture and a question.

    Raises: SourceError or a class below it.
    """
    text = reference_need(source, dtype, PICTURE_TOKENS)
    tower = sum(math.prod(tensor.shape) for name, tensor in source.tensors.items() if "vision" in name)
    n_bytes = text.n_bytes + (4 if dtype == "float32" else 2) * tower + PICTURE_BYTES * PICTURE_PIXELS
    smaller = () if dtype == "bfloat16" else (Alternative("--dtype bfloat16"),)
    return ModelNeed(f"the reference with its vision tower in {dtype}", n_bytes, (*smaller, *others))


def llama_cpp_need(subject: Subject, n_ctx: int, *others: Alternative) -> ModelNeed:
    """Of a GGUF file in llama.cpp.

    Why: beside the mapped file there is a copy of the quantized matrices of the layers, in the order in which its
    kernels want them.
    """
    gguf = subject.gguf
    n_layers, n_heads, *lengths = (
        subject.integer(key) or 0
        for key in (
            Keys.LLM.BLOCK_COUNT,
            Keys.Attention.HEAD_COUNT_KV,
            Keys.Attention.KEY_LENGTH,
            Keys.Attention.VALUE_LENGTH,
        )
    )
    cache = 4 * n_layers * n_heads * sum(lengths) * n_ctx
    logits = 2 * 4 * N_BATCH * subject.sizes.by_word["vocab"]
    copied = sum(
        tensor.n_bytes
        for tensor, rule, bid in subject.known_tensors()
        if bid is not None and rule.storage is Storage.QUANTIZABLE and tensor.qtype.name not in FLOAT_DTYPES
    )
    n_bytes = gguf.file_bytes + copied + cache + logits + LLAMA_BYTES
    return ModelNeed(f"llama.cpp with {gguf.path.name}", n_bytes, others)


def available_bytes() -> int:
    """Memory that can be had without swapping, within the limit of the container.

    Raises: UsageError: psutil is not installed.
    """
    try:
        import psutil
    except ImportError as error:
        raise UsageError(
            "memory cannot be looked up: no module psutil", fix="pip install 'gguf3n[validate]'"
        ) from error
    return min(int(psutil.virtual_memory().available), _container_bytes() or 1 << 62)


def _container_bytes() -> int | None:
    """What is left of a cgroup's limit; file pages that can be dropped count as left."""
    try:
        limit = (CGROUP / "memory.max").read_text()
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return int(limit) - used + int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):  # no cgroup, or no limit: "max"
        return None


def check_memory(needs: Sequence[ModelNeed], *, disk: str = "", notice: Callable[[str], None] | None = None) -> None:
    """Say what the models take, one after the other, and refuse what does not fit.

    Args:
        disk: what else is to be said.
        notice: called with a line.

    Raises: UsageError, with the options that do fit.
    """
    available = available_bytes()
    if notice is not None and needs:
        parts = [
            *(f"{need.what} {gigabytes(need.n_bytes)}" for need in needs),
            disk,
            f"{gigabytes(available)} available",
        ]
        notice(f"memory: {'; '.join(filter(None, parts))}")
    for need in needs:
        if need.n_bytes > available:
            fitting = [str(other) for other in need.alternatives if other.n_bytes <= available]
            raise UsageError(
                f"not enough memory for {need.what}",
                expected=f"about {gigabytes(need.n_bytes)}",
                found=f"{gigabytes(available)} available",
                fix=", or ".join(fitting) or "a machine with more",
            )
