"""A GGUF file of Gemma 3n as lint and repair see it: what its tensors say, what its keys say, what they should say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, Keys, TokenType
from numpy.typing import NDArray

from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, GGUFTensor
from gguf3n.gemma3n.config import MAX_LAYERS, N_KV_LAYERS
from gguf3n.gemma3n.mapping import Missing, Rule
from gguf3n.gemma3n.published import PUBLISHED
from gguf3n.gemma3n.text import ARCH, model_keys, written_order
from gguf3n.inspection.adapter_facts import AdapterFacts
from gguf3n.inspection.encoder_facts import EncoderFacts
from gguf3n.inspection.scan import TensorFacts, scan
from gguf3n.progress import OnProgress
from gguf3n.recipes import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD

PUBLISHED_WIDTH = 2048

LAYER = re.compile(r"blk\.(0|[1-9]\d{0,2})\.")
OPTIONAL_TENSORS = frozenset({TENSOR_NAMES[MODEL_TENSOR.OUTPUT] + ".weight"})
"""llama.cpp takes it where it is there."""

TABLES = (TOKEN_EMBD, PER_LAYER_TOKEN_EMBD)

SIZE_WORDS = ("embd", "head", "heads", "kv_heads", "ple", "altup")

SIZE_KEYS: tuple[str, ...] = (
    Keys.LLM.BLOCK_COUNT,
    Keys.LLM.EMBEDDING_LENGTH,
    Keys.LLM.FEED_FORWARD_LENGTH,
    Keys.Attention.HEAD_COUNT,
    Keys.Attention.HEAD_COUNT_KV,
    Keys.Attention.KEY_LENGTH,
    Keys.Attention.VALUE_LENGTH,
    Keys.LLM.ALTUP_NUM_INPUTS,
    Keys.LLM.EMBD_LENGTH_PER_LAYER_INP,
    Keys.Attention.SHARED_KV_LAYERS,
)
"""Keys whose value the tensors' shapes say as well; of the last, their number and what llama.cpp has built in."""

CONSTANT_KEYS: tuple[str, ...] = (
    Keys.Rope.FREQ_BASE,
    Keys.Rope.FREQ_BASE_SWA,
    Keys.Attention.LAYERNORM_RMS_EPS,
    Keys.LLM.FINAL_LOGIT_SOFTCAPPING,
    Keys.LLM.ALTUP_ACTIVE_IDX,
    Keys.LLM.ACTIVATION_SPARSITY_SCALE,
)
"""Keys with the same value in every Gemma 3n."""

PUBLISHED_KEYS: tuple[str, ...] = (
    Keys.LLM.CONTEXT_LENGTH,
    Keys.Attention.SLIDING_WINDOW,
    Keys.Attention.SLIDING_WINDOW_PATTERN,
)
"""Keys with the same value in every Gemma 3n of the published width."""


@dataclass(frozen=True)
class Sizes:
    """What most tensors agree on, by the words of `tensors.RULES`; `ffn` for each layer."""

    by_word: Mapping[str, int]
    ffn: tuple[int, ...]


class Subject:
    """One opened file and what follows from it, worked out when asked for.

    Args:
        progress: told while `data` is read.
        mmproj: the mmproj file that is to be used with it.
        base: of an adapter, the model that it is to be used with.
        like: a file that is known to have the same vocabulary, which is then read once.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        progress: OnProgress | None = None,
        mmproj: Subject | None = None,
        *,
        base: Subject | None = None,
        like: Subject | None = None,
    ) -> None:
        self.gguf = gguf
        self.mmproj = mmproj
        self.base = base
        self._progress = progress
        self._like = like

    @cached_property
    def architecture(self) -> str | None:
        return self.text(Keys.General.ARCHITECTURE)

    @property
    def is_gemma3n(self) -> bool:
        """Whether it is the text model of one."""
        return self.architecture == str(ARCH) and not self.adapter.is_adapter

    @cached_property
    def adapter(self) -> AdapterFacts:
        """Of a LoRA adapter."""
        return AdapterFacts(self.gguf)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, and not one of another model."""
        return self.architecture in (None, str(ARCH)) and self.adapter.is_adapter

    @cached_property
    def encoders(self) -> EncoderFacts:
        """Of an mmproj file."""
        return EncoderFacts(self.gguf)

    @property
    def is_mmproj(self) -> bool:
        """Whether it is the mmproj file of a Gemma 3n."""
        return bool(self.encoders.kinds)

    def text(self, name: str) -> str | None:
        """A string key's value."""
        key = self.gguf.keys.get(name)
        return key.value if key is not None and isinstance(key.value, str) else None

    def number(self, name: str) -> int | float | None:
        """A number key's value; `{arch}` in its name is filled in."""
        key = self.gguf.keys.get(name.format(arch=ARCH))
        if key is None or isinstance(key.value, bool | str | GGUFArray):
            return None
        return key.value

    def integer(self, name: str) -> int | None:
        """A whole number, whatever its type."""
        value = self.number(name)
        return int(value) if value is not None and abs(value) < 2**63 and value == int(value) else None

    def array(self, name: str) -> GGUFArray | None:
        key = self.gguf.keys.get(name.format(arch=ARCH))
        return key.value if key is not None and isinstance(key.value, GGUFArray) else None

    @cached_property
    def layers(self) -> frozenset[int]:
        """The layers that have tensors."""
        numbers = (int(match[1]) for name in self.gguf.tensors if (match := LAYER.match(name)))
        return frozenset(n for n in numbers if n < MAX_LAYERS)

    @property
    def n_layers(self) -> int:
        return max(self.layers, default=-1) + 1

    @cached_property
    def wanted(self) -> dict[str, tuple[Rule, int | None]]:
        """Every tensor that a Gemma 3n of so many layers has."""
        return {rule.name(bid): (rule, bid) for rule, bid in written_order(self.n_layers)}

    def is_idle(self, name: str) -> bool:
        """Whether a tensor is one of the keys and values of KV-shared layers, which nobody evaluates."""
        rule, bid = self.wanted.get(name, (None, None))
        return rule is not None and rule.missing is not Missing.ERROR and bid is not None and bid >= N_KV_LAYERS

    @cached_property
    def sizes(self) -> Sizes:
        """What most tensors agree on. Why a vote: one tensor of a wrong shape shall not accuse all others."""
        votes: dict[str, Counter[int]] = {}
        ffn = [Counter[int]() for _ in range(self.n_layers)]
        for tensor, rule, bid in self.known_tensors():
            if len(rule.shape) != len(tensor.shape):
                continue
            for word, size in zip(rule.shape, tensor.shape, strict=True):
                if word == "ffn" and bid is not None:
                    ffn[bid][size] += 1
                elif word != "vocab":
                    votes.setdefault(word, Counter())[size] += 1
        words = {word: counter.most_common(1)[0][0] for word, counter in votes.items()}
        words["vocab"] = max((self.n_rows(name) or 0 for name in TABLES), default=0)
        return Sizes(words, tuple(counter.most_common(1)[0][0] if counter else 0 for counter in ffn))

    def known_tensors(self) -> Iterator[tuple[GGUFTensor, Rule, int | None]]:
        for name, (rule, bid) in self.wanted.items():
            tensor = self.gguf.tensors.get(name)
            if tensor is not None:
                yield tensor, rule, bid

    def expected_shape(self, rule: Rule, bid: int | None) -> tuple[int, ...] | None:
        """Of a tensor, as the other tensors have it; None where none says."""
        sizes = dict(self.sizes.by_word)
        if bid is not None:
            sizes["ffn"] = self.sizes.ffn[bid]
        shape = tuple(sizes.get(word, 0) for word in rule.shape)
        return shape if all(shape) else None

    def n_rows(self, table: str) -> int | None:
        tensor = self.gguf.tensors.get(table)
        return tensor.shape[0] if tensor is not None and len(tensor.shape) == 2 else None

    @cached_property
    def expected_keys(self) -> dict[str, KeyValue]:
        """The gemma3n.* keys whose values are known without config.json, by name."""
        words, n_layers = self.sizes.by_word, self.n_layers
        if not all((n_layers, *self.sizes.ffn, *(words.get(word) for word in SIZE_WORDS))):
            return {}
        published = PUBLISHED["E2B"]
        config = replace(
            published,
            num_hidden_layers=n_layers,
            hidden_size=words["embd"],
            hidden_size_per_layer_input=words["ple"],
            num_attention_heads=words["heads"] // words["head"],
            num_key_value_heads=words["kv_heads"] // words["head"],
            head_dim=words["head"],
            intermediate_size=self.sizes.ffn,
            altup_num_inputs=words["altup"],
            num_kv_shared_layers=max(n_layers - N_KV_LAYERS, 0),
            layer_types=(published.layer_types * MAX_LAYERS)[:n_layers],
            activation_sparsity_pattern=(0.95,) * min(10, n_layers) + (0.0,) * max(n_layers - 10, 0),
        )
        known = {*SIZE_KEYS, *CONSTANT_KEYS, *(PUBLISHED_KEYS if words["embd"] == PUBLISHED_WIDTH else ())}
        names = {name.format(arch=ARCH) for name in known}
        return {key.name: key for key in model_keys(config) if key.name in names}

    @cached_property
    def tokens(self) -> Sequence[str]:
        if self._like is not None:
            return self._like.tokens
        array = self.array(Keys.Tokenizer.LIST)
        if array is None or array.element_type is not GGUFValueType.STRING:
            return ()
        return [str(text) for text in array]

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """Id by text; of texts that stand twice, the first."""
        if self._like is not None:
            return self._like.token_ids
        return dict(zip(reversed(self.tokens), range(len(self.tokens) - 1, -1, -1), strict=True))

    @cached_property
    def scores(self) -> NDArray[Any] | None:
        return self._numbers(Keys.Tokenizer.SCORES)

    @cached_property
    def token_types(self) -> NDArray[Any] | None:
        return self._numbers(Keys.Tokenizer.TOKEN_TYPE)

    def _numbers(self, name: str) -> NDArray[Any] | None:
        array = self.array(name)
        if array is None or array.element_type in (GGUFValueType.STRING, GGUFValueType.BOOL):
            return None
        return array.numpy()

    def token_type(self, token_id: int) -> TokenType | None:
        types = self.token_types
        if types is None or token_id >= len(types) or not np.isfinite(types[token_id]):
            return None
        value = int(types[token_id])
        return TokenType(value) if value in TokenType._value2member_map_ else None

    @cached_property
    def data(self) -> Mapping[str, TensorFacts]:
        """What the bytes of each tensor say, by name; all of the file is read for it.

        Raises: GGUFError where the file ends early.
        """
        return scan(self.gguf, self._progress)

    @property
    def template(self) -> str | None:
        return self.text(Keys.Tokenizer.CHAT_TEMPLATE)
