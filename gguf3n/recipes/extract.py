"""The recipe that reproduces a file's types, tensor by tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from gguf.constants import GGMLQuantizationType as QType
from gguf.constants import LlamaFileType

from gguf3n.errors import UsageError
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.recipes.layers import Layers, compress
from gguf3n.recipes.model import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD, Keep, Recipe, Rule
from gguf3n.recipes.toml import A_TYPE

LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(.+)")
QUANT_NAME = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_0|BF16|F16|F32))$", re.IGNORECASE)


def extract_recipe(
    origin: str, types: Mapping[str, QType], kept: Mapping[str, QType], ftype: LlamaFileType | None
) -> Recipe:
    """A recipe from a file's tensor table.

    Args:
        origin: the file, for the recipe's name and messages.
        types: of the matrices that may be quantized, by GGUF name.
        kept: types of the matrices that are never quantized.
        ftype: what the file says of itself.

    Raises: UsageError for a type that can't be written.
    """
    for name, qtype in types.items():
        if qtype not in GGML_TYPES:
            raise UsageError(f"{origin}: {name} is in a type that can't be written", expected=A_TYPE, found=qtype.name)
    layers: dict[str, dict[int, QType]] = {}
    for name, qtype in types.items():
        if match := LAYER_TENSOR.fullmatch(name):
            layers.setdefault(match[2], {})[int(match[1])] = qtype
    base = Counter(qtype for kind in layers.values() for qtype in kind.values()).most_common(1)[0][0]
    return Recipe(
        name=recipe_name(origin),
        qtype=base,
        ftype=ftype if ftype is not None else GGML_TYPES[base].ftype,
        rules=_rules(layers, base),
        token_embd=types[TOKEN_EMBD],
        ple=types[PER_LAYER_TOKEN_EMBD],
        unevaluated=None,
        keep=_keep(kept),
        n_layers=1 + max(bid for kind in layers.values() for bid in kind),
        summary=f"The types of {origin}, tensor by tensor.",
        note=_note(kept),
    )


def recipe_name(origin: str) -> str:
    """The quantization that a file's name ends in, or all of the name."""
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", re.split(r"[/\\:]", origin)[-1], flags=re.IGNORECASE)
    match = QUANT_NAME.search(stem)
    return match[1] if match else re.sub(r"[^\w.+@-]+", "-", stem) or "extracted"


def _rules(layers: Mapping[str, Mapping[int, QType]], base: QType) -> tuple[Rule, ...]:
    """Rules for all that is not in the base type, tensors with the same layers and type together."""
    groups: dict[tuple[QType, tuple[int | str, ...] | None], list[str]] = {}
    for kind, types in layers.items():
        for qtype in dict.fromkeys(types.values()):
            if qtype is base:
                continue
            bids = [bid for bid, other in types.items() if other is qtype]
            where = None if len(bids) == len(types) else tuple(compress(bids))
            groups.setdefault((qtype, where), []).append(f"blk.*.{kind}")
    return tuple(
        Rule(
            tuple(patterns),
            qtype,
            "as in the file",
            layers=None if where is None else Layers(tuple(map(str, where))),
            place=f"extracted rule {number}",
            strict=True,
        )
        for number, ((qtype, where), patterns) in enumerate(groups.items(), 1)
    )


def _note(kept: Mapping[str, QType]) -> str:
    """What of the file is not reproduced."""
    others = [name for name, qtype in kept.items() if qtype.name.lower() != _keep(kept).value]
    if not others:
        return ""
    what = f"{len(others)} tensors such as {others[0]}, in {kept[others[0]].name} there"
    return f"Not reproduced: {what}; here they stay in 16 bits."


def _keep(kept: Mapping[str, QType]) -> Keep:
    """The one 16-bit type of the matrices that are never quantized; most files have one."""
    counts = Counter(qtype.name.lower() for qtype in kept.values())
    usual = counts.most_common(1)[0][0] if counts else Keep.F16.value
    return Keep(usual) if usual in {Keep.F16.value, Keep.BF16.value, Keep.F32.value} else Keep.F16
