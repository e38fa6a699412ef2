"""Chat templates rendered in a process of their own, one for all chats of a file.

A template is a program that comes with a file. It may call itself without end, loop for hours, or double a text until
no memory is left; in C++, and within one operation of Python, nothing stops that but the end of the process.

    time      seconds of the processor for each chat, where the system counts them; of a clock everywhere
    memory    on Linux, beside what starting took
    text      so many characters
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from gguf3n.engines.child_process import ANSWER, FAILED, READY, ChildProcess, Ended, TookTooLong, answers, requests
from gguf3n.engines.llama_cpp import MAX_SHOWN
from gguf3n.engines.vocabulary_model import VocabularyServer, write_vocabulary_model
from gguf3n.errors import Gguf3nError, GGUFError, TokenizerError, UsageError
from gguf3n.formats.gguf_reader import GGUFFile

Chat: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages, each with a role and its content."""

SECONDS = 10
"""Of the processor, for one chat. Templates take thousandths; llama.cpp loads the vocabulary with the first.

# measured: 2026-11-21, a Xeon of 2 cores, a vocabulary of 262,144 tokens: 1.4 s
"""
CLOCK_SECONDS = 60
"""For one chat by the clock: the machine may be busy."""
START_SECONDS = 300
"""For loading the packages."""
MEMORY_BYTES = 1 << 30
"""For the texts that a template makes, and llama.cpp's vocabulary.

# measured: 2026-11-21, Linux, a vocabulary of 262,144 tokens: 0.26 GB, with what starting took
"""
MAX_CHARS = 1 << 24
"""Of a rendered chat."""


class TemplateStopped(TokenizerError):
    """A chat template that comes to no end within the limits; `found` says within which."""


class TemplateProcess:
    """A chat template and who renders it, in a process that starts with the first chat and ends with `close`.

    Args:
        name: of the file, in messages.
        options: of the process; see RENDERERS.
        directory: what it needs, removed at the end.
    """

    def __init__(self, name: str, options: Mapping[str, Any], directory: str | None = None) -> None:
        self._name = name
        self._options = {"name": name, "seconds": SECONDS, "memory_bytes": MEMORY_BYTES, **options}
        self._directory = directory
        self._child: ChildProcess | None = None
        self._stopped: str | None = None

    def render(self, chat: Chat) -> str:
        """A chat up to where the model is to speak; from llama.cpp without the begin token, where it is added later.

        Raises: TokenizerError or GGUFError: the template fails or refuses the chat. TemplateStopped: here, and for all
            chats after it. UsageError: a package is not installed.
        """
        if self._stopped is None:
            try:
                return self._render(chat)
            except TookTooLong as error:
                self._stopped = f"takes {error}"
            except Ended as error:
                self._stopped = f"takes more than {SECONDS} s" if _is_time(error) else f"ends its process ({error})"
            except TemplateStopped as error:
                self._stopped = error.found
            self._end()
        raise TemplateStopped(f"{self._name}: the chat template is given up", found=self._stopped)

    def _render(self, chat: Chat) -> str:
        if self._child is None:
            self._child = self._started()
        self._child.send({"chat": [dict(message) for message in chat]})
        answer = json.loads(self._child.receive(ANSWER, CLOCK_SECONDS))
        if "stopped" in answer:
            raise TemplateStopped(self._name, found=answer["stopped"])
        return str(answer["text"])

    def _started(self) -> ChildProcess:
        """Why no TemplateStopped: no template has been looked at yet."""
        try:
            child = ChildProcess(__name__, self._options)
            try:
                child.receive(READY, START_SECONDS)
            except BaseException:
                child.close()
                raise
        except (Ended, TookTooLong) as error:
            raise UsageError(f"{self._name}: the process that renders chats does not start", found=str(error)) from None
        return child

    def _end(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None

    def close(self) -> None:
        """Ends the process."""
        self._end()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def jinja_process(name: str, template: str, special_tokens: Mapping[str, Any]) -> TemplateProcess:
    """A template as transformers renders it.

    Args:
        special_tokens: texts by name, as in bos_token.
    """
    return TemplateProcess(name, {"renderer": "jinja", "template": template, "special_tokens": special_tokens})


def llama_cpp_process(gguf: GGUFFile) -> TemplateProcess:
    """A file's template as llama.cpp's server renders it; one that it can't read is an error of the first chat.

    Raises: GGUFError; OutputError.
    """
    directory = tempfile.mkdtemp(prefix="gguf3n-")
    try:
        model = Path(directory) / "vocabulary.gguf"
        write_vocabulary_model(gguf, model, with_template=True)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return TemplateProcess(str(gguf.path), {"renderer": "llama.cpp", "model": str(model)}, directory)


def _is_time(error: Ended) -> bool:
    return hasattr(signal, "SIGXCPU") and error.code == -signal.SIGXCPU


# in the process

Renderer: TypeAlias = Callable[[Chat], str]


def main() -> None:
    """What the process does: load the packages, then render a chat at a time."""
    asked = requests()
    with answers() as send:
        given = next(asked)
        render = RENDERERS[given["renderer"]](given)
        _limit_memory(given["memory_bytes"])
        send(READY)
        for request in asked:
            _limit_time(given["seconds"])
            kind, answer = _answer(render, request["chat"], given)
            send(kind, json.dumps(answer).encode())


def _answer(render: Renderer, chat: Chat, given: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    try:
        text = render(chat)
        if len(text) <= MAX_CHARS:
            return ANSWER, {"text": text}
        stopped = f"makes more than {MAX_CHARS:,} characters of a short chat"
    except MemoryError:
        stopped = f"takes more than {given['memory_bytes']:,} bytes of memory"
    except RecursionError:
        stopped = "calls itself without end"
    except Gguf3nError as error:
        return FAILED, error.as_dict()
    except Exception as error:  # whatever a template does
        failed = TokenizerError(f"{given['name']}: the chat template fails", found=str(error)[:MAX_SHOWN])
        return FAILED, failed.as_dict()
    return ANSWER, {"stopped": stopped}


def _jinja(given: Mapping[str, Any]) -> Renderer:
    sys.modules["torch"] = None  # type: ignore[assignment] # as if it were not installed: loading it takes seconds
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise UsageError(
            "the chat template cannot be rendered: no module transformers", fix="pip install 'gguf3n[validate]'"
        ) from error

    def render(chat: Chat) -> str:
        (text,), _ = render_jinja_template(
            [chat], chat_template=given["template"], add_generation_prompt=True, **given["special_tokens"]
        )
        return str(text)

    return render


def _llama_cpp(given: Mapping[str, Any]) -> Renderer:
    """Why the vocabulary is not loaded at once: llama.cpp tries the template when it loads it."""
    import xllamacpp  # noqa: F401 (its memory is not the template's)

    server: list[VocabularyServer] = []

    def render(chat: Chat) -> str:
        try:
            if not server:
                server.append(VocabularyServer(Path(given["model"]), given["name"], with_template=True))
            return server[0].render(chat)
        except GGUFError as error:
            if "bad_alloc" in (error.found or ""):
                raise MemoryError from error
            raise

    return render


RENDERERS: Mapping[str, Callable[[Mapping[str, Any]], Renderer]] = {"jinja": _jinja, "llama.cpp": _llama_cpp}
"""What renders, by name; each takes the options, and is loaded before memory is limited."""


def _limit_time(seconds: int) -> None:
    """Allows so many seconds of the processor from now on. Why nothing on Windows: it counts none for us."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource, resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + seconds)
    _limit(resource, resource.RLIMIT_CORE, 0)


def _limit_memory(n_bytes: int) -> None:
    """Allows so many bytes more. Why only Linux: other systems hold no process to a limit of its data."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except (ImportError, OSError, ValueError):
        return
    _limit(resource, resource.RLIMIT_DATA, pages * os.sysconf("SC_PAGE_SIZE") + n_bytes)


def _limit(resource: Any, kind: int, value: int) -> None:
    """Why only the soft limit: it can be raised again for the next chat."""
    _, most = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))
