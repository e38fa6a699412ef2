"""What llama.cpp takes beside the file.

On the CPU with its programs' own settings (keys and values in float16, flash attention, 512 tokens at once, a
sliding-window cache of its own), that is

    keys and values    of the layers that have their own, which are 20 of a Gemma 3n: 2 bytes a number; full layers have
                       a cell a token of the context, sliding ones only for the window and the tokens that are computed
    compute buffer     of 512 tokens at once: logits over the vocabulary, five hidden states, the masks of attention

# measured: 2026-11-22, llama.cpp of xllamacpp 2026.10.11549 with files of E2B's and E4B's shapes, by its own log: keys
# and values 32 + 32 MiB at 4,096 tokens and 256 + 32 MiB at 32,768, compute buffer 537.03 and 565.03 MiB; as below, but
# for 0.03 MiB

Source: llama_kv_cache_iswa and llama_context::sched_reserve of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import aligned
from gguf3n.gemma3n.config import N_KV_LAYERS, SLIDING, Config

RUN_CTX = 4096
"""Tokens of context unless told otherwise."""
N_UBATCH = 512
CELLS = 256
"""Caches have a multiple of so many."""
ITEM_BYTES = 2
"""Of a key, a value, and an element of a mask."""
N_STATES = 5
"""Hidden states of a token in the compute buffer, in float32: AltUp's four and what a layer makes of one."""
PROCESS_BYTES = 100_000_000
"""Of a process that has loaded llama.cpp, and of its smaller buffers."""


@dataclass(frozen=True)
class Runtime:
    """What llama.cpp takes beside the file. Units: bytes; tokens."""

    n_ctx: int
    cache_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.cache_bytes + self.compute_bytes + PROCESS_BYTES


def runtime_of(config: Config, n_ctx: int) -> Runtime:
    """What llama.cpp takes for a context of so many tokens. Raises: UsageError for one that the model does not have."""
    longest = config.max_position_embeddings
    if not 1 <= n_ctx <= longest:
        raise UsageError(f"--ctx {n_ctx}: not a context of this model", expected=f"1 to {longest:,}", found=str(n_ctx))
    n_kv_layers = min(config.n_kv_layers, N_KV_LAYERS)
    n_sliding = config.layer_types[:n_kv_layers].count(SLIDING)
    full_cells = aligned(n_ctx, CELLS)
    n_ubatch = min(N_UBATCH, full_cells)
    window_cells = min(full_cells, aligned(config.sliding_window + n_ubatch, CELLS))
    cells = full_cells * (n_kv_layers - n_sliding) + window_cells * n_sliding
    cell_bytes = ITEM_BYTES * config.num_key_value_heads * 2 * config.head_dim
    token_bytes = 4 * (config.vocab_size + N_STATES * config.hidden_size)
    mask_bytes = ITEM_BYTES * (full_cells + window_cells)
    return Runtime(n_ctx, cell_bytes * cells, n_ubatch * (token_bytes + mask_bytes))
