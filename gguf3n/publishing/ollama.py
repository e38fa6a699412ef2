"""What Ollama wants beside a file: a Modelfile to create a model from, and three small files that the Hub gives to it.

    Modelfile   ollama create NAME -f Modelfile
    template    the chat template in Go's language, for `ollama run hf.co/ORG/REPO`
    params      parameters as JSON, for the same
    system      a system message, where one is wanted

From version 0.30 Ollama runs llama.cpp, which renders the file's own template; before, and from the Hub, chat takes
TEMPLATE. It says what Gemma's own says, but for white space around a message, which Go's language can't trim.

Source: parser/parser.go and template/template.go of Ollama; hub-docs, ollama.md.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from gguf3n.errors import SourceError, TokenizerError, UsageError
from gguf3n.formats.gguf_reader import GGUFFile, open_gguf
from gguf3n.formats.small_file import MAX_VALUE_BYTES, read_text
from gguf3n.formats.whole_file import check_not_input, check_output, make_directory, write_whole
from gguf3n.gemma3n.text import ARCH
from gguf3n.inspection.lint import Group, lint_file
from gguf3n.inspection.summary import architecture
from gguf3n.publishing.terms import SENTENCE

TEMPLATE = """\
{{- $system := "" }}
{{- range $i, $message := .Messages }}
{{- $is_last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "system" }}{{ $system = printf "%s\\n\\n" .Content }}
{{- else if eq .Role "assistant" }}<start_of_turn>model
{{ .Content }}{{ if not $is_last }}<end_of_turn>
{{ end }}
{{- else }}<start_of_turn>{{ .Role }}
{{ $system }}{{ $system = "" }}{{ .Content }}<end_of_turn>
{{ end }}
{{- if and $is_last (ne .Role "assistant") }}<start_of_turn>model
{{ end }}
{{- end }}"""
"""Gemma's chat in Go's language: the system message opens the first turn, and an answer that is begun stays open."""

STOP = "<end_of_turn>"
TURN = "<start_of_turn>"
MAX_CTX = 32_768
"""Of the window that is asked for: Gemma 3n's own."""

PARAMETERS: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
}
"""What Gemma is to be sampled with. Why also what is off: repeat_penalty was 1.1 by default until Ollama 0.32.10."""

SAMPLING_KEYS = {"temperature": "general.sampling.temp", "top_k": "general.sampling.top_k"} | {
    name: f"general.sampling.{name}" for name in ("top_p", "min_p")
}
"""Keys of a file that say it better, as those of a fine-tune."""

CHATS: tuple[tuple[Mapping[str, str], ...], ...] = (
    ({"role": "user", "content": "Why is the sky blue?"},),
    ({"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}),
    (
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ),
)
"""What a file's own template is compared on before TEMPLATE is written for it."""

MODELFILE, HUB_TEMPLATE, HUB_PARAMS, HUB_SYSTEM = "Modelfile", "template", "params", "system"


@dataclass(frozen=True)
class OllamaFiles:
    """The texts to write, by name, and what a user should know of them."""

    directory: Path
    texts: Mapping[str, str]
    params: Mapping[str, Any]
    notices: tuple[str, ...] = ()

    def write(self, *, force: bool = False) -> list[Path]:
        """Write them. Raises: OutputError, and then none is written that was not before it."""
        make_directory(self.directory)
        paths = [self.directory / name for name in self.texts]
        for path in paths:
            check_output(path, force=force)
        for path, text in zip(paths, self.texts.values(), strict=True):
            write_whole(path, text, force=force)
        return paths


def ollama_files(
    file: str | Path,
    mmproj: str | Path | None = None,
    output: str | Path | None = None,
    *,
    system: str | None = None,
    template: str | Path | None = None,
    num_ctx: int | None = None,
) -> OllamaFiles:
    """What Ollama wants beside a text model's file.

    Args:
        mmproj: the file of its encoders.
        output: the directory to write to; by default the file's.
        system: a system message.
        template: a file with a template in Go's language, to be written instead of TEMPLATE.
        num_ctx: tokens of context; by default what the model was made for.

    Raises: GGUFError; SourceError for the file of another model; UsageError for a text that a Modelfile can't hold, or
        a number of tokens that can't be; OutputError where something that is read would be replaced.
    """
    path = Path(file)
    directory = Path(output) if output is not None else path.parent
    gguf = open_gguf(path)
    if architecture(gguf) != ARCH:
        raise SourceError(
            f"{path}: not the text model of a Gemma 3n",
            expected=f"general.architecture {ARCH}",
            found=architecture(gguf) or "nothing",
            fix="give the text model as FILE and its encoders with --mmproj",
        )
    files = [Path(part.name) for part in gguf.parts]
    notices: list[str] = []
    if mmproj is not None:
        beside = open_gguf(mmproj, strict=False)
        notices += [f.notice for f in lint_file(gguf, beside=beside).findings if f.check.group is Group.PAIR]
        files.append(Path(mmproj))
    for read in (*files, template):
        for name in (MODELFILE, HUB_TEMPLATE, HUB_PARAMS, HUB_SYSTEM):
            check_not_input(directory / name, read)
    if template is not None:
        go_template: str | None = read_text(Path(template), MAX_VALUE_BYTES, UsageError)
    else:
        go_template, notice = _template_for(gguf)
        notices += [notice] if notice is not None else []
    params = _params(gguf, num_ctx)
    texts = {MODELFILE: _modelfile([_from(file, directory) for file in files], params, go_template, system)}
    if go_template is not None:
        texts[HUB_TEMPLATE] = go_template
    texts[HUB_PARAMS] = json.dumps(params, indent=2) + "\n"
    if system is not None:
        texts[HUB_SYSTEM] = system
    return OllamaFiles(directory, texts, params, tuple(notices))


def _params(gguf: GGUFFile, num_ctx: int | None) -> dict[str, Any]:
    said = {name: gguf.keys[key].value for name, key in SAMPLING_KEYS.items() if key in gguf.keys}
    numbers = {
        name: type(PARAMETERS[name])(value)
        for name, value in said.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    key = gguf.keys.get(Keys.LLM.CONTEXT_LENGTH.format(arch=ARCH))
    most = key.value if key is not None and isinstance(key.value, int) else MAX_CTX
    if num_ctx is not None and not 1 <= num_ctx <= most:
        raise UsageError(
            f"a context of {num_ctx:,} tokens", expected=f"1 to {most:,}, which the model was made for", fix="--num-ctx"
        )
    rounded = {name: round(value, 6) for name, value in numbers.items()}  # 0.95 is 0.949999988079071 in float32
    return {"stop": [STOP], **PARAMETERS, **rounded, "num_ctx": num_ctx or min(most, MAX_CTX)}


def render(messages: Sequence[Mapping[str, str]]) -> str:
    """What TEMPLATE makes of a chat, without Go."""
    text, system = "", ""
    for message in messages:
        role, content = message["role"], message["content"]
        is_last = message is messages[-1]
        if role == "system":
            system = f"{content}\n\n"
        elif role == "assistant":
            text += f"{TURN}model\n{content}" + ("" if is_last else f"{STOP}\n")
        else:
            text += f"{TURN}{role}\n{system}{content}{STOP}\n"
            system = ""
        if is_last and role != "assistant":
            text += f"{TURN}model\n"
    return text


def _template_for(gguf: GGUFFile) -> tuple[str | None, str | None]:
    """TEMPLATE where it says what the file's own template says, and what a user should know."""
    key = gguf.keys.get(Keys.Tokenizer.CHAT_TEMPLATE)
    if key is None or not isinstance(key.value, str):
        return TEMPLATE, "the file has no chat template: Gemma's is written"
    return _compared(key.value)


@lru_cache(maxsize=8)
def _compared(template: str) -> tuple[str | None, str | None]:
    """Why remembered: all files of a model have one template, and rendering it takes a process."""
    from gguf3n.engines.template_process import jinja_process

    left_out = "no TEMPLATE is written: Ollama from 0.30 renders the file's own; for older ones give --template FILE"
    if TURN not in template or STOP not in template:
        return None, f"the file's chat template is not Gemma's, which has {TURN} and {STOP}; {left_out}"
    process = jinja_process("the file", template, {"bos_token": ""})
    try:
        other = [chat for chat in CHATS if process.render(chat) != render(chat)]
    except UsageError:
        return TEMPLATE, "whether the template is this file's was not compared: pip install 'gguf3n[validate]'"
    except TokenizerError as error:
        return None, f"the file's chat template can't be rendered ({error.one_line}); {left_out}"
    finally:
        process.close()
    if other:
        return None, f"the file's chat template says something else than Gemma's for {list(other[0])}; {left_out}"
    return TEMPLATE, None


def _modelfile(files: Sequence[str], params: Mapping[str, Any], template: str | None, system: str | None) -> str:
    lines = [f"FROM {file}" for file in files]
    for name, value in params.items():
        for each in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} {json.dumps(each)}")
    if template is not None:
        lines.append(f"TEMPLATE {quoted(template, 'the template')}")
    if system is not None:
        lines.append(f"SYSTEM {quoted(system, 'the system message')}")
    lines.append(f"LICENSE {quoted(SENTENCE, 'the license')}")
    return "\n".join(lines) + "\n"


def quoted(text: str, what: str) -> str:
    """A text as a Modelfile has it.

    Args:
        what: it is, in messages.

    Raises: UsageError for one that its parser would cut short or change: it knows no escapes, and drops what can't be
        printed.
    """
    if '"""' in text:
        raise UsageError(
            f'{what} has """ in it, where a Modelfile takes a text to end',
            expected="a text without three quotes in a row",
            fix="write them with a space between, or use other quotes",
        )
    _check_printable(text, what, "\n\t")
    return f'"""{text}"""'


def _from(file: Path, directory: Path) -> str:
    """A file as FROM has it, seen from the Modelfile's directory."""
    try:
        relative = os.path.relpath(file, directory)
    except ValueError:  # another drive
        relative = os.path.abspath(file)
    name = relative.replace(os.sep, "/")
    _check_printable(name, f"{file}: its name")
    if name != name.strip():
        raise UsageError(f"{file}: its name ends in white space, which a Modelfile does not keep", fix="rename it")
    return name if name.startswith(("../", "/")) or os.path.isabs(relative) else f"./{name}"


def _check_printable(text: str, what: str, also: str = "") -> None:
    """Source: strconv.IsPrint of Go, without which parser.go drops a character."""
    for char in text:
        if char != " " and char not in also and unicodedata.category(char)[0] in "CZ":
            raise UsageError(
                f"{what} has a character that Ollama's parser drops",
                expected="letters, marks, numbers, punctuation, symbols and spaces",
                found=f"U+{ord(char):04X} ({unicodedata.name(char, 'unnamed')})",
                fix="take it out",
            )
