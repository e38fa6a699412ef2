"""What Ollama is given: a Modelfile that its parser reads back, and a template that says what Gemma's own says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

import gguf3n
from gguf3n.errors import Gguf3nError, OutputError, SourceError, UsageError
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.publishing import ollama
from gguf3n.publishing.ollama import TEMPLATE, ollama_files, quoted, render
from gguf3n.publishing.terms import SENTENCE
from tests.inspection.faults import set_key, unset_key
from tests.publishing.modelfile import is_printable, parse_modelfile
from workshop.ollama_chats import CHATS, IMAGE, UNTRIMMED, Message, for_ollama, go_renderings
from workshop.places import FIXTURES

RECORDED = json.loads((FIXTURES / "ollama" / "renderings.json").read_text("utf-8"))
ALL_CHATS = {**CHATS, "untrimmed": UNTRIMMED}
END = "<end_of_turn>\n"


def jinja(chat: Sequence[Message]) -> str:
    """What transformers renders of the checkpoint's own template; an answer that is begun is to be gone on with."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((FIXTURES / "tokenizer" / "chat_template.jinja").read_text("utf-8"))
    is_begun = chat[-1]["role"] == "assistant"
    text = template.render(messages=chat, bos_token="", add_generation_prompt=not is_begun)
    for number in range(text.count(IMAGE)):
        text = text.replace(IMAGE, f"[img-{number}]", 1)
    return text.removesuffix(END) if is_begun else text


def test_the_recording_is_of_this_template_and_these_chats() -> None:
    assert RECORDED["template"] == TEMPLATE and RECORDED["go"].startswith("go version go")
    assert {name: each["chat"] for name, each in RECORDED["renderings"].items()} == {
        name: for_ollama(chat) for name, chat in ALL_CHATS.items()
    }


@pytest.fixture(scope="module")
def go_texts() -> Mapping[str, str]:
    """What Go makes of each chat: here where it is installed, else as it was recorded."""
    recorded = {name: each["text"] for name, each in RECORDED["renderings"].items()}
    go = shutil.which("go")
    rendered = recorded if go is None else go_renderings(go, TEMPLATE, ALL_CHATS)
    assert rendered == recorded
    return rendered


@pytest.mark.parametrize("name", CHATS)
def test_go_says_what_jinja_says(name: str, go_texts: Mapping[str, str]) -> None:
    assert go_texts[name] == jinja(CHATS[name])


def test_only_jinja_trims(go_texts: Mapping[str, str]) -> None:
    assert go_texts["untrimmed"] == jinja(UNTRIMMED).replace("padded", " padded \n")


@pytest.mark.parametrize("name", ALL_CHATS)
def test_without_go(name: str, go_texts: Mapping[str, str]) -> None:
    assert render(for_ollama(ALL_CHATS[name])) == go_texts[name]


def values(made: ollama.OllamaFiles, name: str) -> list[str]:
    return [value for each, value in parse_modelfile(made.texts["Modelfile"]) if each == name]


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ollama")
    gguf3n.convert(tiny_checkpoint, "Q8_0", folder / "tiny-Q8_0.gguf")
    return folder / "tiny-Q8_0.gguf"


def test_the_files(model: Path, tmp_path: Path) -> None:
    made = ollama_files(model, None, tmp_path / "new", system='Say "yes".\nOr no.')
    assert made.notices == ()
    paths = made.write()
    assert [path.name for path in paths] == ["Modelfile", "template", "params", "system"]
    commands = parse_modelfile((tmp_path / "new" / "Modelfile").read_text("utf-8"))
    assert [name for name, _ in commands] == [
        "from", "stop", "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "num_ctx", "template", "system",
        "license",
    ]  # fmt: skip
    found = dict(commands)
    assert (tmp_path / "new" / found["from"]).resolve() == model.resolve()
    assert found["template"] == TEMPLATE == (tmp_path / "new" / "template").read_text("utf-8")
    assert found["system"] == 'Say "yes".\nOr no.' == (tmp_path / "new" / "system").read_text("utf-8")
    assert found["license"] == SENTENCE
    params = json.loads((tmp_path / "new" / "params").read_text("utf-8"))
    assert params == {
        "stop": ["<end_of_turn>"], "temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0, "repeat_penalty": 1.0,
        "num_ctx": params["num_ctx"],
    }  # fmt: skip
    assert params["num_ctx"] == min(gguf3n.open_gguf(model).value("gemma3n.context_length"), 32768)
    assert {name: json.loads(found[name]) for name in params if name != "stop"} | {"stop": [found["stop"]]} == params


def test_files_that_are_there_are_replaced_only_with_force(model: Path, tmp_path: Path) -> None:
    made = ollama_files(model, output=tmp_path)
    (tmp_path / "params").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        made.write()
    assert [path.name for path in tmp_path.iterdir()] == ["params"]
    made.write(force=True)
    assert (tmp_path / "params").read_text() == made.texts["params"]


def test_beside_the_file(model: Path) -> None:
    made = ollama_files(model, num_ctx=100)
    assert made.directory == model.parent
    assert values(made, "from") == ["./tiny-Q8_0.gguf"] and values(made, "num_ctx") == ["100"]
    assert "system" not in made.texts


def test_sampling_of_the_files_own(model: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(model, tmp_path / "m.gguf"))
    for key, kind, value in (("temp", VT.FLOAT32, 0.7), ("top_k", VT.INT32, 20), ("top_p", VT.FLOAT32, 0.8)):
        set_key(path, f"general.sampling.{key}", kind, value)
    params = ollama_files(path).params
    assert (params["temperature"], params["top_k"], params["top_p"], params["min_p"]) == (0.7, 20, 0.8, 0.0)


def test_with_its_encoders(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    text, encoders = gguf3n.convert(
        make_checkpoint(multimodal=True), "Q8_0", tmp_path, mmproj="F16", audio=False
    )  # fmt: skip
    made = ollama_files(text.path, encoders.path)
    assert values(made, "from") == [f"./{text.path.name}", f"./{encoders.path.name}"]
    assert made.notices == ()
    set_key(encoders.path, "clip.vision.projection_dim", VT.UINT32, 123)
    assert any("123" in notice for notice in ollama_files(text.path, encoders.path).notices)
    with pytest.raises(SourceError, match="not the text model"):
        ollama_files(encoders.path)
    with pytest.raises(UsageError, match="not the mmproj file"):
        ollama_files(text.path, text.path)


@pytest.mark.parametrize(
    ("template", "notice", "has_template"),
    [
        (None, "the file has no chat template: Gemma's is written", True),
        ("{{ messages[0].content }}", "not Gemma's", False),
        ("<start_of_turn>{{ messages[0].content }}<end_of_turn>", "says something else", False),
        ("<start_of_turn><end_of_turn>{{ nothing.at.all }}", "can't be rendered", False),
    ],
)
def test_a_file_with_another_template(
    model: Path, tmp_path: Path, template: str | None, notice: str, has_template: bool
) -> None:
    path = Path(shutil.copy(model, tmp_path / "m.gguf"))
    if template is None:
        unset_key(path, "tokenizer.chat_template")
    else:
        set_key(path, "tokenizer.chat_template", VT.STRING, template)
    made = ollama_files(path)
    (said,) = made.notices
    assert notice in said
    assert ("template" in made.texts) is bool(values(made, "template")) is has_template


def test_a_template_of_ones_own(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("{{ .Prompt }}")
    made = ollama_files(model, output=tmp_path, template=tmp_path / "mine")
    assert values(made, "template") == ["{{ .Prompt }}"] and made.texts["template"] == "{{ .Prompt }}"


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_texts_are_read_back_or_refused(text: str) -> None:
    try:
        said = quoted(text, "it")
    except UsageError:
        assert '"""' in text or not all(is_printable(char) or char in "\n\t" for char in text)
        return
    assert parse_modelfile(f"FROM x\nSYSTEM {said}\nLICENSE y\n")[1:] == [("system", text), ("license", "y")]


@pytest.mark.parametrize("text", ['"', '""', 'a""', '"\n"', '""\n""\n', "", "\n", '"" ""', "a\n\n", ' "x" '])
def test_quotes_at_the_ends(text: str) -> None:
    assert parse_modelfile(f"FROM x\nSYSTEM {quoted(text, 'it')}\nLICENSE y\n")[1:] == [
        ("system", text),
        ("license", "y"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": 'a """ b'}, "three quotes"),
        ({"system": "zero\u200dwidth"}, "U\\+200D"),
        ({"system": "\x1b[2J"}, "parser drops"),
        ({"num_ctx": 0}, "a context of 0 tokens"),
        ({"num_ctx": 10**9}, "a context of 1,000,000,000 tokens"),
        ({"template": "/no/such/file"}, "cannot be read"),
    ],
)
def test_what_can_not_be(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Gguf3nError, match=message):
        ollama_files(model, **options)


@pytest.mark.parametrize(
    ("name", "is_kept"), [("with a space.gguf", True), ("a\nb.gguf", False), ("a\u00a0b.gguf", False)]
)
def test_names_of_files(model: Path, tmp_path: Path, name: str, is_kept: bool) -> None:
    path = Path(shutil.copy(model, tmp_path / name))
    if is_kept:
        assert values(ollama_files(path), "from") == [f"./{name}"]
    else:
        with pytest.raises(UsageError, match="parser drops"):
            ollama_files(path)


def test_nothing_that_is_read_is_replaced(model: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(model, tmp_path / "params"))
    with pytest.raises(OutputError, match="is what is read"):
        ollama_files(path)
