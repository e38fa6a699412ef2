"""llama.cpp, however it can be reached: its C API, its server in this process, or a server that is running elsewhere.

    open_llama_cpp(path)   the C API (llama_library), or the server where the wheel's C API is of another version
    LlamaProcess(path)     the same in a process of its own (llama_process), which may abort
    LlamaCpp(path)         the server in this process, through the xllamacpp wheel; also tokenizes and generates
    LlamaServer(url)       a llama-server by its address

All give the log-probabilities of the whole vocabulary. A server returns them as the candidates for one generated token,
so it is asked once a position, with the text up to there.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gguf3n.engines.llama_library import LlamaLibrary, UnknownLayout
from gguf3n.errors import GGUFError, UsageError
from gguf3n.formats.transport import Clock, Redirects, checked_address, content_length, opener, origin
from gguf3n.outside import masked
from gguf3n.workers import processors

# more than any vocabulary: the server then returns all of it
_ALL_TOKENS = 1 << 24

ALL_CANDIDATES: dict[str, Any] = {
    "n_predict": 1,
    "temperature": 0.0,
    "n_probs": _ALL_TOKENS,
    "post_sampling_probs": False,
    "logit_bias": [["a", 1e4]],
}
"""What makes a server report the distribution over the whole vocabulary.

Why: the bias makes it pick a letter, since it may report no distribution beside a token that it does not emit; what it
reports is taken before the bias.
"""

TIMEOUT_SECONDS = 600
"""For one answer of a server elsewhere, from the request to its last byte; a large prompt on a slow machine takes
minutes."""

MAX_ANSWER_BYTES = 1 << 28
"""Of one answer; all candidates of Gemma 3n's vocabulary take about 30 million."""

MAX_SHOWN = 500
"""Characters of an answer in a message."""

KEY_VARIABLE = "LLAMA_API_KEY"
"""Where llama-server itself looks for the key it demands."""


class Engine(Protocol):
    """What runs a model over a text."""

    name: str

    def logprobs(self, token_ids: Sequence[int], *, first: int = 0) -> Iterator[NDArray[np.float32]]:
        """For each position of a text, from `first` on, the log-probabilities of what follows it.

        Shapes: `[vocab]` a position.
        """
        ...

    def close(self) -> None:
        """Frees the model."""
        ...


def open_llama_cpp(
    path: str | os.PathLike[str], *, n_ctx: int = 512, n_threads: int | None = None
) -> LlamaLibrary | LlamaCpp:
    """A GGUF file in llama.cpp in this process, on the CPU.

    Raises: GGUFError: llama.cpp does not load the file. UsageError: xllamacpp is not installed.
    """
    try:
        return LlamaLibrary(path, n_ctx=n_ctx, n_threads=n_threads or processors())
    except UnknownLayout:
        return LlamaCpp(path, n_ctx=n_ctx, n_threads=n_threads)


class LlamaCpp:
    """A GGUF file that llama.cpp's server has loaded in this process, on the CPU.

        with LlamaCpp("model.gguf") as model:
            model.generate("The capital of France is", 8)

    Args:
        mmproj: the encoders' file, to see pictures.

    Why: keys and values are cached in float32 and flash attention is off, so the file is measured, not the cache.

    Raises: GGUFError: llama.cpp does not load the file. UsageError: xllamacpp is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mmproj: str | os.PathLike[str] | None = None,
        n_ctx: int = 2048,
        n_threads: int | None = None,
    ) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise UsageError(
                "llama.cpp cannot be run: no module xllamacpp", fix="pip install 'gguf3n[validate]'"
            ) from error
        self.name = f"llama.cpp's server, xllamacpp {xllamacpp.__version__}"
        params = xllamacpp.CommonParams()
        params.model.path = str(Path(path))
        if mmproj is not None:
            params.mmproj.path = str(Path(mmproj))
            params.mmproj_use_gpu = False
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = min(n_ctx, 512)
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = n_threads or processors()
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_ram_mib = 0
        params.fit_params = False
        params.warmup = False
        params.verbosity = -1
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            both = "" if mmproj is None else f" with {mmproj}"
            raise GGUFError(f"{path}{both}: llama.cpp does not load this file", found=str(error).strip()) from error

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model."""
        self._server = None

    @property
    def url(self) -> str:
        """Where the server listens, on the loopback interface."""
        address: str = self._server.listening_address
        return address

    def next_token_logprobs(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Log-probabilities of the token after these.

        Shapes: `[vocab]`.
        """
        return self._next_token_logprobs(token_ids, cache_prompt=False)

    def _next_token_logprobs(self, token_ids: Sequence[int], *, cache_prompt: bool) -> NDArray[np.float32]:
        choice = self._complete(list(token_ids), **ALL_CANDIDATES, cache_prompt=cache_prompt)
        (step,) = choice["logprobs"]["content"]
        return _distribution(step["top_logprobs"])

    def logprobs(self, token_ids: Sequence[int], *, first: int = 0) -> Iterator[NDArray[np.float32]]:
        """For each position of a text, from `first` on, the log-probabilities of what follows it.

        Shapes: `[vocab]` a position.

        Why: one request a prefix, for which llama.cpp computes one token and finds the others in its cache.
        """
        for end in range(first + 1, len(token_ids) + 1):
            yield self._next_token_logprobs(token_ids[:end], cache_prompt=end > first + 1)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids, with the begin mark first and, if `special`, special tokens in the text recognized."""
        request = {"content": text, "add_special": True, "parse_special": special}
        tokens: list[int] = post(f"{self.url}/tokenize", request)["tokens"]
        return tokens

    def generate(self, prompt: str | Sequence[int], n: int) -> str:
        """At most `n` further tokens, always the most likely one."""
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        text: str = self._complete(prompt, n_predict=n, temperature=0.0, cache_prompt=False)["text"]
        return text

    def _complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        answer = self._server.handle_completions({"prompt": prompt, **options})
        if "choices" not in answer:
            raise GGUFError("llama.cpp does not complete this prompt", found=json.dumps(answer)[:500])
        choice: dict[str, Any] = answer["choices"][0]
        return choice


class LlamaServer:
    """A llama-server that is running, by its address; its cache and its device are what it was started with.

    Args:
        url: as in "http://127.0.0.1:8080".

    Raises: UsageError: no address, or nothing answers there; a server that is no llama-server, that refuses the
        request (a key is taken from the variable LLAMA_API_KEY), or that does not return the whole vocabulary.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--server {url}: not an address", expected="one like http://127.0.0.1:8080")
        self.url = url.rstrip("/")
        self.name = f"llama-server at {masked(self.url)}"
        self._get("/health")

    def close(self) -> None:
        """The server goes on running."""

    def logprobs(self, token_ids: Sequence[int], *, first: int = 0) -> Iterator[NDArray[np.float32]]:
        """For each position of a text, from `first` on, the log-probabilities of what follows it.

        Shapes: `[vocab]` a position.
        """
        for end in range(first + 1, len(token_ids) + 1):
            request = {"prompt": [int(i) for i in token_ids[:end]], "cache_prompt": True, **ALL_CANDIDATES}
            yield self._distribution(self._get("/completion", request))

    def sees(self) -> bool:
        """Whether it was started with a vision encoder."""
        return bool(self._properties().get("modalities", {}).get("vision"))

    def logprobs_after_picture(self, before: str, png: bytes, after: str) -> NDArray[np.float32]:
        """Log-probabilities of the token after a text with a picture in it.

        Shapes: `[vocab]`.
        """
        # servers of before 2026 have one marker for all
        marker = self._properties().get("media_marker", "<__media__>")
        prompt = {"prompt_string": f"{before}{marker}{after}", "multimodal_data": [base64.b64encode(png).decode()]}
        return self._distribution(self._get("/completion", {"prompt": prompt, "cache_prompt": True, **ALL_CANDIDATES}))

    def _properties(self) -> dict[str, Any]:
        properties = self._get("/props")
        return properties if isinstance(properties, dict) else {}

    def _distribution(self, answer: Any) -> NDArray[np.float32]:
        try:
            (step,) = answer["completion_probabilities"]
            return _distribution(step["top_logprobs"])
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise UsageError(
                f"{self.url}: the server does not return the whole vocabulary's probabilities",
                expected="completion_probabilities with every token's logprob, as llama-server's /completion has them",
                found=masked(json.dumps(answer))[:MAX_SHOWN],
            ) from error

    def _get(self, path: str, request: dict[str, Any] | None = None) -> Any:
        try:
            return post(self.url + path, request)
        except urllib.error.HTTPError as error:
            raise UsageError(
                f"{self.url}{path}: the server refuses",
                found=f"{error.code} {error.reason}: {said(error)}",
                fix=f"is it a llama-server, with a model loaded and a context that is large enough? "
                f"A key that it demands is taken from {KEY_VARIABLE}",
            ) from error
        except (ValueError, RecursionError, http.client.HTTPException) as error:
            # no address, or no JSON; no HTTP, or half an answer
            raise UsageError(
                f"{self.url}{path}: not a llama-server", found=str(error).strip(), fix="correct --server"
            ) from error
        except OSError as error:  # URLError, a connection that breaks off, a time-out
            reason = getattr(error, "reason", None) or error
            raise UsageError(
                f"{self.url}: no answer", found=str(reason), fix="start llama-server, or correct --server"
            ) from error


def _distribution(candidates: Sequence[dict[str, Any]]) -> NDArray[np.float32]:
    """A server's list of candidates, in the order of their ids. Raises: ValueError: some token is missing."""
    ids = np.array([candidate["id"] for candidate in candidates], dtype=np.int64)
    logprobs = np.full(len(ids), np.nan, dtype=np.float32)
    if not len(ids) or ids.min() < 0 or ids.max() >= len(ids):
        raise ValueError("some of the vocabulary is missing")
    logprobs[ids] = [candidate["logprob"] for candidate in candidates]
    if np.isnan(logprobs).any():
        raise ValueError("some of the vocabulary is missing")
    return logprobs


def said(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says to a request that it refuses."""
    try:
        body = error.read(8 * MAX_SHOWN)
    except (OSError, http.client.HTTPException):
        return "no more"
    finally:
        error.close()
    return masked(" ".join(body.decode(errors="replace").split()))[:MAX_SHOWN]


class _SameOrigin(Redirects):
    """Why: the key and the text are for the server that the user has named."""

    def followed(self, request: urllib.request.Request, target: str, code: int) -> urllib.request.Request:
        if origin(request.full_url) != origin(target):
            raise UsageError(
                f"{request.full_url}: the server redirects to another origin",
                expected="an answer; a key and a text are not taken elsewhere",
                found=f"{code} to {target}",
                fix="give --server that address, if it is to be trusted",
            )
        data = request.data if code in (307, 308) else None
        return urllib.request.Request(target, data, dict(request.headers))


def post(url: str, request: dict[str, Any] | None) -> Any:
    """A server's JSON answer, to GET where there is no request; no proxy stands between.

    Raises: UsageError: a redirect to another origin; ValueError: no address, or no JSON; what urllib raises.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE, "").strip():
        headers["Authorization"] = f"Bearer {key}"
    data = None if request is None else json.dumps(request).encode()
    clock = Clock()
    clock.start(TIMEOUT_SECONDS)
    ask = opener(clock, urllib.request.ProxyHandler({}), _SameOrigin())
    asked = urllib.request.Request(checked_address(url), data, headers)
    with ask.open(asked, timeout=TIMEOUT_SECONDS) as answer:
        content_length(answer.headers)
        body = answer.read(MAX_ANSWER_BYTES + 1)
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
    return json.loads(body)
