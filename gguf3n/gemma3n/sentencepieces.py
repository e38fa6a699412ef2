"""Text -> token ids by sentencepiece, of a checkpoint that has tokenizer.model alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gguf.constants import TokenType

from gguf3n.errors import TokenizerError
from gguf3n.gemma3n.source import Checkpoint
from gguf3n.gemma3n.tokenizer import load_sentencepiece

WHOLE = (TokenType.CONTROL, TokenType.UNKNOWN)


class SentencePieces:
    """A checkpoint's tokenizer.model, and the tokens that sentencepiece does not look for in a text.

    These are the control tokens, and those that other files add to its pieces; they are found first, as transformers
    does.

    Raises: SourceError or a class below it.
    """

    def __init__(self, source: Checkpoint) -> None:
        self.vocabulary = source.vocabulary
        self._processor, _ = load_sentencepiece(source.path / "tokenizer.model")
        n_pieces = self._processor.vocab_size()
        self._whole = {
            text: i
            for i, (text, kind) in enumerate(zip(self.vocabulary.tokens, self.vocabulary.types, strict=True))
            if kind in WHOLE or (i >= n_pieces and kind is TokenType.USER_DEFINED)
        }
        self._split = _any_of(self._whole)
        self._split_ordinary = _any_of(
            text for text, i in self._whole.items() if self.vocabulary.types[i] is TokenType.USER_DEFINED
        )

    def encode(self, text: str, *, add_special: bool = True, special: bool = True) -> list[int]:
        """Token ids; with `add_special`, those that the tokenizer adds before and after; control tokens in the text are
        recognized if `special`."""
        ids: list[int] = []
        for part in (self._split if special else self._split_ordinary).split(text):
            if part in self._whole:
                ids.append(self._whole[part])
            else:
                ids += self._processor.EncodeAsIds(part)
        if add_special and self.vocabulary.add_tokens.get("bos", True):
            ids.insert(0, self._special_id("bos"))
        if add_special and self.vocabulary.add_tokens.get("eos", False):
            ids.append(self._special_id("eos"))
        return ids

    def _special_id(self, role: str) -> int:
        if role not in self.vocabulary.special_ids:
            raise TokenizerError(
                f"{self.vocabulary.origin}: no piece with the role of {role}, which the tokenizer adds",
                expected="begin and end tokens, as in any Gemma",
            )
        return self.vocabulary.special_ids[role]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Splits at any of these, the longest first, and keeps them; nowhere if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
