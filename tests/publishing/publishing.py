"""What tests of publications share: the loopback Hub, and the call in this process or in one that is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

REPO = "me/micro-GGUF"
QUANTS = ("Q8_0", "Q4_0", "Q4_K_M@llama.cpp")
NAMES = ("micro-Q8_0.gguf", "micro-Q4_0.gguf", "micro-llama.cpp-Q4_K_M.gguf")


def publish_and_die(directory: str, endpoint: str, kill_at: int | None) -> None:
    """Publish in a process of its own, which is killed at its n-th rename, half of the time before it."""
    os.chdir(directory)
    os.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": f"{directory}/hf", "HF_TOKEN": "t"}
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    import gguf3n

    rename, n = os.replace, 0

    def counted(*args: Any, **options: Any) -> None:
        nonlocal n
        n += 1
        if n == kill_at and n % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args, **options)
        if n == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    gguf3n.publish("micro", REPO, QUANTS, validate="tensors", despite_findings=True, threads=1, command=["x"])
    Path("renames").write_text(str(n))
