"""Which model in which quantization fits, and which of those to take first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gguf3n.deciding import Estimate, estimate
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.gemma3n.runtime_memory import RUN_CTX, Runtime, runtime_of
from gguf3n.recipes import Recipe, find_recipe

LADDER = tuple(
    (size, name)
    for size, names in (
        ("E4B", ("Q8_0", "UD-Q6_K_XL", "Q5_K_M", "Q4_K_M")),
        ("E2B", ("UD-Q6_K_XL", "Q5_K_M", "Q4_K_M", "IQ3_M", "UD-IQ2_M")),
    )
    for name in names
)
"""What to take, the best first: E4B as long as four bits of it fit, else E2B in as many bits as fit.

Why: a rule of thumb; the two sizes have not been measured against each other in few bits.
"""


@dataclass(frozen=True)
class Limit:
    """How large a file may be; None where that does not matter.

    Args:
        file_bytes: of the file alone.
        memory_bytes: of the file and what llama.cpp takes beside it, on the CPU.
        n_ctx: tokens of context for that.
    """

    file_bytes: int | None = None
    memory_bytes: int | None = None
    n_ctx: int = RUN_CTX

    def allows(self, size: str, found: Estimate) -> bool:
        """Raises: UsageError for a context that the model does not have."""
        if self.file_bytes is not None and found.total_bytes > self.file_bytes:
            return False
        return self.memory_bytes is None or self.need(size, found) <= self.memory_bytes

    def need(self, size: str, found: Estimate) -> int:
        """Bytes that are to fit: of the file, and of all that llama.cpp takes where memory matters."""
        beside = 0 if self.memory_bytes is None else self.runtime(size).total_bytes
        return found.total_bytes + beside

    def runtime(self, size: str) -> Runtime:
        """What is taken beside the file of a published size. Raises: UsageError."""
        return runtime_of(PUBLISHED[size], self.n_ctx)


def estimates(recipe: Recipe) -> Mapping[str, Estimate]:
    """What a recipe makes of each published size that it is for."""
    return {
        size: estimate(recipe, config)
        for size, config in PUBLISHED.items()
        if recipe.n_layers in (None, config.num_hidden_layers)
    }


@dataclass(frozen=True)
class Choice:
    """A published size and its quantization."""

    size: str
    quant: str
    estimate: Estimate


def choices(limit: Limit) -> Iterator[Choice]:
    """What of the ladder fits, the best first. Raises: UsageError for a context that the models do not have."""
    for size, name in LADDER:
        found = estimate(find_recipe(name), PUBLISHED[size])
        if limit.allows(size, found):
            yield Choice(size, name, found)
