"""llama.cpp that sees: a text model and its mmproj file in llama.cpp's server, in a process of its own.

llama.cpp aborts on an mmproj file whose types it cannot compute with, some at the first picture; that is an error here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.llama_cpp import LlamaCpp, LlamaServer
from gguf3n.engines.llama_process import READY, EngineProcess, serve
from gguf3n.errors import UsageError


class VisionProcess(EngineProcess):
    """A text model with a vision encoder, which llama.cpp has loaded on the CPU.

    Args:
        text: the text model's file.
        mmproj: the encoders' file, named in errors.

    Raises: GGUFError: llama.cpp does not load the files, or aborts. UsageError: xllamacpp is not installed.
    """

    def __init__(
        self,
        text: str | os.PathLike[str],
        mmproj: str | os.PathLike[str],
        *,
        n_ctx: int = 1024,
        n_threads: int | None = None,
    ) -> None:
        options = {"path": str(text), "mmproj": str(mmproj), "n_ctx": n_ctx, "n_threads": n_threads}
        super().__init__(Path(mmproj), __name__, options)
        self._server = LlamaServer(self.ready["url"])

    def logprobs_after_picture(self, before: str, png: bytes, after: str) -> NDArray[np.float32]:
        """Log-probabilities of the token after a text with a picture in it.

        Shapes: `[vocab]`.

        Raises: GGUFError: llama.cpp aborts.
        """
        try:
            return self._server.logprobs_after_picture(before, png, after)
        except UsageError:
            if self.has_ended():
                raise self._ended() from None
            raise


def main(options: str) -> None:
    """What the process does: load both files, and answer by HTTP until its input ends.

    Args:
        options: those of `LlamaCpp`, as JSON.
    """

    def load(send: Callable[[int, bytes], None]) -> None:
        with LlamaCpp(**json.loads(options)) as model:
            send(READY, json.dumps({"name": model.name, "url": model.url}).encode())
            sys.stdin.buffer.read()

    serve(load)
