"""Checks of the vocabulary and of what chat programs read. Each yields what is wrong, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from gguf.constants import Keys, TokenType

from gguf3n.inspection.subject import Subject

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
END_OF_TURN = "<end_of_turn>"
CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", END_OF_TURN)
"""Tokens of every Gemma that are read as one only where they are typed as control (or user-defined) tokens."""

SPECIAL_IDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (Keys.Tokenizer.BOS_ID, ("<bos>",)),
    (Keys.Tokenizer.EOS_ID, ("<eos>", END_OF_TURN)),
    (Keys.Tokenizer.PAD_ID, ("<pad>",)),
    (Keys.Tokenizer.UNK_ID, ("<unk>",)),
)
"""Key and the texts that its token may have, the usual one first."""

EMITS_BOS = re.compile(r"\A\s*\{\{-?\s*bos_token\s*-?\}\}|\A\s*<bos>")
SAMPLING: tuple[tuple[str, float | int], ...] = (
    ("general.sampling.temp", 1.0),
    ("general.sampling.top_k", 64),
    ("general.sampling.top_p", 0.95),
)
"""What generation_config.json of the instruction models says."""


def missing_tokenizer(subject: Subject) -> Iterator[str]:
    for name in (Keys.Tokenizer.MODEL, Keys.Tokenizer.LIST):
        if name not in subject.gguf.keys:
            yield name


def tokenizer_model(subject: Subject) -> Iterator[str]:
    model = subject.text(Keys.Tokenizer.MODEL)
    if model is not None and model != "llama":
        yield f"{Keys.Tokenizer.MODEL} is {model!r}"


def scores(subject: Subject) -> Iterator[str]:
    if not subject.tokens:
        return
    n = 0 if subject.scores is None else len(subject.scores)
    if n < len(subject.tokens):
        yield f"{n:,} scores for {len(subject.tokens):,} tokens"
    elif subject.scores is not None and len(subject.tokens) > 1 and not np.ptp(subject.scores[: len(subject.tokens)]):
        yield "all scores are the same"


def types(subject: Subject) -> Iterator[str]:
    if not subject.tokens:
        return
    n = 0 if subject.token_types is None else len(subject.token_types)
    if n < len(subject.tokens):
        yield f"{n:,} types for {len(subject.tokens):,} tokens"


def duplicates(subject: Subject) -> Iterator[str]:
    if len(subject.token_ids) == len(subject.tokens):
        return
    for i, text in enumerate(subject.tokens):
        if text and subject.token_ids[text] != i:
            yield f"token {i} is {text!r}, as is token {subject.token_ids[text]}"


def missing_bytes(subject: Subject) -> Iterator[str]:
    if subject.tokens:
        missing = [text for text in BYTE_TOKENS if text not in subject.token_ids]
        if missing:
            yield f"{len(missing)} of 256, the first {missing[0]}"


def byte_types(subject: Subject) -> Iterator[str]:
    wrong = wrong_types(subject, BYTE_TOKENS, (TokenType.BYTE,))
    if wrong:
        yield f"{len(wrong)} byte tokens are not of type byte, the first {subject.tokens[wrong[0]]}"


def control_types(subject: Subject) -> Iterator[str]:
    for token_id in wrong_types(subject, CONTROL_TOKENS, (TokenType.CONTROL, TokenType.USER_DEFINED)):
        kind = subject.token_type(token_id)
        yield f"{subject.tokens[token_id]} (token {token_id}) is of type {kind.name.lower() if kind else 'unknown'}"


def wrong_types(subject: Subject, texts: tuple[str, ...], right: tuple[TokenType, ...]) -> list[int]:
    """Ids of the tokens with these texts whose type is another. None where the file has too few types."""
    if subject.token_types is None or len(subject.token_types) < len(subject.tokens):
        return []
    ids = (subject.token_ids[text] for text in texts if text in subject.token_ids)
    return [token_id for token_id in ids if subject.token_type(token_id) not in right]


def special_ids(subject: Subject) -> Iterator[str]:
    if not subject.tokens:
        return
    for name, texts in SPECIAL_IDS:
        token_id = subject.integer(name)
        if not any(text in subject.token_ids for text in texts):
            continue
        if token_id is None:
            if name in (Keys.Tokenizer.BOS_ID, Keys.Tokenizer.EOS_ID):
                yield f"there is no {name}"
        elif not 0 <= token_id < len(subject.tokens):
            yield f"{name} is {token_id}, past the vocabulary"
        elif subject.tokens[token_id] not in texts:
            yield f"{name} is {token_id}, which is {subject.tokens[token_id]!r}"


def end_of_turn(subject: Subject) -> Iterator[str]:
    """llama.cpp finds the token by its text; engines that read ids do not."""
    if subject.template is None or END_OF_TURN not in subject.template:
        return
    token_id = subject.token_ids.get(END_OF_TURN)
    if token_id is None:
        yield f"the vocabulary has no {END_OF_TURN}"
    elif token_id not in [subject.integer(name) for name in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID)]:
        yield f"neither eos_token_id nor eot_token_id is {token_id} ({END_OF_TURN})"


def adds_bos(subject: Subject) -> bool:
    """Whether the tokenizer begins with the begin token. Source: llama_vocab::impl::load, true for this tokenizer."""
    key = subject.gguf.keys.get(Keys.Tokenizer.ADD_BOS)
    return key is None or key.value is True


def no_bos(subject: Subject) -> Iterator[str]:
    if not adds_bos(subject):
        chat = subject.template is not None and EMITS_BOS.match(subject.template)
        yield "add_bos_token is false" + (", only the chat template gives it" if chat else "")


def two_bos(subject: Subject) -> Iterator[str]:
    if adds_bos(subject) and subject.template is not None and EMITS_BOS.match(subject.template):
        yield "add_bos_token is true, and the chat template begins with the token"


def space_prefix(subject: Subject) -> Iterator[str]:
    key = subject.gguf.keys.get(Keys.Tokenizer.ADD_PREFIX)
    if subject.tokens and (key is None or key.value is not False):
        yield "add_space_prefix is " + ("missing" if key is None else str(key.value).lower())


def chat_template(subject: Subject) -> Iterator[str]:
    if subject.template is None or not subject.template.strip():
        yield f"there is no {Keys.Tokenizer.CHAT_TEMPLATE}"


def sampling(subject: Subject) -> Iterator[str]:
    missing = [name for name, _ in SAMPLING if name not in subject.gguf.keys]
    if missing and subject.template is not None:
        yield ", ".join(missing)
