"""Do llama.cpp and the reference tokenizer cut the same texts into the same tokens, and render the same chats.

Every text that differs is traced to the key that makes it differ, so that one fault is one problem:

    tokenizer.ggml.add_bos_token       the file's tokens are the reference's without the begin token
    tokenizer.ggml.bos_token_id        they begin with another token
    tokenizer.ggml.add_eos_token       they have an end token more
    tokenizer.ggml.tokens              the first token that differs has another text in the file
    tokenizer.ggml.add_space_prefix    it has the same text, and the key is true, as in no Gemma
    tokenizer.ggml.token_type          it is one that is found whole by one, merged from letters by the other
    tokenizer.ggml.scores              none of these: the same tokens, merged in another order
    tokenizer.chat_template            a chat is rendered as another text, or has two begin tokens
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from gguf.constants import Keys

from gguf3n.engines.reference_tokenizers import LlamaCppTokenizer, ReferenceTokenizer, Tokenizer, open_reference
from gguf3n.engines.template_process import Chat, TemplateStopped
from gguf3n.errors import GGUFError, TokenizerError
from gguf3n.gemma3n.source import Source
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.document import Block, Text
from gguf3n.validation.result import Problem, StageResult, Verdict
from gguf3n.validation.texts import CASES, CHATS, Case, built_in_text

ADD_BOS: str = Keys.Tokenizer.ADD_BOS
ADD_EOS: str = Keys.Tokenizer.ADD_EOS
ADD_PREFIX: str = Keys.Tokenizer.ADD_PREFIX
BOS_ID: str = Keys.Tokenizer.BOS_ID
TOKENS: str = Keys.Tokenizer.LIST
TOKEN_TYPE: str = Keys.Tokenizer.TOKEN_TYPE
SCORES: str = Keys.Tokenizer.SCORES
CHAT_TEMPLATE: str = Keys.Tokenizer.CHAT_TEMPLATE

CAUSES: Mapping[str, str] = {
    ADD_BOS: "the begin token is not added",
    BOS_ID: "another token is added at the beginning",
    ADD_EOS: "an end token is added",
    TOKENS: "a token has another text",
    ADD_PREFIX: "a space is added at the beginning and after special tokens",
    TOKEN_TYPE: "a token is found whole by one and merged from letters by the other",
    SCORES: "tokens are merged in another order",
}
"""Key, what is wrong with it."""

PRINTED = "'type': 'text'"
"""In a rendered chat: a template that knows no lists prints them; llama.cpp gives it the text alone."""

SNIPPET = 24
"""Characters shown of a text."""


@dataclass(frozen=True)
class TokensResult(StageResult):
    """`n_texts` were compared, chats included, `n_tokens` by the reference's count."""

    n_texts: int
    n_tokens: int

    def lines(self) -> list[str]:
        return [f"{self.n_texts} texts, {self.n_tokens:,} tokens"]

    def details(self) -> dict[str, Any]:
        return {"n_texts": self.n_texts, "n_tokens": self.n_tokens}

    def blocks(self, *, with_pictures: bool) -> Iterator[Block]:
        yield Text(f"{self.n_texts:,} texts, {self.n_tokens:,} tokens by the reference's count.")


@dataclass(frozen=True)
class Comparison:
    """A text and the token ids of both."""

    name: str
    expected: list[int]
    found: list[int]


def check_tokens(candidate: Candidate, reference: Source) -> TokensResult:
    """Hold llama.cpp's token ids for a file against those of a reference.

    Raises: UsageError: a package is not installed. SourceError or a class below it, GGUFError: the reference can't be
        read.
    """
    started = time.perf_counter()
    with closing(open_reference(reference)) as expected:
        texts = [(case.name, case.text, expected.encode(case.text)) for case in cases(expected.kind)]
        chats, in_reference = _rendered(expected)
        problems: list[Problem] = []
        compared: list[Comparison] = []
        try:
            with closing(LlamaCppTokenizer(candidate.subject)) as found:
                compared = [Comparison(name, ids, found.encode(text)) for name, text, ids in texts]
                for name, chat, text in chats:
                    outcome = _check_chat(name, chat, text, expected, found)
                    if isinstance(outcome, Comparison):
                        compared.append(outcome)
                    elif outcome is not None and not problems:  # the second would say the same
                        problems.append(outcome)
                problems = [*_traced(compared, expected, found), *in_reference, *problems]
        except GGUFError as error:
            problems.append(Problem(Verdict.FAIL, "vocabulary", error.one_line))
    n_tokens = sum(len(comparison.expected) for comparison in compared)
    return TokensResult(tuple(problems), time.perf_counter() - started, len(compared), n_tokens)


def cases(kind: Tokenizer) -> Iterator[Case]:
    """The texts on which a reference of this kind and llama.cpp agree: the built-in one's paragraphs, and the cases."""
    for paragraph in built_in_text().split("\n\n"):
        yield Case(paragraph[:SNIPPET], paragraph)
    yield from (case for case in CASES if kind not in case.unlike)


# texts


def _traced(
    compared: Sequence[Comparison], expected: ReferenceTokenizer, found: LlamaCppTokenizer
) -> Iterator[Problem]:
    """One problem for each key that makes texts differ."""
    by_cause: dict[str, list[tuple[str, str]]] = {}
    for comparison in compared:
        for cause, example in _trace(comparison, expected, found):
            by_cause.setdefault(cause, []).append((comparison.name, example))
    for cause in CAUSES:
        if cause in by_cause:
            name, example = by_cause[cause][0]
            n = f"{len(by_cause[cause])} of {len(compared)} texts"
            yield Problem(Verdict.FAIL, cause, f"{CAUSES[cause]}, in {n}; in {name!r} {example}")


def _trace(comparison: Comparison, expected: ReferenceTokenizer, found: LlamaCppTokenizer) -> Iterator[tuple[str, str]]:
    """The keys that make a text differ, and what is seen of it."""
    a, b = comparison.expected, comparison.found
    if a == b:
        return
    if a[:1] == [expected.bos_id] and not found.adds(ADD_BOS):
        yield ADD_BOS, _example(0, a, b, expected, found)
        a = a[1:]
    elif a[:1] == [expected.bos_id] != b[:1]:
        yield BOS_ID, _example(0, a, b, expected, found)
        a, b = a[1:], b[1:]
    if found.adds(ADD_EOS) and len(b) > len(a) and b[: len(a)] == a:
        yield ADD_EOS, _example(len(a), a, b, expected, found)
        b = b[: len(a)]
    if a == b:
        return
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    yield _cause(at, a, b, expected, found), _example(at, a, b, expected, found)


def _cause(at: int, a: list[int], b: list[int], expected: ReferenceTokenizer, found: LlamaCppTokenizer) -> str:
    """What makes the first different token differ."""
    if at < len(a) and expected.piece(a[at]) != found.piece(a[at]):
        return TOKENS
    if found.adds(ADD_PREFIX):
        return ADD_PREFIX
    if any(expected.is_whole(ids[at]) != found.is_whole(ids[at]) for ids in (a, b) if at < len(ids)):
        return TOKEN_TYPE
    return SCORES


def _example(at: int, a: list[int], b: list[int], expected: ReferenceTokenizer, found: LlamaCppTokenizer) -> str:
    wanted, has = (
        f"{ids[at]} ({tokenizer.piece(ids[at])!r})" if at < len(ids) else "none"
        for ids, tokenizer in ((a, expected), (b, found))
    )
    return f"token {at} is {has}, not {wanted}"


# chats


def _rendered(expected: ReferenceTokenizer) -> tuple[list[tuple[str, Chat, str | None]], list[Problem]]:
    """The chats as the reference renders them, and what is wrong with its template.

    Not those that its own template refuses, as some do a system message.
    """
    chats: list[tuple[str, Chat, str | None]] = []
    problems: list[Problem] = []
    for name, chat in CHATS.items():
        try:
            chats.append((name, chat, expected.render(chat)))
        except TemplateStopped as error:
            what = f"chats are not compared: the reference's template {error.found}"
            problems = [Problem(Verdict.WARN, CHAT_TEMPLATE, what)]
            chats.append((name, chat, None))
        except (TokenizerError, GGUFError):
            continue
    return chats, problems


def _check_chat(
    name: str, chat: Chat, text: str | None, expected: ReferenceTokenizer, found: LlamaCppTokenizer
) -> Problem | Comparison | None:
    """A chat as llama.cpp's server renders and cuts it: what is wrong with it, or the tokens after the begin token.

    None where there is nothing to compare.

    Args:
        text: as the reference renders it, None where that has no template.
    """
    if text is not None and PRINTED in text:
        return None
    try:
        rendered = found.render(chat)
    except TemplateStopped as error:
        return Problem(Verdict.FAIL, CHAT_TEMPLATE, f"it {error.found} in llama.cpp")
    except GGUFError as error:
        return Problem(Verdict.FAIL, CHAT_TEMPLATE, f"llama.cpp does not render {name}: {error.found}")
    if rendered is None:
        without = "there is none, and llama.cpp renders chats as ChatML"
        return None if text is None else Problem(Verdict.WARN, CHAT_TEMPLATE, without)
    ids = found.encode_rendered(rendered)
    n_bos = ids.count(found.bos_id)
    if n_bos != 1:
        return Problem(Verdict.FAIL, CHAT_TEMPLATE, _wrong_bos(n_bos, found.adds(ADD_BOS)))
    if text is None:
        return None
    wanted, has = _without_bos(text, expected), _without_bos(rendered, found)
    if wanted != has:
        at = next((i for i, (x, y) in enumerate(zip(wanted, has, strict=False)) if x != y), min(len(wanted), len(has)))
        shown = f"{wanted[at : at + SNIPPET]!r} expected, {has[at : at + SNIPPET]!r} found"
        return Problem(Verdict.FAIL, CHAT_TEMPLATE, f"{name} is rendered otherwise from character {at} on: {shown}")
    reference_ids = expected.encode_rendered(text)
    return Comparison(name, _after(reference_ids, expected.bos_id), _after(ids, found.bos_id))


def _after(ids: list[int], bos_id: int) -> list[int]:
    return ids[1:] if ids[:1] == [bos_id] else ids


def _without_bos(text: str, tokenizer: ReferenceTokenizer) -> str:
    return text.removeprefix(tokenizer.piece(tokenizer.bos_id))


def _wrong_bos(n: int, adds_bos: bool) -> str:
    if not n:
        return "a chat has no begin token: neither the template has it nor is it added"
    if not adds_bos:
        return f"a chat has {n} begin tokens in every engine"
    return (
        f"a chat has {n} begin tokens in llama.cpp, which drops one of the template's and adds its own, and {n + 1} in "
        "engines that drop none, as Ollama's before 0.30"
    )
