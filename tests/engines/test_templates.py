"""Chat templates that come to no end: each is one error within its limits, in both engines."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import gguf3n
from gguf3n.engines import child_process, template_process
from gguf3n.engines.template_process import (
    MAX_CHARS,
    TemplateProcess,
    TemplateStopped,
    jinja_process,
    llama_cpp_process,
)
from gguf3n.errors import GGUFError, TokenizerError, UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.gemma3n.source import open_source
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.result import Verdict
from gguf3n.validation.texts import CHATS
from gguf3n.validation.tokens import check_tokens
from tests import micro
from tests.validation.plant_keys import TEMPLATE, set_key

pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")

SOUND = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
CHAT = CHATS["chat without a system message"]

MACRO = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
LOOPS = "{% for a in range(90000) %}" * 3 + "{% endfor %}" * 3
LONG = "{% for i in range(20000) %}" + "x" * 1000 + "{% endfor %}"
NESTED = "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"

HOSTILE: dict[str, tuple[str, str, str]] = {
    "calls itself": (MACRO, "calls itself without end", "ends its process"),
    "doubles a text": (DOUBLED, "bytes of memory", "takes more than"),
    "loops in loops": (LOOPS, "takes more than 1 s", "takes more than 1 s"),
    "a long text": (LONG, f"more than {MAX_CHARS:,} characters", "takes more than 1 s|characters"),
    "deep brackets": (NESTED, "calls itself without end", "ends its process"),
}
"""Template, why it is given up in transformers and in llama.cpp."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is left behind."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert [path.name for path in directory.iterdir() if not path.name.startswith("torchinductor")] == []  # torch's own


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return micro.make(tmp_path / "source")


@pytest.fixture
def in_llama_cpp(checkpoint: Path, tmp_path: Path) -> Callable[[str], TemplateProcess]:
    """A file with a template, to be rendered by llama.cpp."""
    (done,) = gguf3n.convert(checkpoint, "F16", tmp_path / "x.gguf")

    def make(template: str) -> TemplateProcess:
        set_key(done.path, TEMPLATE, "string", template)
        return llama_cpp_process(open_gguf(done.path))

    return make


def in_jinja(template: str) -> TemplateProcess:
    return jinja_process("x", template, {"bos_token": "<bos>"})


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template(
    name: str, in_llama_cpp: Callable[[str], TemplateProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1)
    monkeypatch.setattr(template_process, "MEMORY_BYTES", 1 << 28)
    template, *said = HOSTILE[name]
    for make, expected in zip((in_jinja, in_llama_cpp), said, strict=True):
        with closing(make(template)) as templates:
            for _ in range(2):  # the second time without trying again
                with pytest.raises(TemplateStopped, match="given up") as error:
                    templates.render(CHAT)
                assert error.match(expected)


def test_one_process_for_all_chats(in_llama_cpp: Callable[[str], TemplateProcess]) -> None:
    for make, begin in ((in_jinja, "<bos>"), (in_llama_cpp, "")):
        with closing(make(SOUND)) as templates:
            said = {name: templates.render(chat) for name, chat in CHATS.items()}
            processes = {id(templates._child)}
            assert {templates.render(CHAT) for _ in range(3)} == {said["chat without a system message"]}
            assert {id(templates._child)} == processes
        plain = {name: chat for name, chat in CHATS.items() if "list" not in name}
        for name, chat in plain.items():
            lines = "".join(f"{message['role']}: {message['content']}\n" for message in chat)
            assert said[name].split() == (begin + lines).split()


def test_a_template_that_fails_is_no_end(in_llama_cpp: Callable[[str], TemplateProcess]) -> None:
    refuses = "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}" + SOUND
    for make, error in ((in_jinja, TokenizerError), (in_llama_cpp, GGUFError)):
        with closing(make(refuses)) as templates:
            with pytest.raises(error, match="too many"):
                templates.render(CHATS["chat"])
            assert "user: " in templates.render(CHAT)


def test_a_large_template() -> None:
    """Larger than an argument of a program may be."""
    with closing(in_jinja("{# " + "x" * 500_000 + " #}" + SOUND)) as templates:
        assert templates.render(CHAT).startswith("<bos>user: ")


def test_torch_is_not_loaded() -> None:
    """It would take seconds and most of the memory."""
    with closing(in_jinja(SOUND)) as templates:
        templates.render(CHAT)
        assert templates._child is not None
        maps = Path(f"/proc/{templates._child.pid}/maps")
        if maps.exists():
            assert "torch" not in maps.read_text()


def test_a_process_that_does_not_start_is_no_fault_of_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "PROGRAM", "import sys; sys.exit('no such thing')")
    with closing(in_jinja(SOUND)) as templates, pytest.raises(UsageError, match="does not start") as error:
        templates.render(CHAT)
    assert "no such thing" in str(error.value)


def test_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system counts no seconds of the processor."""
    monkeypatch.setattr(template_process, "SECONDS", 1000)
    monkeypatch.setattr(template_process, "CLOCK_SECONDS", 1)
    with closing(in_jinja(LOOPS)) as templates, pytest.raises(TemplateStopped, match="takes more than 1 s"):
        templates.render(CHAT)


@pytest.mark.skipif(sys.platform == "win32", reason="a process sends itself no Ctrl-C there")
def test_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1000)
    with closing(in_jinja(LOOPS)) as templates:
        timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            templates.render(CHAT)
        timer.join()


def test_the_verdict(checkpoint: Path, in_llama_cpp: Callable[[str], TemplateProcess], tmp_path: Path) -> None:
    """Of a file whose template comes to no end, as its source's does; and of one whose source's alone does."""

    def problems() -> list[tuple[Verdict, str]]:
        result = check_tokens(Candidate(tmp_path / "x.gguf"), open_source(checkpoint))
        assert {problem.where for problem in result.problems} <= {TEMPLATE}
        return [(problem.verdict, problem.what) for problem in result.problems]

    in_llama_cpp(MACRO).close()
    ((verdict, what),) = problems()
    assert verdict is Verdict.FAIL and "llama.cpp" in what and "ends its process" in what
    (checkpoint / "chat_template.jinja").write_text(MACRO)
    (first, of_reference), (second, _) = problems()
    assert (first, second) == (Verdict.WARN, Verdict.FAIL)
    assert of_reference == "chats are not compared: the reference's template calls itself without end"
    in_llama_cpp(SOUND).close()
    assert problems() == [(Verdict.WARN, of_reference)]
