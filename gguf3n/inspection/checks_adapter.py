"""Checks of a LoRA adapter, and whether it fits a model. Each yields what is wrong, and where.

Source: llama_adapter_lora_init_impl in src/llama-adapter.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

from gguf.constants import Keys

from gguf3n.formats.gguf_layout import GGUFValueType
from gguf3n.gemma3n.config import N_KV_LAYERS
from gguf3n.gemma3n.lora import ADAPTER_KIND, ALPHA_KEY, FILE_KIND, KIND_KEY, A, B, Effect
from gguf3n.gemma3n.text import ARCH, is_evaluated
from gguf3n.inspection.adapter_facts import Pair
from gguf3n.inspection.found import FILE, Found, absent, named, said
from gguf3n.inspection.subject import Subject

KINDS = {
    Keys.General.ARCHITECTURE: str(ARCH),
    Keys.General.TYPE: FILE_KIND,
    KIND_KEY: ADAPTER_KIND,
}
"""Keys that llama.cpp wants to say exactly this."""


def kinds(subject: Subject) -> Iterator[Found]:
    for name, wanted in KINDS.items():
        key = subject.gguf.keys.get(name)
        if key is None:
            yield absent(name)
        elif key.value != wanted:
            yield Found(name, f"is {key.value!r}, not {wanted!r}")


def alpha_type(subject: Subject) -> Iterator[Found]:
    key = subject.gguf.keys.get(ALPHA_KEY)
    if key is not None and key.type is not GGUFValueType.FLOAT32:
        yield Found(ALPHA_KEY, f"is {key.type_name}, not float32")


def alpha(subject: Subject) -> Iterator[Found]:
    key = subject.gguf.keys.get(ALPHA_KEY)
    if key is None:
        yield absent(ALPHA_KEY)
    elif key.value == 0:
        yield Found(ALPHA_KEY, "is 0")


def no_pairs(subject: Subject) -> Iterator[Found]:
    if not subject.adapter.pairs:
        yield said(FILE, f"no tensor whose name ends with {A} or {B}")


def halves(subject: Subject) -> Iterator[Found]:
    for pair in subject.adapter.pairs.values():
        for half, end in ((pair.a, A), (pair.b, B)):
            if half is None:
                yield absent(pair.target + end)


def names(subject: Subject) -> Iterator[Found]:
    for name in subject.adapter.others:
        yield Found(name, f"ends with neither {A} nor {B}")
    for pair in subject.adapter.pairs.values():
        if pair.rule is None:
            yield Found(pair.target, "is no tensor of a Gemma 3n")


def _with_effect(subject: Subject, *effects: Effect | None) -> Iterator[Pair]:
    return (pair for pair in subject.adapter.pairs.values() if pair.rule is not None and pair.effect in effects)


def aborts(subject: Subject) -> Iterator[Found]:
    for pair in _with_effect(subject, Effect.ABORTS):
        yield named(pair.target, "has an adapter")


def ignored(subject: Subject) -> Iterator[Found]:
    for pair in _with_effect(subject, Effect.IGNORED, None):
        yield named(pair.target, "has an adapter")


def idle(subject: Subject) -> Iterator[Found]:
    for pair in subject.adapter.pairs.values():
        if pair.rule is not None and not is_evaluated(pair.rule, pair.bid, N_KV_LAYERS):
            yield named(pair.target, "has an adapter")


def ranks(subject: Subject) -> Iterator[Found]:
    for pair in _with_effect(subject, Effect.APPLIED):
        if pair.a is not None and pair.b is not None and pair.a.shape[:1] != pair.b.shape[-1:]:
            what = f"{list(pair.a.shape)} and {list(pair.b.shape)}, whose ranks differ"
            yield Found(pair.target, f"has an adapter of {what}")


def shapes(subject: Subject) -> Iterator[Found]:
    facts = subject.adapter
    for pair in _with_effect(subject, Effect.APPLIED):
        for half in pair.halves:
            if len(half.shape) != 2:
                yield Found(half.name, f"is {list(half.shape)}, and no matrix")
        for half, word, size in pair.sizes():
            expected = facts.expected[facts.word(word, pair)]
            if size != expected:
                yield Found(half.name, f"is {list(half.shape)}, and the size of the tensor is {expected}")


def missing_in_base(subject: Subject) -> Iterator[Found]:
    base = subject.base
    for pair in _with_effect(subject, *Effect):
        if base is not None and pair.target not in base.gguf.tensors:
            yield Found(pair.target, f"is not in {base.gguf.name}")


def shapes_in_base(subject: Subject) -> Iterator[Found]:
    base = subject.base
    for pair in _with_effect(subject, Effect.APPLIED):
        tensor = None if base is None else base.gguf.tensors.get(pair.target)
        if base is None or tensor is None or len(tensor.shape) != 2:
            continue
        for half, axis in ((pair.a, 1), (pair.b, 0)):
            if half is not None and len(half.shape) == 2 and half.shape[axis] != tensor.shape[axis]:
                yield Found(half.name, f"is {list(half.shape)}, for {list(tensor.shape)} in {base.gguf.name}")
