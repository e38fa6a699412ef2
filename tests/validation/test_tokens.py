"""Token ids and chats: each planted fault is named, every reference agrees on a sound file."""

from __future__ import annotations

import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import gguf3n
from gguf3n.engines.llama_cpp import LlamaCpp
from gguf3n.engines.reference_tokenizers import LlamaCppTokenizer, ReferenceTokenizer, Tokenizer, open_reference
from gguf3n.engines.template_process import llama_cpp_process
from gguf3n.engines.vocabulary_model import VocabularyModel
from gguf3n.errors import GGUFError, TokenizerError, UsageError
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.gemma3n.source import open_source
from gguf3n.inspection.subject import Subject
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.result import Verdict
from gguf3n.validation.texts import CASES, CHATS, Case, built_in_text
from gguf3n.validation.tokens import TokensResult, cases, check_tokens
from tests.validation.plant_keys import FAULTS, TEMPLATE, TOKENS, change, edit_template, set_key, unset_key

pytest.importorskip("transformers")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def sound(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint in Q4_0. Not to be changed."""
    path = tmp_path_factory.mktemp("sound") / "tiny-Q4_0.gguf"
    gguf3n.convert(tiny_checkpoint, "Q4_0", path)
    return path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sound, tmp_path / "copy.gguf"))


@pytest.fixture(scope="module")
def llama_cpp(sound: Path) -> Iterator[LlamaCppTokenizer]:
    with closing(LlamaCppTokenizer(Subject(open_gguf(sound)))) as tokenizer:
        yield tokenizer


def check(path: Path, reference: Path) -> TokensResult:
    """What is found of a file, whose reference is opened for it."""
    return check_tokens(Candidate(path), open_source(reference))


REFERENCES: dict[str, tuple[Tokenizer, dict[str, Any]]] = {
    "both": (Tokenizer.TRANSFORMERS, {}),
    "tokenizer.json": (Tokenizer.TRANSFORMERS, {"tokenizer": "json"}),
    "transformers 5": (Tokenizer.TRANSFORMERS, {"tokenizer": "json", "shared_kv": False}),
    "text-only": (Tokenizer.TRANSFORMERS, {"layout": "text-only"}),
    "tokenizer.model": (Tokenizer.SENTENCEPIECE, {"tokenizer": "model"}),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_sound(name: str, sound: Path, make_checkpoint: Callable[..., Path]) -> None:
    kind, options = REFERENCES[name]
    result = check(sound, make_checkpoint(**options))
    assert result.problems == ()
    assert result.n_texts == len(list(cases(kind))) + len(CHATS)
    assert result.n_tokens > 20_000


def test_a_gguf_reference(sound: Path, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """One that was made of other tokenizer files; llama.cpp is compared with itself, so no case is left out."""
    gguf3n.convert(make_checkpoint(tokenizer="json"), "F16", tmp_path / "reference.gguf")
    result = check(sound, tmp_path / "reference.gguf")
    assert result.problems == ()
    assert result.n_texts == len(built_in_text().split("\n\n")) + len(CASES) + len(CHATS)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.tokens])
def test_faults(name: str, copy: Path, tiny_checkpoint: Path) -> None:
    fault = FAULTS[name]
    fault.plant(copy)
    result = check(copy, tiny_checkpoint)
    assert [problem.where for problem in result.problems] == [fault.tokens]
    assert result.verdict is (Verdict.WARN if "tokens" in fault.warns else Verdict.FAIL)


def test_what_is_said(sound: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What differs, in how many texts, and an example with the tokens of both."""
    said = {}
    for name in ("no begin token", "space prefix", "vocabulary shifted up", "a second begin token", "another role"):
        path = Path(shutil.copy(sound, tmp_path / "copy.gguf"))
        FAULTS[name].plant(path)
        (problem,) = check(path, tiny_checkpoint).problems
        said[name] = problem.what
    n = len(list(cases(Tokenizer.TRANSFORMERS)))
    oven = "'The oven at the end of t'"
    not_added = f"the begin token is not added, in {n} of {n + len(CHATS)} texts"
    assert said["no begin token"] == f"{not_added}; in {oven} token 0 is 623 ('The'), not 2 ('<bos>')"
    assert said["space prefix"].endswith(f"in {oven} token 1 is 582 (' The'), not 623 ('The')")
    assert said["vocabulary shifted up"].endswith(f"in {oven} token 1 is 624 ('The'), not 623 ('The')")
    assert said["a second begin token"] == (
        "a chat has 2 begin tokens in llama.cpp, which drops one of the template's and adds its own, and 3 in engines "
        "that drop none, as Ollama's before 0.30"
    )
    assert said["another role"].endswith("'model\\nBlue light bounces' expected, 'assistant\\nBlue light bou' found")


def test_two_faults_are_two_problems(copy: Path, tiny_checkpoint: Path) -> None:
    FAULTS["no begin token"].plant(copy)
    FAULTS["scores upside down"].plant(copy)
    wheres = [problem.where for problem in check(copy, tiny_checkpoint).problems]
    assert wheres == [FAULTS["no begin token"].tokens, FAULTS["scores upside down"].tokens]


def test_chats_without_a_begin_token(copy: Path, tiny_checkpoint: Path) -> None:
    """In the template it is enough; in neither place it is a fault of both."""
    FAULTS["no begin token"].plant(copy)
    edit_template("{{ bos_token }}", "")(copy)
    wheres = [problem.where for problem in check(copy, tiny_checkpoint).problems]
    assert wheres == [FAULTS["no begin token"].tokens, TEMPLATE]


def test_a_second_begin_token_for_all(copy: Path, tiny_checkpoint: Path) -> None:
    FAULTS["no begin token"].plant(copy)
    FAULTS["a second begin token"].plant(copy)
    _, problem = check(copy, tiny_checkpoint).problems
    assert problem.what == "a chat has 2 begin tokens in every engine"


def test_no_template_anywhere(copy: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A base model has none; one in the file is still looked at for its begin tokens."""
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    result = check(copy, base)
    assert result.problems == ()
    assert result.n_texts == len(list(cases(Tokenizer.TRANSFORMERS)))
    FAULTS["a second begin token"].plant(copy)
    assert [problem.where for problem in check(copy, base).problems] == [TEMPLATE]
    unset_key(copy, TEMPLATE)
    assert check(copy, base).problems == ()


@pytest.mark.parametrize("tokenizer", ["json", "model"])
def test_a_template_that_refuses_system_messages(
    tokenizer: str, copy: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """As Gemma 2's; the other chat is compared."""
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ bos_token }}"
    checkpoint = Path(shutil.copytree(make_checkpoint(tokenizer=tokenizer), tmp_path / "checkpoint"))
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("{{ bos_token }}", refuse), "utf-8")
    result = check(copy, checkpoint)
    assert result.problems == ()
    assert result.n_texts == len(list(cases(open_reference(open_source(checkpoint)).kind))) + len(CHATS) // 2
    edit_template("{{ bos_token }}", refuse)(copy)
    assert check(copy, checkpoint).problems == ()


def test_a_template_that_knows_no_lists(copy: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """transformers prints them, llama.cpp gives it their text: chats of lists are not compared."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    text = "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(text, "utf-8")
    set_key(copy, TEMPLATE, "string", text)
    result = check(copy, checkpoint)
    assert result.problems == ()
    assert result.n_texts == len(list(cases(Tokenizer.TRANSFORMERS))) + len(CHATS) // 2


def test_a_byte_that_is_missing(copy: Path, tiny_checkpoint: Path) -> None:
    """The process goes on."""
    change(TOKENS, "string[]", lambda old: ["no byte" if t == "<0xF4>" else t for t in old])(copy)
    result = check(copy, tiny_checkpoint)
    (problem,) = result.problems
    assert problem.where == "vocabulary"
    assert "_Map_base::at" in problem.what


def test_nothing_is_left_behind(
    copy: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    check(copy, tiny_checkpoint)
    FAULTS["a broken template"].plant(copy)
    check(copy, tiny_checkpoint)
    assert list(temporary.iterdir()) == []


def test_without_transformers(sound: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="no module transformers"):
        check(sound, tiny_checkpoint)


def test_a_reference_that_cannot_be_read(sound: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="tokenizer"):
        check(sound, checkpoint)
    for name in ("tokenizer.json", "tokenizer.model"):
        (checkpoint / name).unlink()
    with pytest.raises(TokenizerError, match="no tokenizer"):
        check(sound, checkpoint)
    with pytest.raises(GGUFError, match="not a GGUF file"):
        check(sound, checkpoint / "config.json")


# the small model that stands for a file


def test_the_vocabulary_alone_is_like_the_whole_file(sound: Path) -> None:
    with (
        LlamaCpp(sound, n_ctx=64, n_threads=1) as whole,
        VocabularyModel(open_gguf(sound)) as alone,
        closing(llama_cpp_process(open_gguf(sound))) as templates,
    ):
        for case in CASES:
            assert alone.tokenize(case.text) == whole.tokenize(case.text), case.name
            assert alone.tokenize(case.text, special=False) == whole.tokenize(case.text, special=False), case.name
        assert templates.render(CHATS["chat"]).startswith("<start_of_turn>user\nAnswer in one sentence.\n\nWhy is")


def test_a_vocabulary_that_does_not_load(copy: Path) -> None:
    set_key(copy, "tokenizer.ggml.scores", "float32[]", [0.0])
    with pytest.raises(GGUFError, match=r"copy\.gguf: llama\.cpp does not load this vocabulary"):
        VocabularyModel(open_gguf(copy, strict=False))


# the texts


@pytest.mark.parametrize("case", [case for case in CASES if case.unlike], ids=lambda case: case.name)
def test_cases_are_left_out_for_a_reason(
    case: Case, llama_cpp: LlamaCppTokenizer, make_checkpoint: Callable[..., Path]
) -> None:
    """They are cut in another way by those tokenizers, and by no others."""
    references: list[ReferenceTokenizer] = [
        open_reference(open_source(make_checkpoint(tokenizer=t))) for t in ("json", "model")
    ]
    ids = llama_cpp.encode(case.text)
    assert {reference.kind for reference in references if reference.encode(case.text) != ids} == case.unlike


def test_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({case.text for case in CASES}) == len(CASES)


def test_built_in_text() -> None:
    text = built_in_text()
    words = text.split()
    assert sum(word.isascii() for word in words) > 2000
    scripts = {unicodedata.name(c).partition(" ")[0] for c in text if c.isalpha()}
    assert scripts >= {
        "LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "ARABIC", "HEBREW", "DEVANAGARI",
        "BENGALI", "TAMIL", "THAI",
    }  # fmt: skip
    assert text == unicodedata.normalize("NFC", text)
    assert all(c == "\n" or unicodedata.category(c)[0] != "C" for c in text)
    paragraphs = text.split("\n\n")
    assert len(paragraphs) == len(set(paragraphs))
    assert all(paragraphs)
