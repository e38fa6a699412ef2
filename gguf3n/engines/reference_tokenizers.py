"""The tokenizer that a file's token ids are held against.

reference                                     tokenizer
checkpoint directory with tokenizer.json      transformers
checkpoint directory with tokenizer.model     sentencepiece
GGUF file                                     llama.cpp
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from gguf.constants import Keys, TokenType

from gguf3n.engines.torchvision_operators import declare_operators
from gguf3n.engines.vocabulary_model import VocabularyModel
from gguf3n.errors import GGUFError, TokenizerError, UsageError
from gguf3n.gemma3n.sentencepieces import SentencePieces
from gguf3n.gemma3n.source import Checkpoint, GGUFSource, Source
from gguf3n.inspection.checks_vocabulary import duplicates
from gguf3n.inspection.subject import Subject

MODEL = "llama"
"""The tokenizer that llama.cpp runs Gemma's vocabulary with; an SPM."""

WHOLE = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
"""Types of the tokens that are found in a text before the rest is merged from letters."""

Chat = Sequence[Mapping[str, str]]
"""Messages, each with a role and its content."""

ADDS: Mapping[str, bool] = {
    Keys.Tokenizer.ADD_BOS: True,
    Keys.Tokenizer.ADD_EOS: False,
    Keys.Tokenizer.ADD_PREFIX: True,
}
"""What llama.cpp's tokenizer adds to a text, and whether it does where the key is missing."""


class Tokenizer(enum.Enum):
    """Whose tokenizer is the reference."""

    TRANSFORMERS = "transformers"
    SENTENCEPIECE = "sentencepiece"
    LLAMA_CPP = "llama.cpp"


class ReferenceTokenizer(Protocol):
    """Text and chats -> token ids. `bos_id` is the token that begins a text."""

    kind: Tokenizer
    bos_id: int

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, with those that the tokenizer adds; special tokens in it are recognized if `special`."""
        ...

    def render(self, chat: Chat) -> str | None:
        """A chat as text, up to where the model is to speak; None where there is no chat template.

        Raises: TokenizerError, GGUFError: the template fails or refuses the chat.
        """
        ...

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered chat."""
        ...

    def piece(self, token_id: int) -> str:
        """A token's text, with spaces for "▁"."""
        ...

    def is_whole(self, token_id: int) -> bool:
        """Whether a token is found in a text before the rest is merged from letters."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


def open_reference(reference: Source) -> ReferenceTokenizer:
    """The tokenizer of a checkpoint or of a GGUF file.

    Raises: SourceError or a class below it; GGUFError; UsageError: the package that it needs is not installed.
    """
    if isinstance(reference, GGUFSource):
        return LlamaCppTokenizer(Subject(reference.gguf))
    assert isinstance(reference, Checkpoint), reference
    if (reference.path / "tokenizer.json").is_file():
        return TransformersTokenizer(reference.path)
    return SentencePieceTokenizer(reference)


class TransformersTokenizer:
    """A checkpoint's tokenizer in transformers."""

    kind = Tokenizer.TRANSFORMERS

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer = load_tokenizer(directory)
        if self._tokenizer.bos_token_id is None:
            raise TokenizerError(
                f"{directory}: the tokenizer has no begin token", expected="bos_token, as in any Gemma"
            )
        self.bos_id = int(self._tokenizer.bos_token_id)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, split_special_tokens=not special)
        return ids

    def render(self, chat: Chat) -> str | None:
        if not self._tokenizer.chat_template:
            return None
        messages = [dict(message) for message in chat]
        with _template_errors(self._directory):
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text

    def encode_rendered(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def piece(self, token_id: int) -> str:
        return spaced(str(self._tokenizer.convert_ids_to_tokens(token_id)))

    def is_whole(self, token_id: int) -> bool:
        return token_id in self._tokenizer.added_tokens_decoder

    def close(self) -> None:
        """Nothing is held."""


class SentencePieceTokenizer:
    """A checkpoint's tokenizer.model in sentencepiece, its chat template in transformers."""

    kind = Tokenizer.SENTENCEPIECE

    def __init__(self, source: Checkpoint) -> None:
        self._directory = source.path
        self._pieces = SentencePieces(source)
        self._vocabulary = self._pieces.vocabulary
        self.bos_id = self._vocabulary.special_ids["bos"]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return self._pieces.encode(text, special=special)

    def render(self, chat: Chat) -> str | None:
        template = self._vocabulary.chat_templates.get("default")
        if template is None:
            return None
        _transformers()
        from transformers.utils.chat_template_utils import render_jinja_template

        special = {f"{role}_token": self._vocabulary.tokens[i] for role, i in self._vocabulary.special_ids.items()}
        messages = [dict(message) for message in chat]
        with _template_errors(self._directory):
            (text,), _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=True, **special
            )
        return str(text)

    def encode_rendered(self, text: str) -> list[int]:
        return self._pieces.encode(text, add_special=False)

    def piece(self, token_id: int) -> str:
        return spaced(self._vocabulary.tokens[token_id])

    def is_whole(self, token_id: int) -> bool:
        return self._vocabulary.types[token_id] in WHOLE

    def close(self) -> None:
        """Nothing is held."""


class LlamaCppTokenizer:
    """A GGUF file's vocabulary in llama.cpp; its chat template is loaded when a chat is rendered.

    Why: it is loaded alone first, since a template that llama.cpp can't read keeps the whole file from loading.

    Raises: GGUFError: llama.cpp does not load the vocabulary.
    """

    kind = Tokenizer.LLAMA_CPP

    def __init__(self, subject: Subject) -> None:
        path = subject.gguf.path
        self._subject = subject
        if (model := self._subject.text(Keys.Tokenizer.MODEL)) != MODEL:
            raise GGUFError(f"{path}: {Keys.Tokenizer.MODEL} is another tokenizer's", expected=MODEL, found=str(model))
        if twice := next(duplicates(self._subject), None):
            raise GGUFError(f"{path}: a text stands twice in the vocabulary; llama.cpp would abort", found=str(twice))
        bos_id = self._subject.integer(Keys.Tokenizer.BOS_ID)
        self.bos_id = 1 if bos_id is None else bos_id  # llama.cpp's default
        self._model = VocabularyModel(subject.gguf, with_template=False)
        self._with_template: VocabularyModel | None = None

    def adds(self, name: str) -> bool:
        """What a key says that the tokenizer adds, or llama.cpp takes where it is missing."""
        key = self._subject.gguf.keys.get(name)
        return ADDS[name] if key is None else bool(key.value)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return self._model.tokenize(text, special=special)

    def render(self, chat: Chat) -> str | None:
        if not (self._subject.template or "").strip():
            return None
        if self._with_template is None:
            self._with_template = VocabularyModel(self._subject.gguf, with_template=True)
        return self._with_template.render(chat)

    def encode_rendered(self, text: str) -> list[int]:
        return self._model.tokenize(text)

    def piece(self, token_id: int) -> str:
        return spaced(self._subject.tokens[token_id]) if token_id < len(self._subject.tokens) else ""

    def is_whole(self, token_id: int) -> bool:
        return self._subject.token_type(token_id) in WHOLE

    def close(self) -> None:
        for model in (self._model, self._with_template):
            if model is not None:
                model.close()


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a checkpoint; code that comes with one is never run.

    Raises: TokenizerError. UsageError: no transformers.
    """
    transformers = _transformers()
    shown = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no other class
        raise TokenizerError(
            f"{directory}: transformers does not read this tokenizer", found=str(error).partition("\n")[0]
        ) from error
    finally:
        transformers.logging.set_verbosity(shown)


def spaced(piece: str) -> str:
    return piece.replace("▁", " ")


@contextmanager
def _template_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a template does
        raise TokenizerError(f"{directory}: the chat template fails", found=str(error)) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "the reference tokenizer cannot be run: no module transformers", fix="pip install 'gguf3n[validate]'"
        ) from error
    declare_operators()
    return transformers
