"""A PEFT adapter becomes what is written as a GGUF LoRA: the pairs that llama.cpp applies, with the scale in lora_b.

    lora_a                A as it is
    lora_b                B, times what llama.cpp's scale lacks: the module's alpha / lora_alpha, sqrt(rank) with rsLoRA
    adapter.lora.alpha    lora_alpha, times the scale that the user wants

So a plain LoRA's values are PEFT's own. What llama.cpp can't apply (see lora.py) is refused, or left out if wanted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from gguf.constants import Keys

from gguf3n.errors import MappingError, UsageError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.hub import is_repo_id
from gguf3n.formats.rows import Rows, Scaled, Stored, stored_tensors
from gguf3n.gemma3n.adapter import Adapter, Piece
from gguf3n.gemma3n.config import N_KV_LAYERS
from gguf3n.gemma3n.lora import ADAPTER_KIND, ALPHA_KEY, FILE_KIND, KIND_KEY, A, B, Effect, effect_of, rule_of_weight
from gguf3n.gemma3n.mapping import MappedTensor, Rule, Storage
from gguf3n.gemma3n.merging import IDLE, ONLY_ADDED, OUTPUT, check_kind, output_error
from gguf3n.gemma3n.mmproj import AUDIO_NAMES, VISION_NAMES
from gguf3n.gemma3n.part import Part, PartKind, text_part
from gguf3n.gemma3n.source import Source
from gguf3n.gemma3n.text import ARCH, RULES, is_evaluated

NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
"""Of a layer, or of one of a stack of matrices."""
LARGEST = float(np.finfo(np.float32).max)
NO_ENCODERS = "which llama.cpp loads no adapters for"

F32, STRING, U32 = GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.UINT32


class _Pair(NamedTuple):
    """What is written for a weight. Shapes: a [rank, inputs], b [outputs, rank]."""

    place: tuple[int, int]
    """The layer and the number of the rule, by which the file is ordered."""
    target: str
    bid: int | None
    a: Stored
    b: Rows

    def tensors(self) -> tuple[MappedTensor, MappedTensor]:
        rank, n_outputs = self.a.n_rows, self.b.n_rows
        storage = Storage.QUANTIZABLE
        return (
            MappedTensor(self.target + A, (rank, self.a.n_per_row), storage, self.bid, (self.a,)),
            MappedTensor(self.target + B, (n_outputs, rank), storage, self.bid, (self.b,)),
        )


def lora_part(
    adapter: Adapter, base: Source | None = None, *, scale: float = 1.0, drop_unsupported: bool = False
) -> Part:
    """What is to be written of an adapter.

    Args:
        base: the model that it is for: names and shapes are held against it.
        scale: how much of what it adds is added.
        drop_unsupported: leave out what llama.cpp does not apply.

    Raises: MappingError for an adapter of another model, or one that llama.cpp does not apply all of; UsageError for a
        scale that can't be written; SourceError or a class below it for the base.
    """
    return _LoRA(adapter, base, scale, drop_unsupported=drop_unsupported).part()


class _LoRA:
    """One adapter on its way into a file."""

    def __init__(self, adapter: Adapter, base: Source | None, scale: float, *, drop_unsupported: bool) -> None:
        self.adapter = adapter
        self.base = base
        self.known = {} if base is None else {tensor.name: tensor for tensor in text_part(base).tensors}
        self.alpha, self.unit = _alpha(adapter.alpha, scale)
        self.drop_unsupported = drop_unsupported
        self.left_out: Counter[str] = Counter()
        self.unsupported: dict[str, str] = {}

    def part(self) -> Part:
        pairs: list[_Pair] = []
        for weight, pieces in self.adapter.pieces.items():
            pieces = {piece: tensor for piece, tensor in pieces.items() if piece is not Piece.BASE}
            pair = self.pair(weight, pieces) if pieces else None
            if pair is not None:
                pairs.append(pair)
        self.check_supported()
        if not pairs:
            raise self.adapter.error(
                "nothing in it that llama.cpp applies",
                expected="LoRA of attention, feed-forward, AltUp coefficients, LAuReL or per-layer inputs",
                fix=self.merge_it(),
            )
        pairs.sort(key=lambda pair: pair.place)
        source = Source(
            origin=self.adapter.origin,
            path=self.adapter.path,
            name=self.adapter.name,
            tensors=stored_tensors(each for pieces in self.adapter.pieces.values() for each in pieces.values()),
        )
        tensors = tuple(tensor for pair in pairs for tensor in pair.tensors())
        return Part(PartKind.LORA, source, tuple(self.keys()), tensors, tuple(self.notices()))

    def pair(self, weight: str, pieces: Mapping[Piece, Stored]) -> _Pair | None:
        """What is written of a weight; None where it is left out. Raises: MappingError for one of another model."""
        if weight == OUTPUT:
            raise output_error(self.adapter)
        for names, what in ((AUDIO_NAMES, "audio"), (VISION_NAMES, "vision")):
            if weight.startswith(names):
                self.left_out[f"{what}, {NO_ENCODERS}; {self.merge_it()} --mmproj F16 merges them"] += 1
                return None
        rule, bid = rule_of_weight(weight)
        if rule is None or not self.is_in_base(rule.name(bid)):
            model = "any Gemma 3n" if self.base is None else self.base.origin
            raise self.adapter.error(
                f"{self.adapter.paths[weight]} is no module of {model}",
                expected="the weights of a Gemma 3n",
                fix=None if self.base is None else "give the base that it was trained on",
            )
        if not self.is_evaluated(rule, bid):
            self.left_out[IDLE] += 1
            return None
        why = self.why_not(weight, rule, check_kind(self.adapter, weight, pieces))
        if why is not None:
            self.unsupported[self.adapter.paths[weight]] = why
            return None
        a, b = pieces[Piece.A], pieces[Piece.B]
        self.check_shapes(weight, rule.name(bid), a, b)
        factor = self.adapter.alpha_of(weight) / self.unit
        if self.adapter.use_rslora:
            factor *= math.sqrt(a.n_rows)
        place = (-1 if bid is None else bid, RULES.index(rule))
        return _Pair(place, rule.name(bid), bid, a, b if factor == 1 else Scaled(b, factor))

    def why_not(self, weight: str, rule: Rule, kind: str) -> str | None:
        """Why llama.cpp can't apply what there is of a weight; None where it can. Raises: MappingError."""
        if kind not in ONLY_ADDED:
            return f"{kind}, which a GGUF adapter can't hold"
        effect = effect_of(rule)
        if effect is None:
            raise self.adapter.error(f"{self.adapter.paths[weight]} is no matrix", expected="a layer or an embedding")
        return None if effect is Effect.APPLIED else effect.value

    def is_in_base(self, name: str) -> bool:
        return self.base is None or name in self.known

    def is_evaluated(self, rule: Rule, bid: int | None) -> bool:
        """False for keys and values of KV-shared layers; without a base, of those of the published sizes."""
        return self.known[rule.name(bid)].evaluated if self.known else is_evaluated(rule, bid, N_KV_LAYERS)

    def check_shapes(self, weight: str, name: str, a: Stored, b: Stored) -> None:
        """Raises: MappingError where the two do not fit each other, or the base."""
        wanted = self.known[name].shape if self.known else (b.shape[0], a.shape[1])
        rank = a.shape[0]
        if a.shape == (rank, wanted[1]) and b.shape == (wanted[0], rank):
            return
        fits = "each other" if self.base is None else self.base.origin
        raise self.adapter.error(
            f"lora_A and lora_B of {self.adapter.paths[weight]} do not fit {fits}",
            expected=f"[rank, {wanted[1]}] and [{wanted[0]}, rank]",
            found=f"{list(a.shape)} and {list(b.shape)}",
            fix="give the base that it was trained on" if self.known else "save the adapter again",
        )

    def check_supported(self) -> None:
        """Raises: MappingError where something is not supported, and not to be left out."""
        if not self.unsupported or self.drop_unsupported:
            return
        n, total = len(self.unsupported), len(self.adapter.pieces)
        raise MappingError(
            f"{self.adapter.origin}: llama.cpp can't apply {n} of its {total} weights\n{self.listed()}",
            expected="LoRA of weights for which llama.cpp applies it",
            fix=f"{self.merge_it()} merges all of them; --drop-unsupported writes the others",
        )

    def listed(self) -> str:
        """What is not supported, by name: modules that differ by a number on one line."""
        numbers: dict[tuple[str, str], list[int]] = {}
        for path, why in self.unsupported.items():
            found = numbers.setdefault((NUMBER.sub(".*", path), why), [])
            found += [int(match[1]) for match in NUMBER.finditer(path)][:1]
        lines = [
            f"{path}{f' ({_spans(found)})' if found else ''}: {why}" for (path, why), found in sorted(numbers.items())
        ]
        return "\n".join(f"              {line}" for line in lines)

    def merge_it(self) -> str:
        base = self.base.origin if self.base is not None else "BASE"
        return f"gguf3n convert {base} --adapter {self.adapter.origin}"

    def keys(self) -> list[KeyValue]:
        """Source: LoraModel in convert_lora_to_gguf.py of llama.cpp."""
        keys = [
            KeyValue(Keys.General.ARCHITECTURE, STRING, ARCH),
            KeyValue(Keys.General.TYPE, STRING, FILE_KIND),
            KeyValue(Keys.General.NAME, STRING, self.adapter.name),
        ]
        trained_on = self.adapter.trained_on
        if trained_on is not None and is_repo_id(trained_on):
            keys += [
                KeyValue(Keys.General.BASE_MODEL_COUNT, U32, 1),
                KeyValue(Keys.General.BASE_MODEL_NAME.format(id=0), STRING, trained_on.rpartition("/")[2]),
                KeyValue(Keys.General.BASE_MODEL_REPO_URL.format(id=0), STRING, f"https://huggingface.co/{trained_on}"),
            ]
        return [*keys, KeyValue(KIND_KEY, STRING, ADAPTER_KIND), KeyValue(ALPHA_KEY, F32, self.alpha)]

    def notices(self) -> list[str]:
        """What a user should know of it."""
        origin = self.adapter.origin
        said = [f"{origin}: {notice}" for notice in self.adapter.notices]
        said += [f"{origin}: left out {count}: {why}" for why, count in self.left_out.items()]
        if self.unsupported:
            said.append(f"{origin}: left out {len(self.unsupported)} that llama.cpp can't apply\n{self.listed()}")
        return said


def _spans(numbers: Iterable[int]) -> str:
    """As in "0-4, 7"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _alpha(alpha: float, scale: float) -> tuple[float, float]:
    """What adapter.lora.alpha says, and the alpha of which a module's own is that much.

    Why: llama.cpp takes an alpha of 0 for none, and then counts the product in full.

    Raises: UsageError.
    """
    if not math.isfinite(scale) or scale == 0 or not abs(alpha * scale) <= LARGEST:
        raise UsageError(f"--scale {scale:g}", expected="a number that is not 0, and not too large for float32")
    written = float(np.float32(alpha * scale))
    return (written, alpha) if written else (1.0, 1 / scale)
