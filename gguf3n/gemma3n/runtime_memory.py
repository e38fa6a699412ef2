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

from gguf.constants import Keys

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import aligned
from gguf3n.gemma3n.config import N_KV_LAYERS, SLIDING, Config
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.text import ARCH

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


@dataclass(frozen=True)
class _Shape:
    """What it depends on."""

    longest: int
    """Context of the model, in tokens."""
    sliding: tuple[bool, ...]
    """Of each layer that has keys and values of its own."""
    window: int
    n_cell: int
    """Numbers of a token's keys and values in a layer."""
    n_vocab: int
    n_embd: int


def runtime_of(model: Config | Part, n_ctx: int) -> Runtime:
    """What llama.cpp takes for a context of so many tokens.

    Raises: UsageError for one that the model does not have; for a part whose keys do not say what is needed.
    """
    shape = _of_part(model) if isinstance(model, Part) else _of_config(model)
    if not 1 <= n_ctx <= shape.longest:
        raise UsageError(
            f"--ctx {n_ctx}: not a context of this model", expected=f"1 to {shape.longest:,}", found=str(n_ctx)
        )
    n_sliding = sum(shape.sliding)
    full_cells = aligned(n_ctx, CELLS)
    n_ubatch = min(N_UBATCH, full_cells)
    window_cells = min(full_cells, aligned(shape.window + n_ubatch, CELLS))
    cells = full_cells * (len(shape.sliding) - n_sliding) + window_cells * n_sliding
    token_bytes = 4 * (shape.n_vocab + N_STATES * shape.n_embd)
    mask_bytes = ITEM_BYTES * (full_cells + window_cells)
    return Runtime(n_ctx, ITEM_BYTES * shape.n_cell * cells, n_ubatch * (token_bytes + mask_bytes))


def _of_config(config: Config) -> _Shape:
    kinds = config.layer_types[: min(config.n_kv_layers, N_KV_LAYERS)]
    return _Shape(
        longest=config.max_position_embeddings,
        sliding=tuple(kind == SLIDING for kind in kinds),
        window=config.sliding_window,
        n_cell=2 * config.num_key_value_heads * config.head_dim,
        n_vocab=config.vocab_size,
        n_embd=config.hidden_size,
    )


def _of_part(part: Part) -> _Shape:
    """As the keys of its file say; a GGUF file has no config. Raises: UsageError."""
    keys = {key.name: key.value for key in part.keys}

    def number(key: str) -> int:
        value = keys.get(key.format(arch=ARCH))
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(
                f"{part.source.origin}: what llama.cpp takes beside the file is not known",
                expected=f"a number in {key.format(arch=ARCH)}",
                found=str(value),
                fix="give the file's size itself, as in --size 4.2GB",
            )
        return value

    pattern = keys.get(Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=ARCH))
    sliding = [bool(each) for each in pattern] if isinstance(pattern, list | tuple) else []
    n_kv_layers = min(number(Keys.LLM.BLOCK_COUNT) - number(Keys.Attention.SHARED_KV_LAYERS), N_KV_LAYERS)
    head_numbers = number(Keys.Attention.KEY_LENGTH) + number(Keys.Attention.VALUE_LENGTH)
    return _Shape(
        longest=number(Keys.LLM.CONTEXT_LENGTH),
        sliding=tuple((sliding + [False] * n_kv_layers)[:n_kv_layers]),
        window=number(Keys.Attention.SLIDING_WINDOW),
        n_cell=number(Keys.Attention.HEAD_COUNT_KV) * head_numbers,
        n_vocab=next(tensor.n_rows for tensor in part.tensors if tensor.name == "token_embd.weight"),
        n_embd=number(Keys.LLM.EMBEDDING_LENGTH),
    )
