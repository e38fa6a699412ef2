"""A GGUF file with a LoRA adapter as inspect and lint see it: its pairs, the tensors that they are for, their sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from gguf.constants import Keys

from gguf3n.formats.gguf_reader import GGUFFile, GGUFTensor
from gguf3n.gemma3n.config import LLAMA_CPP_FIXED
from gguf3n.gemma3n.lora import ALPHA_KEY, FILE_KIND, A, B, Effect, effect_of, rule_of_tensor
from gguf3n.gemma3n.mapping import Rule
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.gemma3n.text import dimensions

SKIPPED = "_norm.weight"
"""How the names of tensors end that llama.cpp passes over in an adapter."""

ALTUP = dict(LLAMA_CPP_FIXED)["altup_num_inputs"]
FIXED = {"altup": ALTUP, "altup_squared": ALTUP**2}
"""Sizes that every Gemma 3n has."""
OF_A_LAYER = "ffn"
"""The size that differs between layers of a slice, and between the published models."""


@dataclass(frozen=True)
class Pair:
    """What an adapter has for one tensor, either half of which may be missing."""

    target: str
    a: GGUFTensor | None
    b: GGUFTensor | None
    rule: Rule | None
    bid: int | None

    @property
    def halves(self) -> tuple[GGUFTensor, ...]:
        return tuple(half for half in (self.a, self.b) if half is not None)

    @property
    def rank(self) -> int | None:
        """Llama.cpp's: the row length of lora_b."""
        return None if self.b is None else self.b.shape[-1]

    @property
    def effect(self) -> Effect | None:
        """None for no matrix of a Gemma 3n."""
        return None if self.rule is None else effect_of(self.rule)

    def sizes(self) -> Iterator[tuple[GGUFTensor, str, int]]:
        """Each half, what the size that it shares with the tensor is called, and how large it is."""
        if self.rule is None or len(self.rule.shape) != 2 or any(len(half.shape) != 2 for half in self.halves):
            return
        if self.a is not None:
            yield self.a, self.rule.shape[1], self.a.shape[1]
        if self.b is not None:
            yield self.b, self.rule.shape[0], self.b.shape[0]


class AdapterFacts:
    """What follows from a file's keys and tensors, worked out when asked for."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf

    @cached_property
    def is_adapter(self) -> bool:
        """Whether it says that it is one, or has tensors of one."""
        kind = self.gguf.keys.get(Keys.General.TYPE)
        return (kind is not None and kind.value == FILE_KIND) or bool(self.pairs)

    @cached_property
    def pairs(self) -> Mapping[str, Pair]:
        """By the tensor that each is for."""
        tensors = self.gguf.tensors
        targets = dict.fromkeys(name[: -len(A)] for name in tensors if name.endswith((A, B)))
        return {
            target: Pair(target, tensors.get(target + A), tensors.get(target + B), *rule_of_tensor(target))
            for target in targets
        }

    @property
    def others(self) -> Iterator[str]:
        """Tensors that are no half of a pair, and that llama.cpp does not pass over."""
        return (name for name in self.gguf.tensors if not name.endswith((A, B, SKIPPED)))

    @cached_property
    def alpha(self) -> float | None:
        key = self.gguf.keys.get(ALPHA_KEY)
        return key.value if key is not None and isinstance(key.value, float) else None

    def scale(self, rank: int) -> float:
        """What llama.cpp makes of a product of this rank. Source: get_scale in src/llama-adapter.h."""
        return self.alpha / rank if self.alpha else 1.0

    @cached_property
    def expected(self) -> Mapping[tuple[str, int | None], int]:
        """What the sizes should be: those of every Gemma 3n, those of the published ones where the width is theirs, and
        what most of the pairs agree on. The FFN's is by layer."""
        votes: dict[tuple[str, int | None], Counter[int]] = {}
        for pair in self.pairs.values():
            for _, word, size in pair.sizes():
                votes.setdefault(self.word(word, pair), Counter())[size] += 1
        found = {word: counter.most_common(1)[0][0] for word, counter in votes.items()}
        published = dimensions(PUBLISHED["E2B"], None)
        known = dict(FIXED)
        if found.get(("embd", None)) == published["embd"]:
            known |= {word: published[word] for word in ("heads", "kv_heads", "ple", "laurel")}
        return found | {(word, None): size for word, size in known.items()}

    def word(self, word: str, pair: Pair) -> tuple[str, int | None]:
        """What a size is called, and its layer where that matters."""
        return word, pair.bid if word == OF_A_LAYER else None
