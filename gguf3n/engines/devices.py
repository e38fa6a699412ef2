"""What the reference can be run on and computed in, known without torch."""

from __future__ import annotations

from gguf3n.errors import UsageError

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")


def check_words(device: str, dtype: str) -> None:
    """Raises: UsageError for other words, whether or not torch is there."""
    for name, value, known in (("dtype", dtype, DTYPES), ("device", device, DEVICES)):
        if value not in known:
            raise UsageError(f"{name} {value!r}", expected=" or ".join(known))
