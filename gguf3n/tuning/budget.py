"""How large a file may be: "4.2GB", bits a weight, as large as another quantization, or what memory it has to fit.

4.2GB, 3900 MiB     bytes of the whole file; units of 1000 (KB, MB, GB) and of 1024 (KiB, MiB, GiB)
fits:8GB            the same less what llama.cpp takes beside the file, with a context of some length
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gguf3n.errors import UsageError
from gguf3n.gemma3n.part import Part
from gguf3n.gemma3n.runtime_memory import runtime_of

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
FITS = "fits:"
EXPECTED = f"a number and one of B, KB, MB, GB, KiB, MiB, GiB, as in 4.2GB, or {FITS}8GB"


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
