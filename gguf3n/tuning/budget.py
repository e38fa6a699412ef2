"""How large a file may be: "4.2GB", bits a weight, as large as another quantization, or what memory it has to fit.

    4.2GB, 3900 MiB     bytes of the whole file; units of 1000 (KB, MB, GB) and of 1024 (KiB, MiB, GiB)
    fits:8GB            the same less what llama.cpp takes beside the file, with a context of some length

llama.cpp, on the CPU with its programs' own settings (keys and values in float16, flash attention, 512 tokens at once,
a sliding-window cache of its own), takes

    keys and values    of the layers that have their own, which are 20 of a Gemma 3n: 2 bytes a number; full layers have
                       a cell a token of the context, sliding ones only for the window and the tokens that are computed
    compute buffer     of 512 tokens at once: logits over the vocabulary, five hidden states, the masks of attention

# measured: 2026-11-22, llama.cpp of xllamacpp 2026.10.11549 with files of E2B's and E4B's shapes, by its own log: keys
# and values 32 + 32 MiB at 4,096 tokens and 256 + 32 MiB at 32,768, compute buffer 537.03 and 565.03 MiB; as below, but
# for 0.03 MiB

Source: llama_kv_cache_iswa and llama_context::sched_reserve of llama.cpp.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gguf.constants import Keys

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import aligned
from gguf3n.gemma3n.config import N_KV_LAYERS
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.text import ARCH

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
FITS = "fits:"
EXPECTED = f"a number and one of B, KB, MB, GB, KiB, MiB, GiB, as in 4.2GB, or {FITS}8GB"

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
class Budget:
    """Bytes of a whole file, and how that was asked for."""

    n_bytes: int
    said: str


def parse_size(text: str) -> tuple[bool, int]:
    """Whether it is memory to fit, and bytes, rounded down. Raises: UsageError."""
    is_memory = text.strip().lower().startswith(FITS)
    amount = text.strip()[len(FITS) :] if is_memory else text
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?|\.[0-9]{1,15})\s*([A-Za-z]+)\s*", amount)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"--size {text}: not a size", expected=EXPECTED, found=text)
    n_bytes = math.floor(float(match[1]) * unit)
    if n_bytes < 1:
        raise UsageError(f"--size {text}: nothing fits into that", expected="more than a byte", found=text)
    return is_memory, n_bytes


def size_budget(text: str, part: Part, n_ctx: int) -> Budget:
    """Of --size. Raises: UsageError; SourceError for a source whose keys do not say what is needed."""
    is_memory, memory = parse_size(text)
    if not is_memory:
        return Budget(memory, text.strip())
    runtime = runtime_of(part, n_ctx)
    if memory <= runtime.total_bytes:
        raise UsageError(
            f"--size {text}: nothing is left for the file",
            expected=f"more than the {runtime.total_bytes:,} bytes that llama.cpp takes beside it with --ctx {n_ctx}",
            found=f"{memory:,} bytes",
            fix="give more memory, or a smaller --ctx",
        )
    said = f"{text.strip()} with {n_ctx:,} tokens, for which llama.cpp takes {runtime.total_bytes:,} bytes"
    return Budget(memory - runtime.total_bytes, said)


def bits_budget(bits: float, n_weights: int, overhead: int) -> Budget:
    """Of --bpw: bits of tensor data a weight, as --dry-run prints them.

    Args:
        overhead: bytes of a file that are no tensor data.

    Raises: UsageError.
    """
    if not (math.isfinite(bits) and 0 < bits <= 32):
        raise UsageError(f"--bpw {bits:g}: not bits a weight", expected="more than 0 and at most 32", found=f"{bits:g}")
    return Budget(math.floor(bits * n_weights / 8) + overhead, f"{bits:g} bits a weight")


def runtime_of(part: Part, n_ctx: int) -> Runtime:
    """What llama.cpp takes for a context of so many tokens. Raises: UsageError."""
    keys = {key.name: key.value for key in part.keys}

    def number(key: str) -> int:
        value = keys.get(key.format(arch=ARCH))
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(
                f"{part.source.origin}: what --size {FITS} needs is not known",
                expected=f"a number in {key.format(arch=ARCH)}",
                found=str(value),
                fix="give the file's size itself, as in --size 4.2GB",
            )
        return value

    longest = number(Keys.LLM.CONTEXT_LENGTH)
    if not 1 <= n_ctx <= longest:
        raise UsageError(f"--ctx {n_ctx}: not a context of this model", expected=f"1 to {longest:,}", found=str(n_ctx))
    pattern = keys.get(Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=ARCH))
    sliding = list(pattern) if isinstance(pattern, list | tuple) else []
    n_layers = number(Keys.LLM.BLOCK_COUNT)
    n_kv_layers = min(n_layers - number(Keys.Attention.SHARED_KV_LAYERS), N_KV_LAYERS)
    n_sliding = sum(map(bool, sliding[:n_kv_layers]))
    full_cells = aligned(n_ctx, CELLS)
    n_ubatch = min(N_UBATCH, full_cells)
    window_cells = min(full_cells, aligned(number(Keys.Attention.SLIDING_WINDOW) + n_ubatch, CELLS))
    head_numbers = number(Keys.Attention.KEY_LENGTH) + number(Keys.Attention.VALUE_LENGTH)
    cell_bytes = ITEM_BYTES * number(Keys.Attention.HEAD_COUNT_KV) * head_numbers
    cells = full_cells * (n_kv_layers - n_sliding) + window_cells * n_sliding
    n_vocab = next(tensor.n_rows for tensor in part.tensors if tensor.name == "token_embd.weight")
    token_bytes = 4 * (n_vocab + N_STATES * number(Keys.LLM.EMBEDDING_LENGTH))
    mask_bytes = ITEM_BYTES * (full_cells + window_cells)
    return Runtime(n_ctx, cell_bytes * cells, n_ubatch * (token_bytes + mask_bytes))
