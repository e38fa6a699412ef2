"""Keys, vocabulary and layout of a file: lint's checks, and what its source says they should be.

    key                               is as it should be where
    gemma3n.*                         every number is the source's, to float32's rounding; one for all layers is as good
                                      as one for each; where it is missing, where llama.cpp takes the same (`ABSENT`)
    gemma3n.*, not in the source      it changes nothing (`HARMLESS`)
    tokenizer.ggml.tokens             texts are the same; padding may be left out, appended or named otherwise
    tokenizer.ggml.scores             normal tokens are in the same order: only that decides which are merged first
    tokenizer.ggml.token_type         tokens are of the same kind: letters, bytes, or found whole (`KINDS`)
    tokenizer.ggml.bos_token_id       it is the same
    tokenizer.ggml.eos_token_id       it is one of Gemma's two ends, of a text or of a turn
    tokenizer.ggml.eot_token_id       it is the end of a turn
    tokenizer.ggml.add_*              it means the same; where it is missing, what llama.cpp takes (`ADDS`)
    tokenizer.chat_template           it is the same but for whitespace
    everything else                   lint has nothing against it: names, sampling, padding and unknown tokens

The types of keys are lint's: each of these has one that readers demand.

Source: load_hparams and llama_vocab::impl::load of llama.cpp for what is taken where a key is missing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import Keys, TokenType
from numpy.typing import NDArray

from gguf3n.engines.reference_tokenizers import ADDS
from gguf3n.errors import GGUFError
from gguf3n.formats.gguf_reader import GGUFFile
from gguf3n.gemma3n import mmproj
from gguf3n.gemma3n.config import MAX_LAYERS
from gguf3n.gemma3n.part import Part, PartKind
from gguf3n.gemma3n.text import ARCH
from gguf3n.inspection import lint
from gguf3n.inspection.checks_model import REQUIRED
from gguf3n.inspection.checks_vocabulary import END_OF_TURN, SPECIAL_IDS
from gguf3n.inspection.subject import Subject
from gguf3n.validation.candidate import Candidate
from gguf3n.validation.document import Block, Text
from gguf3n.validation.result import Problem, StageResult, Verdict

TOLERANCE = 1e-6
"""Relative: float32 rounds by less than 6e-8, and a sparsity scale computed in it is off by 2e-8."""

MAX_SHIFT = 8
SHIFT_WINDOW = 1000
SHIFTED = 0.9
"""Tokens that are looked at to tell a shifted vocabulary from another one, and the share that must be the same."""

LLAMA_CPP_PERIOD = 5
"""Of the sliding pattern that llama.cpp takes where there is none: four sliding layers and a full one."""

Values = Mapping[str, Any]


def _key(name: str) -> str:
    return name.format(arch=ARCH)


def _head_length(gguf: GGUFFile) -> int:
    width, heads = (gguf.value(_key(name)) for name in (Keys.LLM.EMBEDDING_LENGTH, Keys.Attention.HEAD_COUNT))
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else 0


def _pattern(gguf: GGUFFile) -> list[bool]:
    n_layers = gguf.value(_key(Keys.LLM.BLOCK_COUNT))
    bids = range(min(n_layers, MAX_LAYERS) if isinstance(n_layers, int) else 0)
    return [bid % LLAMA_CPP_PERIOD < LLAMA_CPP_PERIOD - 1 for bid in bids]


ABSENT: Mapping[str, Callable[[GGUFFile], Any]] = {
    _key(Keys.Rope.FREQ_BASE): lambda _: 10_000.0,
    _key(Keys.Rope.FREQ_BASE_SWA): lambda _: 10_000.0,
    _key(Keys.Attention.HEAD_COUNT_KV): lambda gguf: gguf.value(_key(Keys.Attention.HEAD_COUNT)),
    _key(Keys.Attention.KEY_LENGTH): _head_length,
    _key(Keys.Attention.VALUE_LENGTH): _head_length,
    _key(Keys.Attention.SLIDING_WINDOW_PATTERN): _pattern,
}
"""What llama.cpp assumes where a file lacks the key, worked out from keys that it demands. Of other keys it has
Gemma 3n's values built in, or refuses the file."""

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    _key(Keys.Rope.SCALING_TYPE): ("none", "linear"),
    _key(Keys.Rope.SCALING_FACTOR): (0.0, 1.0),
    f"{ARCH}.rope.scale_linear": (1.0,),
    _key(Keys.Attention.CAUSAL): (True,),
    _key(Keys.LLM.EXPERT_COUNT): (0,),
}
"""Keys that llama.cpp reads of every model and no Gemma 3n has: with another value they make it another model."""

KINDS: Mapping[int, str] = {
    TokenType.NORMAL: "merged",
    TokenType.UNUSED: "merged",
    TokenType.BYTE: "byte",
    TokenType.CONTROL: "whole",
    TokenType.USER_DEFINED: "whole",
    TokenType.UNKNOWN: "whole",
}
"""How llama.cpp comes to a token of each type: merged from letters, for a byte, or found whole before that."""

_BOS = r"(?:\{\{-?\s*bos_token\s*-?\}\}|\{\{-?\s*['\"]<bos>['\"]\s*-?\}\}|<bos>)"
TWO_BOS = re.compile(rf"\A\s*(?:{_BOS}\s*){{2}}")
"""A chat template that begins with the begin token twice; it may be made in other ways, which `tokens` finds."""


@dataclass(frozen=True)
class StructureResult(StageResult):
    """What lint found, notes included; `problems` has its errors and warnings, and the differences from the source."""

    lint: lint.Report

    def lines(self) -> list[str]:
        return [f"{self.lint.n_checks} checks; keys and vocabulary against the source's"]

    def details(self) -> dict[str, Any]:
        return {"findings": [finding.as_dict() for finding in self.lint.findings]}

    def blocks(self, *, with_pictures: bool) -> Iterator[Block]:
        counts = ", ".join(f"{self.lint.count(severity)} {severity.name.lower()}s" for severity in lint.Severity)
        yield Text(f"{self.lint.n_checks} checks: {counts}.")


def check_structure(candidate: Candidate, source: Part) -> StructureResult:
    """Hold a file's keys and vocabulary against those that its source makes. A header that can't be read is a problem.

    Raises: GGUFError for a file that is not there.
    """
    started = time.perf_counter()
    try:
        report = lint.lint_file(candidate.gguf)
    except GGUFError as error:
        if not candidate.path.is_file():
            raise
        report = lint.unreadable(str(candidate.path), error)
        return StructureResult(tuple(_linted(report)), time.perf_counter() - started, report)
    problems = (*_linted(report), *_compare(candidate.subject, source))
    return StructureResult(problems, time.perf_counter() - started, report)


SEVERITIES: Mapping[lint.Severity, Verdict] = {
    lint.Severity.ERROR: Verdict.FAIL,
    lint.Severity.WARNING: Verdict.WARN,
}


def _linted(report: lint.Report) -> Iterator[Problem]:
    """One problem for each check that found something; notes are none."""
    by_check: dict[str, list[lint.Finding]] = {}
    for finding in report.findings:
        by_check.setdefault(finding.check.id, []).append(finding)
    for findings in by_check.values():
        check = findings[0].check
        if check.severity in SEVERITIES:
            more = f" and {len(findings) - 1:,} more" if len(findings) > 1 else ""
            what = f"{findings[0].found}{more}: {check.meaning}; {check.fix}"
            yield Problem(SEVERITIES[check.severity], check.id, what)


def _compare(subject: Subject, source: Part) -> Iterator[Problem]:
    """The file's keys against the source's."""
    gguf = subject.gguf
    expected = {key.name: key.value for key in source.keys}
    wanted = expected.get(Keys.General.ARCHITECTURE, ARCH)
    architecture = gguf.keys.get(Keys.General.ARCHITECTURE)
    if architecture is None or architecture.value != wanted:
        found = "none" if architecture is None else architecture.value
        yield _fail(Keys.General.ARCHITECTURE, wanted, found)
        return
    if source.kind is PartKind.MMPROJ:
        yield from _encoder_keys(gguf, expected)
        return
    if all(_key(name) in gguf.keys for name in REQUIRED):
        yield from _model_keys(gguf, expected)
    yield from _vocabulary(subject, expected)
    yield from _special_tokens(gguf, expected)
    yield from _chat_template(gguf, expected.get(Keys.Tokenizer.CHAT_TEMPLATE))


def _fail(where: str, expected: Any, found: Any) -> Problem:
    return Problem(Verdict.FAIL, where, f"expected {_text(expected)}, found {_text(found)}")


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.8g}" if isinstance(value, float) else str(value)


# gemma3n.*


def _model_keys(gguf: GGUFFile, expected: Values) -> Iterator[Problem]:
    for name, value in expected.items():
        if not name.startswith(f"{ARCH}."):
            continue
        difference = None
        if name in gguf.keys:
            difference = _difference(value, gguf.value(name))
        elif name in ABSENT and (difference := _difference(value, ABSENT[name](gguf))):
            difference = f"missing, and llama.cpp takes another value: {difference}"
        if difference:
            yield Problem(Verdict.FAIL, name, difference)
    for name, harmless in HARMLESS.items():
        if name in gguf.keys and name not in expected and gguf.value(name) not in harmless:
            yield _fail(name, "no such key", gguf.value(name))


def _difference(expected: Any, found: Any) -> str | None:
    """How two values differ, each a scalar or one for each layer; None where they do not."""
    if isinstance(expected, str) or isinstance(found, str):
        return None if expected == found else f"expected {_text(expected)}, found {_text(found)}"
    wanted, has = (value if isinstance(value, list | tuple) else [value] for value in (expected, found))
    if not wanted or not has or (len(wanted) != len(has) and 1 not in (len(wanted), len(has))):
        return f"expected {len(wanted)} items, found {len(has)}"
    n = max(len(wanted), len(has))
    wanted, has = (list(items) * (n if len(items) == 1 else 1) for items in (wanted, has))
    different = [i for i in range(n) if not _same(wanted[i], has[i])]
    if not different:
        return None
    first = different[0]
    text = f"expected {_text(wanted[first])}, found {_text(has[first])}"
    return text if n == 1 else f"{text} in layer {first}; {len(different)} of {n} layers differ"


def _same(expected: Any, found: Any) -> bool:
    if isinstance(expected, str) or isinstance(found, str):
        return bool(expected == found)
    return bool(np.isclose(float(expected), float(found), rtol=TOLERANCE, atol=0.0, equal_nan=True))


# clip.*


def _encoder_keys(gguf: GGUFFile, expected: Values) -> Iterator[Problem]:
    """llama.cpp has no value of its own for most of these keys, and the converter writes them all."""
    for name, value in expected.items():
        if name.startswith(f"{mmproj.ARCH}."):
            if name not in gguf.keys:
                yield _fail(name, value, "no such key")
            elif difference := _difference(value, gguf.value(name)):
                yield Problem(Verdict.FAIL, name, difference)
    for name in gguf.keys:
        if name.startswith(f"{mmproj.ARCH}.") and name not in expected:
            yield _fail(name, "no such key", gguf.value(name))


# vocabulary


@dataclass(frozen=True)
class _Tokens:
    """A vocabulary. `types` and `scores` are empty where they are missing or too few: lint names that."""

    texts: list[str]
    types: NDArray[np.int64]
    scores: NDArray[np.float32]


def _vocabulary(subject: Subject, expected: Values) -> Iterator[Problem]:
    gguf, names = subject.gguf, Keys.Tokenizer
    if names.MODEL in gguf.keys and names.MODEL in expected and gguf.value(names.MODEL) != expected[names.MODEL]:
        yield _fail(names.MODEL, expected[names.MODEL], gguf.value(names.MODEL))
        return
    a = _tokens(*(expected.get(name, ()) for name in (names.LIST, names.TOKEN_TYPE, names.SCORES)))
    b = _tokens(subject.tokens, subject.token_types, subject.scores)
    if not len(a.types) or not len(b.types):
        return
    yield from _lengths(a, b)
    n = min(len(a.texts), len(b.texts))
    same = np.fromiter((x == y for x, y in zip(a.texts, b.texts, strict=False)), bool, n)
    same |= (a.types[:n] == TokenType.UNUSED) & (b.types[:n] == TokenType.UNUSED)
    yield from _texts(a, b, same)
    yield from _types(a, b, same)
    if len(a.scores) and len(b.scores):
        yield from _scores(a, b, same & (a.types[:n] == TokenType.NORMAL) & (b.types[:n] == TokenType.NORMAL))


def _tokens(texts: Sequence[str], types: Any, scores: Any) -> _Tokens:
    n = len(texts)
    arrays = (np.asarray(() if values is None else values)[:n] for values in (types, scores))
    whole = [array if len(array) == n else np.empty(0) for array in arrays]
    types = np.where(np.isfinite(whole[0]), whole[0], -1).astype(np.int64)  # they may be floats in a faulty file
    return _Tokens(list(texts), types, whole[1].astype(np.float32))


def _lengths(a: _Tokens, b: _Tokens) -> Iterator[Problem]:
    """Padding and the marks of other modalities, which follow the text tokens, may be left out or appended."""
    n = min(len(a.texts), len(b.texts))
    more, fault = (a, "missing") if len(a.texts) > n else (b, "too much")
    for i in range(n, len(more.texts)):
        if more.types[i] not in (TokenType.UNUSED, TokenType.CONTROL) or more.texts[i].startswith("<unused"):
            counts = f"expected {len(a.texts):,} tokens, found {len(b.texts):,}"
            yield Problem(Verdict.FAIL, Keys.Tokenizer.LIST, f"{counts}: {more.texts[i]!r} (token {i:,}) is {fault}")
            return


def _texts(a: _Tokens, b: _Tokens, same: NDArray[np.bool_]) -> Iterator[Problem]:
    different = np.flatnonzero(~same)
    if not len(different):
        return
    first = int(different[0])
    what = f"the first at id {first:,}: {a.texts[first]!r} expected, {b.texts[first]!r} found"
    if shift := _shift(a.texts, b.texts, first):
        by = f"by {abs(shift)} {'up' if shift > 0 else 'down'} from id {first:,} on"
        yield Problem(Verdict.FAIL, Keys.Tokenizer.LIST, f"tokens are shifted {by}; {what}")
        return
    unnamed = {int(TokenType.UNUSED), int(TokenType.CONTROL)}
    is_padding = all({int(a.types[i]), int(b.types[i])} == unnamed for i in different)
    verdict = Verdict.WARN if is_padding else Verdict.FAIL
    yield Problem(verdict, Keys.Tokenizer.LIST, f"{_count(len(different))}, {what}")


def _count(n: int) -> str:
    return f"{n:,} tokens differ" if n > 1 else "1 token differs"


def _shift(wanted: list[str], found: list[str], first: int) -> int | None:
    """By how much the file's ids are too large from an id on; None where the tokens are not the same ones."""
    for distance in range(1, MAX_SHIFT + 1):
        for shift in (distance, -distance):
            a = wanted[first + max(-shift, 0) :][:SHIFT_WINDOW]
            b = found[first + max(shift, 0) :][:SHIFT_WINDOW]
            n = min(len(a), len(b))
            if n > MAX_SHIFT and sum(map(str.__eq__, a, b)) > SHIFTED * n:
                return shift
    return None


def _types(a: _Tokens, b: _Tokens, same: NDArray[np.bool_]) -> Iterator[Problem]:
    """Another kind changes what a text is cut into; a control token is only not shown."""
    n = len(same)
    different = [int(i) for i in np.flatnonzero(same & (a.types[:n] != b.types[:n]))]
    for verdict, ids in (
        (Verdict.FAIL, [i for i in different if KINDS.get(int(a.types[i])) != KINDS.get(int(b.types[i]))]),
        (Verdict.WARN, [i for i in different if TokenType.CONTROL in (a.types[i], b.types[i])]),
    ):
        if ids:
            first = ids[0]
            named = f"{_type_name(a.types[first])} expected, {_type_name(b.types[first])} found"
            what = f"{_count(len(ids))}, the first at id {first:,}, {a.texts[first]!r}: {named}"
            yield Problem(verdict, Keys.Tokenizer.TOKEN_TYPE, what)
            return


def _type_name(kind: int) -> str:
    return TokenType(kind).name.lower().replace("_", "-") if kind in KINDS else f"type {kind}"


def _scores(a: _Tokens, b: _Tokens, merged: NDArray[np.bool_]) -> Iterator[Problem]:
    """Among tokens that are merged from letters the order of the scores must be the same, ties included."""
    ids = np.flatnonzero(merged)
    expected, found = a.scores[ids], b.scores[ids]
    reordered = np.flatnonzero(_ranks(expected) != _ranks(found))
    if len(reordered):
        changed = min(np.flatnonzero(expected != found), reordered, key=len)
        at = int(changed[0])
        named = f"{a.texts[ids[at]]!r}: {_text(float(expected[at]))} expected, {_text(float(found[at]))} found"
        what = f"tokens are merged in another order; {_count(len(changed))}, the first at id {ids[at]:,}, {named}"
        yield Problem(Verdict.FAIL, Keys.Tokenizer.SCORES, what)


def _ranks(scores: NDArray[Any]) -> NDArray[np.int64]:
    ranks: NDArray[np.int64] = np.unique(scores, return_inverse=True)[1]
    return ranks


# special tokens


def _special_tokens(gguf: GGUFFile, expected: Values) -> Iterator[Problem]:
    names = Keys.Tokenizer
    ids = {text: i for i, text in reversed(list(enumerate(expected.get(names.LIST, ()))))}
    ends = [ids[text] for text in dict(SPECIAL_IDS)[names.EOS_ID] if text in ids]
    for name, allowed in (
        (names.BOS_ID, []),
        (names.EOS_ID, ends),
        (names.EOT_ID, [ids[END_OF_TURN]] if END_OF_TURN in ids else []),
    ):
        right = list(dict.fromkeys([expected[name], *allowed] if name in expected else allowed))
        if name in gguf.keys and right and gguf.value(name) not in right:
            yield _fail(name, " or ".join(map(str, right)), gguf.value(name))
    for name, default in ADDS.items():
        wanted, found = expected.get(name, default), gguf.value(name) if name in gguf.keys else default
        if wanted != found:
            yield _fail(name, wanted, found)


def _chat_template(gguf: GGUFFile, expected: Any) -> Iterator[Problem]:
    name = Keys.Tokenizer.CHAT_TEMPLATE
    found = gguf.keys[name].value if name in gguf.keys else None
    if not isinstance(found, str) or not found.strip():
        return  # lint names it
    if TWO_BOS.match(found):
        yield Problem(Verdict.FAIL, name, "it begins with the begin token twice")
    elif isinstance(expected, str) and "".join(expected.split()) != "".join(found.split()):
        at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
        what = f"not the source's, from character {at:,} on: {expected[at : at + 30]!r} expected, "
        yield Problem(Verdict.WARN, name, what + f"{found[at : at + 30]!r} found")
