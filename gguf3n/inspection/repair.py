"""The fixes that are safe: for each check that has one, what it changes in the draft of a new header.

A fix is safe if what it writes follows from the file or from what every Gemma 3n has, or if it is never evaluated.
Weights are copied at most; none is computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, Keys, TokenType

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_draft import Draft, DraftTensor, grown
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType, Scalar
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, GGUFKey, open_part
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.mmproj import known_shapes
from gguf3n.gemma3n.text import ARCH
from gguf3n.gemma3n.tokenizer import BYTE_PIECE, UNUSED_SCORE
from gguf3n.inspection import checks_model as model
from gguf3n.inspection import checks_vocabulary as vocabulary
from gguf3n.inspection.lint import Finding, Report, Severity, lint_file
from gguf3n.inspection.subject import TABLES, Subject

MAX_ROUNDS = 4
"""A fix can bring another fault to light, as the number of layers does."""
MAX_ROWS = 1 << 22
"""Of a table that is padded; the published ones have a tenth of it."""
LOST = ("truncated", "overlap")
"""Problems with which a tensor's bytes are lost, so that nothing is to be made of them."""
COMPARE_BYTES = 1 << 22
HTML_TAGS = (
    "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|a|html|body|img|span|"
    "bbox|ul|li|div|iframe|footer"
)
TYPES_BY_TEXT: tuple[tuple[re.Pattern[str], TokenType], ...] = (
    (BYTE_PIECE, TokenType.BYTE),
    (re.compile(r"<unk>"), TokenType.CONTROL),
    (re.compile(r"<(pad|eos|bos|mask|2mass|unused\d+)>|\[@BOS@\]"), TokenType.CONTROL),
    (re.compile(r"<(start|end)_of_(turn|image|audio)>|<(image|audio)_soft_token>"), TokenType.CONTROL),
    (re.compile(r"\[multimodal\]|\n+|\t+|  +"), TokenType.USER_DEFINED),
    (re.compile(rf"</?({HTML_TAGS})>"), TokenType.USER_DEFINED),
    (re.compile(r"\[PAD\d+\]"), TokenType.UNUSED),
)
"""Types of Gemma's tokens by their texts, as its tokenizer files have them; all others are pieces."""

INTEGER_TYPES = frozenset(
    {
        GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.UINT16, GGUFValueType.INT16,
        GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.UINT64, GGUFValueType.INT64,
    }
)  # fmt: skip


Findings: TypeAlias = Sequence[Finding]
Fixer: TypeAlias = Callable[[Subject, Draft, Findings], Iterator[str]]
"""Changes the draft, and says what it did, from what one check found in the file as the fixes before it left it."""


@dataclass(frozen=True)
class Fix:
    """One fix that was made: the check it answers, and what it did."""

    check_id: str
    what: str


@dataclass(frozen=True)
class Repair:
    """What `repair` did or would do. `how` is "unchanged", "in place" or "copied"; `left` is what lint still finds."""

    path: Path
    fixes: tuple[Fix, ...]
    how: str
    left: tuple[Finding, ...]


def repair(
    path: str | Path, *, output: str | Path | None = None, only: Sequence[str] = (), dry_run: bool = False
) -> Repair:
    """Mend what lint finds, errors and warnings, or the faults that are named.

    Args:
        output: write another file; the default is the file itself, see `Draft.save`.
        only: ids of checks; also those that are only notes.

    Raises: GGUFError for a file that can't be read or rewritten; UsageError; OutputError.
    """
    for check_id in only:
        if check_id not in FIXES:
            raise UsageError(f"no fix for {check_id!r}", expected=", ".join(sorted(FIXES)), found=check_id)
    path = Path(path)
    draft = Draft(open_part(path, strict=False))
    fixes, report = plan_repair(draft, only)
    if dry_run:
        how = "unchanged" if not draft.changed else "copied" if draft.patches() is None else "in place"
    else:
        how = draft.save(None if output is None else Path(output))
    return Repair(path, tuple(fixes), how, report.findings)


def plan_repair(draft: Draft, only: Sequence[str] = ()) -> tuple[list[Fix], Report]:
    """Change the draft until lint finds nothing more that can be fixed; the fixes, and what lint still finds."""
    fixes: list[Fix] = []
    subject = Subject(draft.preview() if draft.changed else draft.gguf)
    report = lint_file(subject.gguf)
    for _ in range(MAX_ROUNDS):
        before = len(fixes)
        for check in dict.fromkeys(f.check for f in report.findings if _is_wanted(f, only, draft.gguf)):
            findings = tuple(check.findings(subject))  # what the fixes before this one have left
            made = [Fix(check.id, what) for what in FIXES[check.id](subject, draft, findings)] if findings else []
            if made:
                subject = Subject(draft.preview())
            fixes += made
        if len(fixes) == before:
            break
        report = lint_file(subject.gguf)
    return fixes, report


def _is_wanted(finding: Finding, only: Sequence[str], gguf: GGUFFile) -> bool:
    check = finding.check
    if check.id not in FIXES or (check.id not in only if only else check.severity is Severity.NOTE):
        return False
    return check.id not in MOVING or not any(problem.kind in LOST for problem in gguf.problems)


def _relay(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    if not draft.relaid:
        draft.relaid = True
        yield "place the tensors one after another, aligned"


def _drop_duplicate_keys(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    kept: dict[str, bytes] = {}
    for name, packed in list(draft.packed):
        if name not in kept:
            kept[name] = packed
        elif kept[name] == packed:
            draft.packed.reverse()
            draft.packed.remove((name, packed))
            draft.packed.reverse()
            yield f"remove the second {name}"


def _drop_empty_key(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    draft.unset("")
    yield "remove the key without a name"


def _drop_alignment(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    draft.unset(Keys.General.ALIGNMENT)
    yield f"remove {Keys.General.ALIGNMENT}: the default is 32"


def _drop_duplicate_tensors(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    kept: dict[str, DraftTensor] = {}
    for tensor in list(draft.tensors):
        first = kept.setdefault(tensor.name, tensor)
        if first is not tensor and _same_bytes(draft.gguf, first, tensor):
            del draft.tensors[max(i for i, other in enumerate(draft.tensors) if other is tensor)]
            yield f"remove the second {tensor.name}"


def _same_bytes(gguf: GGUFFile, a: DraftTensor, b: DraftTensor) -> bool:
    if (a.shape, a.qtype, a.n_source) != (b.shape, b.qtype, b.n_source):
        return False
    source = gguf.parts[0]
    return all(
        source.read_at(a.source + at, min(COMPARE_BYTES, a.n_source - at))
        == source.read_at(b.source + at, min(COMPARE_BYTES, a.n_source - at))
        for at in range(0, a.n_source, COMPARE_BYTES)
    )


def _set(draft: Draft, key: KeyValue, why: str) -> str:
    draft.set(key)
    return f"set {key.name} to {_text(key)} ({why})"


def _text(key: KeyValue) -> str:
    kind = key.type.name if key.element_type is None else f"array of {key.element_type.name}"
    if key.element_type is None:
        return f"{key.value!r}, {kind.lower()}"
    items = list(key.value) if isinstance(key.value, list | tuple) else []
    head = ", ".join(map(str, dict.fromkeys(items[:64])))
    return f"{len(items):,} items ({head[:40]}{'…' if len(head) > 40 else ''}), {kind.lower()}"


def _expected(why: str) -> Fixer:
    """A fixer that sets keys to the values that follow from the tensors or are the same in every Gemma 3n."""

    def fix(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
        wrong = {finding.where for finding in findings}
        for key in subject.expected_keys.values():
            if key.name in wrong:
                yield _set(draft, key, why)

    return fix


def _block_count(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    key = subject.expected_keys.get(Keys.LLM.BLOCK_COUNT.format(arch=ARCH))
    if key is not None and not any(model.missing_tensors(subject)):
        yield _set(draft, key, "the layers that have tensors")


def _retype_keys(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    """Give keys the types they should have: with their values where these fit, else with those expected."""
    for finding in findings:
        key = subject.gguf.keys[finding.where]
        if wanted := model.wanted_type(key):
            replacement = _converted(key, wanted) or subject.expected_keys.get(key.name)
            if replacement is not None:
                yield _set(draft, replacement, f"was {key.type_name}")


def _converted(key: GGUFKey, wanted: model.KeyType) -> KeyValue | None:
    """The same value in another type, where it fits exactly."""
    kind = wanted.kind
    if isinstance(key.value, GGUFArray) is not wanted.is_array:
        return None
    if isinstance(key.value, GGUFArray):
        items = [_fitted(item, kind) for item in key.value]
        return None if None in items else KeyValue(key.name, GGUFValueType.ARRAY, _known(items), kind)
    value = _fitted(key.value, kind)
    return None if value is None else KeyValue(key.name, kind, value)


def _known(items: list[Scalar | None]) -> list[Scalar]:
    return [item for item in items if item is not None]


def _fitted(value: Scalar, kind: GGUFValueType) -> Scalar | None:
    """A number as another kind of number; None where it does not fit."""
    if isinstance(value, str) or kind is GGUFValueType.STRING:
        return value if isinstance(value, str) and kind is GGUFValueType.STRING else None
    if kind is GGUFValueType.BOOL:
        return bool(value) if value in (0, 1) else None
    if kind in INTEGER_TYPES:
        if value != value or abs(value) >= 2**64 or value != int(value):
            return None
        bits = np.iinfo(np.dtype(kind.name.lower()))
        return int(value) if bits.min <= value <= bits.max else None
    number = float(value)
    overflows = kind is GGUFValueType.FLOAT32 and np.isfinite(number) and abs(number) > np.finfo(np.float32).max
    return None if overflows else number


def _add_idle_tensors(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    """Zeros for keys and values of KV-shared layers. Why: demanded by llama.cpp's loader, evaluated by nobody."""
    for name in [finding.where for finding in findings]:
        rule, bid = subject.wanted[name]
        shape = subject.expected_shape(rule, bid)
        query = subject.gguf.tensors.get(f"blk.{bid}.attn_q.weight")
        if shape is None:
            continue
        same_rows = query is not None and query.shape[-1] == shape[-1]
        qtype = query.qtype if query is not None and same_rows and rule.storage is not Storage.FLOAT32 else QType.F32
        draft.tensors.append(DraftTensor(name, shape, qtype))
        yield f"add {name} {list(shape)} {qtype.name}, zeros"


def _pad_tables(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    n_rows = max([len(subject.tokens), *(subject.n_rows(name) or 0 for name in TABLES)])
    if n_rows > MAX_ROWS:
        return
    for i, tensor in enumerate(draft.tensors):
        if tensor.name in TABLES and len(tensor.shape) == 2 and tensor.shape[0] < n_rows:
            draft.tensors[i] = grown(tensor, n_rows)
            yield f"append {n_rows - tensor.shape[0]:,} zero rows to {tensor.name}"
    n_tokens = len(subject.tokens)
    if not 0 < n_tokens < n_rows:
        return
    pad = range(n_tokens, n_rows)
    columns: tuple[tuple[str, GGUFValueType, Callable[[int], Scalar]], ...] = (
        (Keys.Tokenizer.LIST, GGUFValueType.STRING, lambda i: f"[PAD{i}]"),
        (Keys.Tokenizer.SCORES, GGUFValueType.FLOAT32, lambda _: UNUSED_SCORE),
        (Keys.Tokenizer.TOKEN_TYPE, GGUFValueType.INT32, lambda _: int(TokenType.UNUSED)),
    )
    for name, kind, value in columns:
        array = subject.array(name)
        if array is not None and len(array) == n_tokens and array.element_type is kind:
            draft.set(KeyValue(name, GGUFValueType.ARRAY, [*array, *map(value, pad)], kind))
    yield f"append {len(pad):,} unused tokens to the vocabulary"


def _is_gemma(subject: Subject) -> bool:
    return list(subject.tokens[:3]) == ["<pad>", "<eos>", "<bos>"]


def _scores(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    """Why: in Gemma's vocabulary pieces merge in the order of their ids; only the order of scores matters."""
    if _is_gemma(subject):
        scores = [-float(i) for i in range(len(subject.tokens))]
        draft.set(KeyValue(Keys.Tokenizer.SCORES, GGUFValueType.ARRAY, scores, GGUFValueType.FLOAT32))
        yield f"set {Keys.Tokenizer.SCORES} to minus the id"


def _types(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    if not _is_gemma(subject):
        return
    types = [int(_type_of(text)) for text in subject.tokens]
    draft.set(KeyValue(Keys.Tokenizer.TOKEN_TYPE, GGUFValueType.ARRAY, types, GGUFValueType.INT32))
    yield f"set {Keys.Tokenizer.TOKEN_TYPE} by the texts"


def _type_of(text: str) -> TokenType:
    return next((kind for pattern, kind in TYPES_BY_TEXT if pattern.fullmatch(text)), TokenType.NORMAL)


def _retype_tokens(texts: tuple[str, ...], right: tuple[TokenType, ...]) -> Fixer:
    def fix(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
        ids = vocabulary.wrong_types(subject, texts, right)
        array = subject.array(Keys.Tokenizer.TOKEN_TYPE)
        if not ids or array is None or subject.token_types is None:
            return
        types = subject.token_types.copy()
        types[ids] = int(right[0])
        draft.set(KeyValue(Keys.Tokenizer.TOKEN_TYPE, GGUFValueType.ARRAY, types.tolist(), array.element_type))
        yield f"set the type of {len(ids)} tokens to {right[0].name.lower()} ({subject.tokens[ids[0]]}, …)"

    return fix


def _special_ids(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    texts = dict(vocabulary.SPECIAL_IDS)
    for name in [finding.where for finding in findings]:
        token_id = next(subject.token_ids[text] for text in texts[name] if text in subject.token_ids)
        yield _set(draft, KeyValue(name, GGUFValueType.UINT32, token_id), subject.tokens[token_id])


def _flag(name: str, value: bool) -> Fixer:
    def fix(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
        yield _set(draft, KeyValue(name, GGUFValueType.BOOL, value), "as in every Gemma")

    return fix


def _one_bos(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    """Why from the template: the token is then added for every program alike, chat or not, exactly once."""
    template = vocabulary.EMITS_BOS.sub("", subject.template or "")
    draft.set(KeyValue(Keys.Tokenizer.CHAT_TEMPLATE, GGUFValueType.STRING, template.removeprefix("\n")))
    yield "remove the begin token from the chat template: the tokenizer adds it"


def _end_of_turn(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    token_id = subject.token_ids.get(vocabulary.END_OF_TURN)
    if token_id is not None:
        key = KeyValue(Keys.Tokenizer.EOT_ID, GGUFValueType.UINT32, token_id)
        yield _set(draft, key, vocabulary.END_OF_TURN)


def _sampling(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    for name, value in vocabulary.SAMPLING:
        if name not in subject.gguf.keys:
            kind = GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.INT32
            yield _set(draft, KeyValue(name, kind, value), "Google's generation_config.json")


def _file_type(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    ftype = model.guessed_file_type(subject)
    if ftype is not None:
        key = KeyValue(Keys.General.FILE_TYPE, GGUFValueType.UINT32, int(ftype))
        yield _set(draft, key, ftype.name)


def _quantization_version(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    if Keys.General.QUANTIZATION_VERSION not in subject.gguf.keys:
        key = KeyValue(Keys.General.QUANTIZATION_VERSION, GGUFValueType.UINT32, GGML_QUANT_VERSION)
        yield _set(draft, key, "ggml's, unchanged since 2023")


def _maps(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    """Write vectors as the maps that they are the channels of; no value changes."""
    names = {finding.where for finding in findings}
    for i, tensor in enumerate(draft.tensors):
        if tensor.name in names:
            draft.tensors[i] = replace(tensor, shape=known_shapes(subject.encoders.rules[tensor.name])[0])
            yield f"shape {tensor.name} {list(draft.tensors[i].shape)}"


def _own_projectors(subject: Subject, draft: Draft, findings: Findings) -> Iterator[str]:
    """Drop the common key where each encoder says its own projector."""
    own = [f"clip.{kind}.projector_type" for kind in subject.encoders.kinds]
    if all(name in subject.gguf.keys for name in own):
        draft.unset(Keys.Clip.PROJECTOR_TYPE)
        yield f"drop {Keys.Clip.PROJECTOR_TYPE}, as there is {' and '.join(own)}"


FIXES: Mapping[str, Fixer] = {
    "duplicate-key": _drop_duplicate_keys,
    "empty-key": _drop_empty_key,
    "alignment-key": _drop_alignment,
    "misaligned": _relay,
    "gaps": _relay,
    "trailing-bytes": _relay,
    "duplicate-tensor": _drop_duplicate_tensors,
    "missing-key": _expected("as the tensors and every Gemma 3n have it"),
    "assumed-key": _expected("as the tensors and every Gemma 3n have it"),
    "shared-kv-type": _retype_keys,
    "mistyped-key": _retype_keys,
    "array-length": _expected("one for each layer"),
    "block-count": _block_count,
    "size-key": _expected("as the tensors have it"),
    "missing-shared-kv": _add_idle_tensors,
    "table-rows": _pad_tables,
    "file-type": _file_type,
    "quantization-version": _quantization_version,
    "token-scores": _scores,
    "token-types": _types,
    "byte-type": _retype_tokens(vocabulary.BYTE_TOKENS, (TokenType.BYTE,)),
    "control-type": _retype_tokens(vocabulary.CONTROL_TOKENS, (TokenType.CONTROL, TokenType.USER_DEFINED)),
    "special-id": _special_ids,
    "no-bos": _flag(Keys.Tokenizer.ADD_BOS, True),
    "two-bos": _one_bos,
    "space-prefix": _flag(Keys.Tokenizer.ADD_PREFIX, False),
    "end-of-turn": _end_of_turn,
    "sampling": _sampling,
    "layer-scale": _maps,
    "mmproj-projector": _own_projectors,
}
"""By check. Checks without a row can't be mended from the file alone."""

MOVING = frozenset({"misaligned", "gaps", "trailing-bytes", "duplicate-tensor", "missing-shared-kv", "table-rows"})
"""Fixes that move tensors."""
