"""A LoRA adapter as a GGUF file: names, keys, and what llama.cpp does with one for each matrix of Gemma 3n.

    blk.0.ffn_up.weight.lora_a    [rank, inputs]
    blk.0.ffn_up.weight.lora_b    [outputs, rank]

Where llama.cpp multiplies by the tensor it adds s * (b @ a), s = adapter.lora.alpha / rank, the rank being b's row
length; an alpha of 0, or none, counts as s = 1. There is one alpha for all tensors, and no square root of a rank.

Source: src/llama-adapter.cpp and .h; build_lora_mm in src/llama-graph.cpp, and where src/models/gemma3n.cpp calls it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping

from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, Keys

from gguf3n.errors import SourceError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import GGUFFile
from gguf3n.gemma3n.mapping import Rule
from gguf3n.gemma3n.text import RULES

FILE_KIND, ADAPTER_KIND = "adapter", "lora"
"""general.type and adapter.type; with others llama.cpp does not load the file."""
KIND_KEY, ALPHA_KEY = Keys.Adapter.TYPE, Keys.Adapter.LORA_ALPHA

A, B = ".lora_a", ".lora_b"
"""How the names of a pair end, after the name of the tensor that it is for."""

QTYPES = (QType.F32, QType.F16, QType.BF16, QType.Q8_0)
"""Types that an adapter is written in."""


class Effect(enum.Enum):
    """What llama.cpp does with an adapter for a tensor."""

    APPLIED = "llama.cpp applies it"
    IGNORED = "llama.cpp loads an adapter for it and never applies it"
    ABORTS = "llama.cpp aborts with an adapter for it"


T, APPLIED, IGNORED = MODEL_TENSOR, Effect.APPLIED, Effect.IGNORED
EFFECTS: Mapping[str, Effect] = {
    f"{TENSOR_NAMES[tensor]}.weight": effect
    for tensor, effect in (
        (T.ATTN_Q, APPLIED),
        (T.ATTN_K, APPLIED),
        (T.ATTN_V, APPLIED),
        (T.ATTN_OUT, APPLIED),
        (T.FFN_GATE, APPLIED),
        (T.FFN_UP, APPLIED),
        (T.FFN_DOWN, APPLIED),
        (T.LAUREL_L, APPLIED),
        (T.LAUREL_R, APPLIED),
        (T.ALTUP_PREDICT_COEF, APPLIED),
        (T.ALTUP_CORRECT_COEF, APPLIED),
        (T.PER_LAYER_INP_GATE, APPLIED),
        (T.PER_LAYER_PROJ, APPLIED),
        (T.ALTUP_ROUTER, IGNORED),
        (T.ALTUP_PROJ, IGNORED),
        (T.ALTUP_UNEMBD_PROJ, IGNORED),
        (T.PER_LAYER_MODEL_PROJ, IGNORED),
        (T.PER_LAYER_TOKEN_EMBD, IGNORED),
        (T.TOKEN_EMBD, Effect.ABORTS),
    )
}
"""Of every matrix of the text model, by its rule's target."""


def check_no_adapter(gguf: GGUFFile) -> None:
    """Refuse an adapter where a model is wanted. Raises: SourceError."""
    key = gguf.keys.get(Keys.General.TYPE)
    if key is not None and key.value == FILE_KIND:
        raise SourceError(
            f"{gguf.name}: an adapter, not a model",
            expected="a file with a whole model",
            found=f"general.type {FILE_KIND}",
            fix="give the model; gguf3n convert BASE --adapter DIR merges an adapter of PEFT's into it",
        )


_NUMBERED = {"layers": "{bid}", "altup_projections": "{k}", "altup_unembed_projections": "{k}"}
_NUMBER = re.compile(rf"^({'|'.join(_NUMBERED)})\.(0|[1-9]\d{{0,2}})(?=\.)")
_BY_SOURCE = {rule.source: rule for rule in RULES}
_BY_TARGET = {rule.target: rule for rule in RULES}
_LAYER = re.compile(r"^blk\.(0|[1-9]\d{0,2})(?=\.)")


def rule_of_weight(weight: str) -> tuple[Rule | None, int | None]:
    """The rule and the layer of a tensor of a checkpoint, by its own name; two times None where no Gemma 3n has it."""
    match = _NUMBER.match(weight)
    if match is None:
        return _BY_SOURCE.get(weight), None
    rule = _BY_SOURCE.get(f"{match[1]}.{_NUMBERED[match[1]]}{weight[match.end() :]}")
    return rule, int(match[2]) if rule is not None and rule.is_repeated else None


def rule_of_tensor(name: str) -> tuple[Rule | None, int | None]:
    """The same by the name in a GGUF file; two times None where no Gemma 3n has it."""
    match = _LAYER.match(name)
    rule = _BY_TARGET.get(_LAYER.sub("blk.{bid}", name))
    return (rule, int(match[1])) if rule is not None and match is not None else (rule, None)


def effect_of(rule: Rule) -> Effect | None:
    """None for a vector."""
    return EFFECTS.get(rule.target)
