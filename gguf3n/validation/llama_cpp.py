"""llama.cpp in this process: its server, through the xllamacpp wheel."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import GGUFError, UsageError

# more than any vocabulary: the server then returns all of it
_ALL_TOKENS = 1 << 24


class LlamaCpp:
    """A GGUF file that llama.cpp has loaded, on the CPU.

        with LlamaCpp("model.gguf") as model:
            model.generate("The capital of France is", 8)

    Why: keys and values are cached in float32 and flash attention is off, so the file is measured, not the cache.

    Raises: GGUFError: llama.cpp does not load the file. UsageError: xllamacpp is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, n_ctx: int = 2048, n_threads: int | None = None) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise UsageError(
                "llama.cpp cannot be run: no module xllamacpp", fix="pip install 'gguf3n[validate]'"
            ) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(Path(path))
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(n_ctx, 512)
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = n_threads or os.cpu_count() or 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_ram_mib = 0
        params.fit_params = False
        params.warmup = False
        params.verbosity = -1
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise GGUFError(f"{path}: llama.cpp does not load this file", found=str(error).strip()) from error

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        self._server = None

    def next_token_logprobs(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of the token after these.

        Shapes: `[vocab]`.

        Why: the bias makes the server pick a letter, since it may report no distribution beside a token that it does
        not emit; what it reports is taken before the bias.
        """
        return self._next_token_logprobs(token_ids, cache_prompt=False)

    def _next_token_logprobs(self, token_ids: Sequence[int], *, cache_prompt: bool) -> NDArray[np.float32]:
        options = {"n_probs": _ALL_TOKENS, "post_sampling_probs": False, "logit_bias": [["a", 1e4]]}
        choice = self._complete(list(token_ids), 1, cache_prompt=cache_prompt, **options)
        (step,) = choice["logprobs"]["content"]
        entries = step["top_logprobs"]
        logprobs = np.full(len(entries), -np.inf, dtype=np.float32)
        logprobs[[entry["id"] for entry in entries]] = [entry["logprob"] for entry in entries]
        return logprobs

    def logprobs(self, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """For each position of a text the log-probabilities of what follows it.

        Shapes: `[vocab]` a position.

        Why: one request a prefix, for which llama.cpp computes one token and finds the others in its cache.
        """
        for end in range(1, len(token_ids) + 1):
            yield self._next_token_logprobs(token_ids[:end], cache_prompt=end > 1)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the begin mark first and, if `special`, special tokens in the text recognized."""
        request = {"content": text, "add_special": True, "parse_special": special}
        tokens: list[int] = self._post("/tokenize", request)["tokens"]
        return tokens

    def generate(self, prompt: str | Sequence[int], n: int) -> str:
        """At most `n` further tokens, always the most likely one."""
        text: str = self._complete(prompt if isinstance(prompt, str) else list(prompt), n)["text"]
        return text

    def _complete(self, prompt: str | list[int], n: int, **options: Any) -> dict[str, Any]:
        request = {"prompt": prompt, "n_predict": n, "temperature": 0.0, "cache_prompt": False, **options}
        answer = self._server.handle_completions(request)
        if "choices" not in answer:
            raise GGUFError("llama.cpp does not complete this prompt", found=json.dumps(answer)[:500])
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    def _post(self, path: str, request: dict[str, Any]) -> Any:
        """The parts of the server that the wheel does not wrap, over its loopback port."""
        url = self._server.listening_address + path
        headers = {"Content-Type": "application/json"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, json.dumps(request).encode(), headers)) as answer:
            return json.load(answer)
