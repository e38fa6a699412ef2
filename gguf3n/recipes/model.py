"""Recipe, Rule and how a tensor's type is decided.

    1  overrides       --tensor-type, --ple, --token-embd: what the user names goes before everything
    2  unevaluated     one type for weights that are loaded but never used
    3  rules           the first that matches
    4  tables          token_embd and per_layer_token_embd
    5  the base type
    then               a type that fits, where rows hold no whole blocks of the one decided

A recipe knows names, shapes and layers, but neither a model nor a file.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from gguf.constants import MODEL_TENSOR, TENSOR_NAMES, LlamaFileType
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.errors import UsageError
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.recipes.layers import Layers

TOKEN_EMBD = TENSOR_NAMES[MODEL_TENSOR.TOKEN_EMBD] + ".weight"
PER_LAYER_TOKEN_EMBD = TENSOR_NAMES[MODEL_TENSOR.PER_LAYER_TOKEN_EMBD] + ".weight"
TABLES = (TOKEN_EMBD, PER_LAYER_TOKEN_EMBD)

PLE_TYPES = tuple(
    sorted(
        (qtype for qtype, row in GGML_TYPES.items() if row.gathered),
        key=lambda qtype: GGML_TYPES[qtype].block_bytes / GGML_TYPES[qtype].weights,
    )
)
"""Types of per_layer_token_embd whose rows every engine and backend gathers fast, the smallest first."""

UNEVALUATED_SUBSTITUTE = QType.Q2_K
"""# Why: of the types that need no importances, the smallest that every engine and GPU backend has."""


class For(enum.Enum):
    """The file that a recipe is for."""

    TEXT = "text"
    MMPROJ = "mmproj"


class Keep(enum.Enum):
    """The type of the matrices that are never quantized."""

    F16 = "f16"
    """F16 where it loses next to nothing, else BF16."""
    BF16 = "bf16"
    SOURCE = "source"
    """As in the checkpoint; BF16 for one in F32."""
    F32 = "f32"


class ImageRows(enum.Enum):
    """What the embedding tables have for <end_of_image>, where the checkpoint has a vision encoder."""

    MODEL = "model"
    """What the model embeds it as."""
    LLAMA_CPP = "llama.cpp"
    """Padding, as llama.cpp's converter writes it."""


@dataclass(frozen=True)
class Tensor:
    """What a rule may ask of a tensor.

    Args:
        name: GGUF name.
        n_per_row: row length.
        bid: its layer, if it is in one.
        n_layers: of the model.
        gqa: query heads for each key-value head.
        evaluated: False for weights that are loaded but never used.
        imatrix: whether an importance matrix was given.
        quant_weights: whether it has an entry for this tensor.
    """

    name: str
    n_per_row: int
    bid: int | None
    n_layers: int
    gqa: int = 4
    evaluated: bool = True
    imatrix: bool = False
    quant_weights: bool = False


@dataclass(frozen=True)
class Rule:
    """Tensors and the type they get. A condition that is None does not restrict.

    Args:
        patterns: shell-style patterns (* ? [...]) of the whole name, or regular expressions of it.
        place: where the rule stands, for messages.
        strict: whether a type that rows do not fit is an error; else a type that fits is taken.
    """

    patterns: tuple[str, ...]
    qtype: QType
    reason: str
    is_regex: bool = False
    layers: Layers | None = None
    imatrix: bool | None = None
    quant_weights: bool | None = None
    evaluated: bool | None = None
    row_multiple_of: int | None = None
    row_not_multiple_of: int | None = None
    min_gqa: int | None = None
    place: str = ""
    strict: bool = False

    def matches(self, tensor: Tensor) -> bool:
        """Whether the rule is for this tensor."""
        return (
            _named(self.patterns, self.is_regex, tensor.name)
            and (self.layers is None or (tensor.bid is not None and (tensor.bid, tensor.n_layers) in self.layers))
            and self.imatrix in (None, tensor.imatrix)
            and self.quant_weights in (None, tensor.quant_weights)
            and self.evaluated in (None, tensor.evaluated)
            and (self.row_multiple_of is None or tensor.n_per_row % self.row_multiple_of == 0)
            and (self.row_not_multiple_of is None or tensor.n_per_row % self.row_not_multiple_of != 0)
            and (self.min_gqa is None or tensor.gqa >= self.min_gqa)
        )


@dataclass(frozen=True)
class Decision:
    """The type of one tensor and why.

    Args:
        rule: the rule that gave it, in a word or two.
        lacks_importance: the type needs an importance matrix and there is none for this tensor.
    """

    qtype: QType
    reason: str
    rule: str
    lacks_importance: bool = False


VARIANT_LABELS = {"llama.cpp": "llama.cpp", "2025": "llama.cpp-2025"}
"""What stands before a mixture's name in the names of its variants' files.

Why before: `:Q4_K_M` finds what has `Q4_K_M.` or `Q4_K_M-` in its name, not `Q4_K_M@`. Why in lower case: of two such
files the first in the listing is taken, and capitals come first: `NAME-Q4_K_M.gguf` before `NAME-llama.cpp-…`.
"""


@dataclass(frozen=True)
class Recipe:
    """A named quantization.

    Args:
        qtype: of every matrix that nothing else decides.
        ftype: what the file says of itself.
        rules: the first that matches decides.
        token_embd, ple: of the two embedding tables, where no rule matches; else the base type.
        unevaluated: of weights that are never used; None treats them like all others.
        keep: of the matrices that are never quantized.
        image_rows: of the embedding tables.
        n_layers: of the model that it is for, if it is for one only.
        summary: one line of advice.
        note: what else a user should know, such as that it is a reconstruction.
        overrides: rules of the command line.
        part: the file that it is for.
        evidence: what its types were chosen by, where they were measured; lines.
    """

    name: str
    qtype: QType
    ftype: LlamaFileType
    rules: tuple[Rule, ...] = ()
    token_embd: QType | None = None
    ple: QType | None = None
    unevaluated: QType | None = None
    keep: Keep = Keep.F16
    image_rows: ImageRows = ImageRows.MODEL
    n_layers: int | None = None
    summary: str = ""
    note: str = ""
    overrides: tuple[Rule, ...] = ()
    part: For = For.TEXT
    evidence: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What stands for it in a file's name, as in "Q4_K_M" and "llama.cpp-Q4_K_M"."""
        base, _, variant = self.name.rpartition("@")
        return f"{VARIANT_LABELS[variant]}-{base}" if variant in VARIANT_LABELS else self.name

    def resolve(self, tensor: Tensor) -> Decision:
        """The type of a tensor that may be quantized.

        Raises: UsageError if a rule of the user's names a type whose blocks the rows do not hold.
        """
        decision, rule = self._decide(tensor)
        decision = _fit(decision, rule, tensor)
        if not GGML_TYPES[decision.qtype].needs_importances or tensor.quant_weights or tensor.name in TABLES:
            return decision
        if not tensor.evaluated:
            why = f"{decision.qtype.name} needs importances, which weights that are never evaluated can't have"
            return replace(decision, qtype=_fitting(UNEVALUATED_SUBSTITUTE, tensor.n_per_row), reason=why)
        return replace(decision, lacks_importance=True)

    def deciding_rule(self, tensor: Tensor) -> Rule | None:
        """The rule or override that decides, if one does."""
        return self._decide(tensor)[1]

    def _decide(self, tensor: Tensor) -> tuple[Decision, Rule | None]:
        for rule in self.overrides:
            if rule.matches(tensor):
                return Decision(rule.qtype, rule.reason, rule.place), rule
        if not tensor.evaluated and self.unevaluated is not None:
            return Decision(self.unevaluated, "smallest type: loaded, but never evaluated", "unevaluated"), None
        for rule in self.rules:
            if rule.matches(tensor):
                return Decision(rule.qtype, rule.reason, rule.place), rule
        if tensor.name == TOKEN_EMBD and self.token_embd is not None:
            return Decision(self.token_embd, "token embeddings are the output matrix too", "token_embd"), None
        if tensor.name == PER_LAYER_TOKEN_EMBD and self.ple is not None:
            return Decision(self.ple, "per-layer embeddings: rows are looked up, not multiplied", "ple"), None
        return Decision(self.qtype, "the base type", "type"), None


def _fit(decision: Decision, rule: Rule | None, tensor: Tensor) -> Decision:
    """The decision, or a type whose blocks the rows hold."""
    block_size = GGML_TYPES[decision.qtype].weights
    if tensor.n_per_row % block_size == 0:
        return decision
    if rule is not None and rule.strict:
        raise UsageError(
            f"{rule.place}: {decision.qtype.name} can't hold {tensor.name}",
            expected=f"rows of a multiple of {block_size} weights",
            found=f"rows of {tensor.n_per_row}",
            fix=f"use {_fitting(decision.qtype, tensor.n_per_row).name} there",
        )
    qtype = _fitting(decision.qtype, tensor.n_per_row)
    why = f"{decision.reason}; not {decision.qtype.name}, as rows of {tensor.n_per_row} hold no blocks of {block_size}"
    return replace(decision, qtype=qtype, reason=why)


def _fitting(qtype: QType, n_per_row: int) -> QType:
    """The type itself, its fallback, or F16: the first whose blocks the rows hold."""
    for candidate in (qtype, GGML_TYPES[qtype].fallback):
        if candidate is not None and n_per_row % GGML_TYPES[candidate].weights == 0:
            return candidate
    return QType.F16


def check_rules(recipe: Recipe, tensors: Sequence[Tensor]) -> None:
    """Make sure that each rule of the user's own decides some tensor, with an importance matrix or without.

    Raises: UsageError naming the first that does not, or for a recipe that is for a model of another depth.
    """
    if recipe.n_layers is not None and tensors[0].n_layers != recipe.n_layers:
        raise UsageError(
            f"{recipe.name}: the recipe is for another size of model",
            expected=f"{recipe.n_layers} layers",
            found=f"{tensors[0].n_layers}",
            fix="use one for this size, or write the layers of its rules as shares and remove n_layers",
        )
    own = [rule for rule in (*recipe.overrides, *recipe.rules) if rule.strict]
    if not own:
        return
    cases = ((False, False), (True, False), (True, True))
    variants = [replace(tensor, imatrix=i, quant_weights=q) for tensor in tensors for i, q in cases]
    deciding = {id(recipe.deciding_rule(tensor)) for tensor in variants}
    for rule in own:
        if id(rule) in deciding:
            continue
        named = " or ".join(rule.patterns)
        expected, fix = "a rule that decides at least one tensor", "remove it, or move it up"
        if not any(rule.matches(tensor) for tensor in variants):
            bare = replace(rule, layers=None, imatrix=None, quant_weights=None, evaluated=None)
            bare = replace(bare, row_multiple_of=None, row_not_multiple_of=None, min_gqa=None)
            if any(bare.matches(tensor) for tensor in variants):
                found = f"{named} matches, but its conditions never hold in this model of {tensors[0].n_layers} layers"
                fix = "correct the conditions"
            else:
                found = f"no matrix that may be quantized is named like {named}"
                fix = "patterns match whole names, as in '*attn_v*' or blk.3.ffn_down.weight"
        elif recipe.unevaluated is not None and not any(
            rule.matches(tensor) and tensor.evaluated for tensor in variants
        ):
            found = "it matches only weights that are never evaluated"
            fix = 'set unevaluated = "rules" in the recipe to give those a type by rule'
        else:
            found = f"earlier rules decide everything that {named} matches"
        raise UsageError(f"{rule.place}: a rule that can never match", expected=expected, found=found, fix=fix)


@lru_cache(maxsize=1 << 16)
def _named(patterns: tuple[str, ...], is_regex: bool, name: str) -> bool:
    """Whether one of the patterns is the name's. Why a cache: presets share most of their rules."""
    return any(_compiled(pattern, is_regex).fullmatch(name) for pattern in patterns)


@lru_cache(maxsize=1024)
def _compiled(pattern: str, is_regex: bool) -> re.Pattern[str]:
    return re.compile(pattern if is_regex else fnmatch.translate(pattern))
