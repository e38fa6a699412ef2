"""Checks of the vocabulary and of what chat programs read. Each yields what is wrong, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from gguf.constants import Keys, TokenType

from gguf3n.gemma3n.tokenizer import CONTROL_TOKENS
from gguf3n.inspection.found import Found, absent, named, said
from gguf3n.inspection.subject import Subject

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
END_OF_TURN = "<end_of_turn>"

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


def missing_tokenizer(subject: Subject) -> Iterator[Found]:
    for name in (Keys.Tokenizer.MODEL, Keys.Tokenizer.LIST):
        if name not in subject.gguf.keys:
            yield named(name, "is missing")


def tokenizer_model(subject: Subject) -> Iterator[Found]:
    model = subject.text(Keys.Tokenizer.MODEL)
    if model is not None and model != "llama":
        yield Found(Keys.Tokenizer.MODEL, f"is {model!r}")


def scores(subject: Subject) -> Iterator[Found]:
    if not subject.tokens:
        return
    n = 0 if subject.scores is None else len(subject.scores)
    if n < len(subject.tokens):
        yield said(Keys.Tokenizer.SCORES, f"{n:,} scores for {len(subject.tokens):,} tokens")
    elif subject.scores is not None and len(subject.tokens) > 1 and not np.ptp(subject.scores[: len(subject.tokens)]):
        yield said(Keys.Tokenizer.SCORES, "all scores are the same")


def types(subject: Subject) -> Iterator[Found]:
    if not subject.tokens:
        return
    n = 0 if subject.token_types is None else len(subject.token_types)
    if n < len(subject.tokens):
        yield said(Keys.Tokenizer.TOKEN_TYPE, f"{n:,} types for {len(subject.tokens):,} tokens")


def duplicates(subject: Subject) -> Iterator[Found]:
    if len(subject.token_ids) == len(subject.tokens):
        return
    for i, text in enumerate(subject.tokens):
        if text and subject.token_ids[text] != i:
            yield Found(f"token {i}", f"is {text!r}, as is token {subject.token_ids[text]}")


def missing_bytes(subject: Subject) -> Iterator[Found]:
    if subject.tokens:
        missing = [text for text in BYTE_TOKENS if text not in subject.token_ids]
        if missing:
            yield said(Keys.Tokenizer.LIST, f"{len(missing)} of 256, the first {missing[0]}")


def byte_types(subject: Subject) -> Iterator[Found]:
    wrong = wrong_types(subject, BYTE_TOKENS, (TokenType.BYTE,))
    if wrong:
        what = f"{len(wrong)} byte tokens are not of type byte, the first {subject.tokens[wrong[0]]}"
        yield said(Keys.Tokenizer.TOKEN_TYPE, what)


def control_types(subject: Subject) -> Iterator[Found]:
    for token_id in wrong_types(subject, CONTROL_TOKENS, (TokenType.CONTROL, TokenType.USER_DEFINED)):
        kind = subject.token_type(token_id)
        where, what = f"token {token_id}", f"is of type {kind.name.lower() if kind else 'unknown'}"
        yield Found(where, what, f"{subject.tokens[token_id]} ({where}) {what}")


def wrong_types(subject: Subject, texts: tuple[str, ...], right: tuple[TokenType, ...]) -> list[int]:
    """Ids of the tokens with these texts whose type is another. None where the file has too few types."""
    if subject.token_types is None or len(subject.token_types) < len(subject.tokens):
        return []
    ids = (subject.token_ids[text] for text in texts if text in subject.token_ids)
    return [token_id for token_id in ids if subject.token_type(token_id) not in right]


def special_ids(subject: Subject) -> Iterator[Found]:
    if not subject.tokens:
        return
    for name, texts in SPECIAL_IDS:
        token_id = subject.integer(name)
        if not any(text in subject.token_ids for text in texts):
            continue
        if token_id is None:
            if name in (Keys.Tokenizer.BOS_ID, Keys.Tokenizer.EOS_ID):
                yield absent(name)
        elif not 0 <= token_id < len(subject.tokens):
            yield Found(name, f"is {token_id}, past the vocabulary")
        elif subject.tokens[token_id] not in texts:
            yield Found(name, f"is {token_id}, which is {subject.tokens[token_id]!r}")


def end_of_turn(subject: Subject) -> Iterator[Found]:
    """llama.cpp finds the token by its text; engines that read ids do not."""
    if subject.template is None or END_OF_TURN not in subject.template:
        return
    token_id = subject.token_ids.get(END_OF_TURN)
    if token_id is None:
        yield said(Keys.Tokenizer.LIST, f"the vocabulary has no {END_OF_TURN}")
    elif token_id not in [subject.integer(name) for name in (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID)]:
        yield said(Keys.Tokenizer.EOT_ID, f"neither eos_token_id nor eot_token_id is {token_id} ({END_OF_TURN})")


def adds_bos(subject: Subject) -> bool:
    """Whether the tokenizer begins with the begin token. Source: llama_vocab::impl::load, true for this tokenizer."""
    key = subject.gguf.keys.get(Keys.Tokenizer.ADD_BOS)
    return key is None or key.value is True


def no_bos(subject: Subject) -> Iterator[Found]:
    if not adds_bos(subject):
        chat = subject.template is not None and EMITS_BOS.match(subject.template)
        what = "add_bos_token is false" + (", only the chat template gives it" if chat else "")
        yield said(Keys.Tokenizer.ADD_BOS, what)


def two_bos(subject: Subject) -> Iterator[Found]:
    if adds_bos(subject) and subject.template is not None and EMITS_BOS.match(subject.template):
        yield said(Keys.Tokenizer.CHAT_TEMPLATE, "add_bos_token is true, and the chat template begins with the token")


def space_prefix(subject: Subject) -> Iterator[Found]:
    key = subject.gguf.keys.get(Keys.Tokenizer.ADD_PREFIX)
    if subject.tokens and (key is None or key.value is not False):
        what = "is " + ("missing" if key is None else str(key.value).lower())
        yield Found(Keys.Tokenizer.ADD_PREFIX, what, f"add_space_prefix {what}")


def chat_template(subject: Subject) -> Iterator[Found]:
    if subject.template is None or not subject.template.strip():
        yield absent(Keys.Tokenizer.CHAT_TEMPLATE)


def sampling(subject: Subject) -> Iterator[Found]:
    missing = [name for name, _ in SAMPLING if name not in subject.gguf.keys]
    if missing and subject.template is not None:
        yield said("general.sampling", ", ".join(missing))
