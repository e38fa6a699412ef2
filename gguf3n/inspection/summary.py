"""What a GGUF file holds, as values: model facts, a histogram of types, a grid of layers, tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gguf.constants import Keys, LlamaFileType, TokenType

from gguf3n.formats.gguf_layout import QType, Scalar
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, GGUFKey, GGUFTensor
from gguf3n.inspection.adapter_facts import AdapterFacts
from gguf3n.inspection.encoder_facts import EncoderFacts

LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(.+?)(\.weight)?")
PLAIN_TYPES = (QType.F32, QType.F16, QType.BF16)

FACTS: tuple[tuple[str, str], ...] = (
    ("name", Keys.General.NAME),
    ("size", Keys.General.SIZE_LABEL),
    ("layers", Keys.LLM.BLOCK_COUNT),
    ("width", Keys.LLM.EMBEDDING_LENGTH),
    ("FFN width", Keys.LLM.FEED_FORWARD_LENGTH),
    ("heads", Keys.Attention.HEAD_COUNT),
    ("KV heads", Keys.Attention.HEAD_COUNT_KV),
    ("KV-shared layers", Keys.Attention.SHARED_KV_LAYERS),
    ("context", Keys.LLM.CONTEXT_LENGTH),
    ("tokens", Keys.Tokenizer.LIST),
)
"""What a person wants to know of a model first, and the key that says it."""


@dataclass(frozen=True)
class TypeCount:
    """The tensors of one type."""

    qtype: QType
    n_tensors: int
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class LayerRun:
    """Consecutive layers whose tensors have the same types. `types` is by tensor, "" where a layer lacks it."""

    first: int
    last: int
    types: tuple[str, ...]


@dataclass(frozen=True)
class LayerGrid:
    """Which layer has which types: `columns` names the tensors that vary or are quantized, `constant` the others."""

    columns: tuple[str, ...]
    runs: tuple[LayerRun, ...]
    constant: dict[str, tuple[str, ...]]
    """By type, the tensors that have it in every layer and are not quantized."""
    globals: dict[str, str]
    """The tensors outside the layers and their types."""


@dataclass(frozen=True)
class Token:
    """An entry of the vocabulary; score and type where the file has them."""

    id: int
    text: str
    type: str | None
    score: float | None


def architecture(gguf: GGUFFile) -> str | None:
    """general.architecture, where it is a string."""
    key = gguf.keys.get(Keys.General.ARCHITECTURE)
    return key.value if key is not None and isinstance(key.value, str) else None


ENCODER_FACTS: tuple[tuple[str, str], ...] = (
    ("name", Keys.General.NAME),
    ("size", Keys.General.SIZE_LABEL),
    ("text width", "clip.vision.projection_dim"),
    ("image size", "clip.vision.image_size"),
    ("vision width", "clip.vision.embedding_length"),
    ("audio layers", "clip.audio.block_count"),
    ("audio width", "clip.audio.embedding_length"),
    ("mel bins", "clip.audio.num_mel_bins"),
)
"""The same of an mmproj file."""


def encoder_facts(gguf: GGUFFile) -> list[tuple[str, str]]:
    """Label and value of what Gemma 3n's encoders are; none of another file."""
    encoders = EncoderFacts(gguf)
    if not encoders.kinds:
        return []
    found = [("encoders", " and ".join(encoders.kinds))]
    if (tower := encoders.tower) is not None:
        by_stage = ", ".join(str(len(blocks)) for blocks in tower.stages)
        found.append(("vision blocks", f"{tower.n_blocks} (MobileNet-V5, stages of {by_stage})"))
    sizes = [gguf.keys.get(f"clip.vision.{name}") for name in ("image_size", "patch_size")]
    pixels, patch = (key.value if key is not None and isinstance(key.value, int) else 0 for key in sizes)
    if pixels and patch:
        found.append(("tokens an image", f"{pixels // patch}"))
    return found


ADAPTER_FACTS: tuple[tuple[str, str], ...] = (
    ("name", Keys.General.NAME),
    ("base model", Keys.General.BASE_MODEL_NAME.format(id=0)),
    ("adapter", Keys.Adapter.TYPE),
    ("alpha", Keys.Adapter.LORA_ALPHA),
)
"""The same of an adapter."""


def adapter_facts(gguf: GGUFFile) -> list[tuple[str, str]]:
    """Label and value of what a LoRA adapter has: ranks, and for each kind of tensor how many, and llama.cpp's scale;
    none of another file."""
    adapter = AdapterFacts(gguf)
    if not adapter.is_adapter:
        return []
    ranks: dict[str, list[int]] = {}
    for pair in adapter.pairs.values():
        name = LAYER_TENSOR.fullmatch(pair.target)
        kind = "others" if pair.rule is None else name[2] if name else pair.target.removesuffix(".weight")
        ranks.setdefault(kind, []).append(pair.rank or 0)
    every = [rank for found in ranks.values() for rank in found]
    return [
        ("rank", _range(every)),
        *(
            (kind, f"{len(found)}, scale " + _range(adapter.scale(rank) for rank in found if rank))
            for kind, found in ranks.items()
        ),
    ]


def _range(numbers: Iterable[float]) -> str:
    """As in "4" or "4 to 16"."""
    found = sorted(set(numbers)) or [0]
    return " to ".join(f"{number:.6g}" for number in dict.fromkeys((found[0], found[-1])))


def facts(gguf: GGUFFile) -> list[tuple[str, str]]:
    """Label and value of what is known of the model, in the order of FACTS."""
    arch = architecture(gguf)
    found = [] if arch is None else [("architecture", arch)]
    found += (encoders := encoder_facts(gguf))
    adapter = adapter_facts(gguf)
    for label, name in ENCODER_FACTS if encoders else ADAPTER_FACTS if adapter else FACTS:
        key = gguf.keys.get(name.format(arch=arch))
        if key is not None:
            found.append((label, _fact(key)))
    ftype = gguf.keys.get(Keys.General.FILE_TYPE)
    if ftype is not None:
        found.append(("file type", file_type_name(ftype.value)))
    if encoders or adapter:
        return found + adapter
    template = gguf.keys.get(Keys.Tokenizer.CHAT_TEMPLATE)
    found.append(("chat template", "none" if template is None else f"{len(str(template.value)):,} characters"))
    return found


def _fact(key: GGUFKey) -> str:
    value = key.value
    if not isinstance(value, GGUFArray):
        return f"{value:,}" if type(value) is int else str(value)
    if key.name == Keys.Tokenizer.LIST:
        return f"{len(value):,}"
    distinct = list(dict.fromkeys(value.head(1024)))
    return ", ".join(map(str, distinct[:8])) + (", …" if len(distinct) > 8 else "")


def file_type_name(value: Any) -> str:
    """As in "15 (MOSTLY_Q4_K_M)"."""
    try:
        return f"{value} ({LlamaFileType(value).name})"
    except ValueError:
        return f"{value} (unknown)"


def type_counts(gguf: GGUFFile) -> list[TypeCount]:
    """Most bytes first."""
    groups: dict[QType, list[GGUFTensor]] = {}
    for tensor in gguf.all_tensors:
        groups.setdefault(tensor.qtype, []).append(tensor)
    counts = [
        TypeCount(qtype, len(group), sum(t.n_weights for t in group), sum(t.n_bytes for t in group))
        for qtype, group in groups.items()
    ]
    return sorted(counts, key=lambda count: (-count.n_bytes, count.qtype))


def layer_grid(gguf: GGUFFile) -> LayerGrid:
    """Which layer has which types."""
    types: dict[str, dict[int, str]] = {}
    outside: dict[str, str] = {}
    for tensor in gguf.tensors.values():
        match = LAYER_TENSOR.fullmatch(tensor.name)
        if match is None:
            outside[tensor.name.removesuffix(".weight")] = tensor.qtype.name
        else:
            types.setdefault(match[2], {})[int(match[1])] = tensor.qtype.name
    layers = sorted({bid for by_layer in types.values() for bid in by_layer})
    plain = {qtype.name for qtype in PLAIN_TYPES}
    columns: list[str] = []
    constant: dict[str, list[str]] = {}
    for name, by_layer in types.items():
        found = {by_layer.get(bid, "") for bid in layers}
        if len(found) == 1 and found <= plain:
            constant.setdefault(found.pop(), []).append(name)
        else:
            columns.append(name)
    runs: list[LayerRun] = []
    for bid in layers:
        row = tuple(types[name].get(bid, "") for name in columns)
        if runs and runs[-1].types == row and runs[-1].last == bid - 1:
            runs[-1] = LayerRun(runs[-1].first, bid, row)
        else:
            runs.append(LayerRun(bid, bid, row))
    return LayerGrid(tuple(columns), tuple(runs), {t: tuple(names) for t, names in constant.items()}, outside)


def tokens(gguf: GGUFFile, first: int, last: int) -> list[Token]:
    """The tokens with ids from `first` to `last`, both included."""
    key = gguf.keys.get(Keys.Tokenizer.LIST)
    if key is None or not isinstance(key.value, GGUFArray):
        return []
    texts = key.value.head(last + 1)[first:]
    scores = _column(gguf, Keys.Tokenizer.SCORES, last + 1)[first:]
    kinds = _column(gguf, Keys.Tokenizer.TOKEN_TYPE, last + 1)[first:]
    return [
        Token(
            first + i,
            str(text),
            token_type_name(kinds[i]) if i < len(kinds) else None,
            float(scores[i]) if i < len(scores) else None,
        )
        for i, text in enumerate(texts)
    ]


def _column(gguf: GGUFFile, name: str, n: int) -> list[Scalar]:
    key = gguf.keys.get(name)
    return key.value.head(n) if key is not None and isinstance(key.value, GGUFArray) else []


def token_type_name(value: Any) -> str:
    """As in "control"; the number where llama.cpp knows none."""
    try:
        return str(TokenType(value).name.lower())
    except ValueError:
        return str(value)


def matching(names: Sequence[str], globs: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches; all where there is no pattern."""
    return [name for name in names if not globs or any(fnmatchcase(name, glob) for glob in globs)]
