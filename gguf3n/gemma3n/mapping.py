"""The mapping machine: source tensors -> output tensors, by a table of rules that somebody else has written.

An output tensor is a sequence of rows (see formats/rows.py): those of source tensors, stacked or alone, and zeros for
padding and for weights that are demanded and never evaluated. So what reads them needs to know nothing of either.
text.py holds the rules of the text file, mmproj.py those of the encoders' file.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gguf3n.errors import MappingError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.rows import FLOAT_DTYPES, Rows, SourceTensor, Stored, Zeros
from gguf3n.gemma3n.names import bare_name


class Storage(enum.Enum):
    """What a recipe may do with a tensor: why, and the type that it has whatever the recipe says."""

    FLOAT32 = ("stays F32: norms, scales and AltUp coefficients are small and sensitive", QType.F32)
    HALF = ("stays 16-bit: llama.cpp never quantizes AltUp, LAuReL and per-layer projection matrices", None)
    QUANTIZABLE = ("takes the recipe's type", None)
    NORM = ("stays F32: norms, scales and biases are small, and llama.cpp computes with them in F32", QType.F32)
    STEM = ("stays F32: the first convolution sees the image itself, and is tiny", QType.F32)
    AUDIO_CONVOLUTION = ("stays F32, as llama.cpp's converter has it: small, and nothing runs it yet", QType.F32)
    CONVOLUTION = ("takes the recipe's type: F16 or F32, which llama.cpp can run", None)
    DEPTHWISE = ("takes the recipe's type: F16 or BF16, which llama.cpp can run", None)

    def __init__(self, reason: str, forced: QType | None) -> None:
        self.reason = reason
        self.forced = forced

    @property
    def by_recipe(self) -> bool:
        """Whether a recipe's rules decide the type."""
        return self in (Storage.QUANTIZABLE, Storage.CONVOLUTION, Storage.DEPTHWISE)


class Missing(enum.Enum):
    """What a source without the tensor means."""

    ERROR = "an error"
    ZEROS_IF_KV_SHARED = "zeros in KV-shared layers, where llama.cpp loads but never evaluates it"


@dataclass(frozen=True)
class Rule:
    """One row of a table: where an output tensor comes from, what it is called, what becomes of it.

    `{bid}` stands for a layer, `{k}` for the matrices of a stack, which become the first dimension.

    Args:
        source: name in the checkpoint, without the prefix of its layout.
        target: name in the GGUF file.
        shape: of the source (of the whole stack), in numpy order, as words that `Table.sizes` knows.
        storage: what a recipe may do with it.
        missing: what a source without it means.
        pad_rows: zeros may be appended below.
        aliases: other names that the source may have.
        written: the shape that it is written in, where that is another, as words or numbers: [C] as ("1", "C", "1").
    """

    source: str
    target: str
    shape: tuple[str, ...]
    storage: Storage
    missing: Missing = Missing.ERROR
    pad_rows: bool = False
    aliases: tuple[str, ...] = ()
    written: tuple[str, ...] = ()

    @property
    def is_repeated(self) -> bool:
        """Whether each layer has one."""
        return "{bid}" in self.source

    @property
    def is_stack(self) -> bool:
        return "{k}" in self.source

    def name(self, bid: int | None) -> str:
        """The GGUF name of the output tensor."""
        return self.target.format(bid=bid)

    def sources(self, bid: int | None, n_stacked: int) -> list[tuple[str, ...]]:
        """The names that each of its source tensors may have: one tensor, or the matrices of a stack."""
        return [
            tuple(name.format(bid=bid, k=k) for name in (self.source, *self.aliases))
            for k in range(n_stacked if self.is_stack else 1)
        ]


@dataclass(frozen=True)
class Table:
    """The rules of one file, for a model of some size.

    Args:
        model: what it is, for messages.
        order: each output tensor's rule and layer, in the order of the file.
        dropped: patterns of names that are known and left out, each with the reason.
        n_stacked: matrices of a stack.
        sizes: what the words of the shapes mean in a layer.
        evaluated: False for weights that are loaded and never used.
        least_rows: that a tensor whose rows may be padded has.
        said_by: where the shapes come from, for messages.
    """

    model: str
    order: tuple[tuple[Rule, int | None], ...]
    dropped: tuple[tuple[str, str], ...]
    n_stacked: int
    sizes: Callable[[int | None], Mapping[str, int]]
    evaluated: Callable[[Rule, int | None], bool]
    least_rows: int
    said_by: str = "config.json says"

    def shape(self, words: tuple[str, ...], bid: int | None) -> tuple[int, ...]:
        """A shape in numbers; words may be numbers already."""
        sizes = self.sizes(bid)
        return tuple(int(word) if word.isdecimal() else sizes[word] for word in words)


@dataclass(frozen=True)
class MappedTensor:
    """An output tensor and where its rows come from, in order.

    Shapes: numpy order; rows are those of all leading dimensions together, a vector is one row. `rows` may have another
        row length, where the shape that is written is another than the source's.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    bid: int | None
    rows: tuple[Rows, ...]
    evaluated: bool = True
    """False for keys and values of KV-shared layers: loaded by llama.cpp, used by nobody."""
    plain_rows: tuple[Rows, ...] = ()
    """What llama.cpp's converter writes instead, where we mend some rows; see end_of_image.py."""

    @property
    def missing(self) -> bool:
        """Whether the source has nothing of it."""
        return not self.source_dtypes

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape) // self.n_per_row

    @property
    def n_per_row(self) -> int:
        return self.rows[0].n_per_row

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def source_dtypes(self) -> frozenset[str]:
        """The dtypes that its values are stored in; none where all rows are zeros."""
        return frozenset[str]().union(*(rows.dtypes for rows in self.rows))


@dataclass(frozen=True)
class TensorMap:
    """The whole mapping of a checkpoint."""

    tensors: tuple[MappedTensor, ...]
    dropped: tuple[tuple[str, int], ...]
    """Reason and number of source tensors, for each reason."""

    @property
    def synthesized(self) -> list[str]:
        """Names of the tensors that the source lacks and that are written as zeros."""
        return [tensor.name for tensor in self.tensors if tensor.missing]

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)


FOREIGN: tuple[tuple[str, str, str], ...] = (
    (r".*\.lora_[AB]\..*", "LoRA matrices, not a merged model", "merge the adapter: gguf3n convert BASE --adapter DIR"),
    (r".*\.base_layer\.weight", "a PEFT model with its adapters unmerged", "save model.merge_and_unload() instead"),
    (
        r".*\.(qweight|qzeros|scales|g_idx|absmax|quant_map|quant_state\..*|SCB|weight_format|weight_scale(_inv)?)",
        "a checkpoint that is quantized already",
        "convert the original checkpoint, or dequantize and save this one",
    ),
    (r".*_flat_param.*", "unconsolidated FSDP training shards", "consolidate first: accelerate merge-weights SRC DIR"),
)
"""Names that say what the checkpoint is instead: pattern, what it is, what to do."""

MAX_GROWTH = 2
"""Rows of a padded tensor for each that the source has; the published sizes add 256 to 262,144. What config.json claims
must not decide how large a file becomes."""

TOGETHER = "check that config.json and the safetensors files belong together, and that all of them are there"


def map_tensors(table: Table, source: Mapping[str, SourceTensor], origin: str) -> TensorMap:
    """Match every source tensor with exactly one rule and make every output tensor.

    Args:
        source: the checkpoint's tensors by their names.
        origin: the checkpoint, named in errors.

    Raises: MappingError for an unknown or missing tensor, a wrong shape or dtype.
    """
    found, dropped = _sort_names(table, source, origin)
    return TensorMap(tuple(_map_one(rule, bid, table, found, origin) for rule, bid in table.order), dropped)


def _sort_names(
    table: Table, source: Mapping[str, SourceTensor], origin: str
) -> tuple[dict[str, SourceTensor], tuple[tuple[str, int], ...]]:
    """Source tensors by their name in the rules, and how many were dropped for each reason."""
    wanted = {
        alias: names[0] for rule, bid in table.order for names in rule.sources(bid, table.n_stacked) for alias in names
    }
    found: dict[str, SourceTensor] = {}
    reasons: dict[str, int] = {}
    unknown: list[str] = []
    for name, tensor in source.items():
        bare = bare_name(name)
        reason = next((why for pattern, why in table.dropped if re.fullmatch(pattern, bare)), None)
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
        elif bare not in wanted:
            unknown.append(name)
        elif wanted[bare] in found:
            raise MappingError(
                f"{origin}: tensors {found[wanted[bare]].name!r} and {name!r} are the same weight",
                expected="one of them",
                fix="remove the files that belong to another save of the model",
            )
        else:
            found[wanted[bare]] = tensor
    if unknown:
        raise _unknown(unknown, origin)
    return found, tuple(reasons.items())


def _unknown(names: list[str], origin: str) -> MappingError:
    for pattern, what, fix in FOREIGN:
        for name in names:
            if re.fullmatch(pattern, name):
                return MappingError(f"{origin}: {what}", expected="the tensors of a Gemma 3n", found=name, fix=fix)
    shown = "\n".join(f"              {name}" for name in sorted(names)[:20])
    more = f"\n              and {len(names) - 20} more" if len(names) > 20 else ""
    return MappingError(
        f"{origin}: {len(names)} tensor(s) that no rule knows\n{shown}{more}",
        expected="the tensors of a Gemma 3n with as many layers as config.json says",
        fix=TOGETHER,
    )


def _map_one(rule: Rule, bid: int | None, table: Table, found: Mapping[str, SourceTensor], origin: str) -> MappedTensor:
    shape = table.shape(rule.shape, bid)
    written = table.shape(rule.written, bid) if rule.written else shape
    name = rule.name(bid)
    evaluated = table.evaluated(rule, bid)
    names = [aliases[0] for aliases in rule.sources(bid, table.n_stacked)]
    missing = [source for source in names if source not in found]
    if missing:
        if evaluated:
            raise MappingError(
                f"{origin}: tensor {missing[0]!r} is missing",
                expected=f"it, for {name}, in {table.model}",
                fix=TOGETHER,
            )
        return MappedTensor(name, written, rule.storage, bid, (Zeros(math.prod(shape[:-1]), shape[-1]),), evaluated)
    rows: list[Rows] = []
    expected = shape[1:] if rule.is_stack else shape
    for source in names:
        tensor = found[source]
        if not tensor.dtypes.issubset(FLOAT_DTYPES):
            raise MappingError(
                f"{tensor.origin} has a dtype that weights can't have",
                expected=", ".join(FLOAT_DTYPES),
                found=", ".join(sorted(tensor.dtypes)),
                fix="save the checkpoint in bfloat16",
            )
        padding = _padding(rule, tensor, expected, table)
        if padding is None:
            raise MappingError(
                f"{tensor.origin} has the wrong shape",
                expected=f"{list(expected)} as {table.said_by}",
                found=str(list(tensor.shape)),
                fix=TOGETHER,
            )
        rows += in_channels(tensor)
        if padding:
            rows.append(Zeros(padding, expected[-1]))
    return MappedTensor(name, written, rule.storage, bid, tuple(rows), evaluated)


def in_channels(tensor: SourceTensor) -> tuple[Rows, ...]:
    """Its rows; of a convolution's kernel an output channel each. Why: rows of three weights, or of one, take long."""
    if len(tensor.shape) < 3:
        return tensor.rows
    n_per_row = math.prod(tensor.shape[1:])
    return tuple(rows.in_rows_of(n_per_row) if isinstance(rows, Stored) else rows for rows in tensor.rows)


def _padding(rule: Rule, tensor: SourceTensor, expected: tuple[int, ...], table: Table) -> int | None:
    """Zero rows to append so that the shape fits; None where it can't.

    Why: the per-layer table has a row for each text token only, and llama.cpp wants as many rows in it as tokens.
    """
    if tensor.shape == expected:
        return 0
    if rule.pad_rows and len(tensor.shape) == 2 and tensor.shape[1] == expected[1]:
        n_rows = tensor.shape[0]
        if table.least_rows <= n_rows < expected[0] <= MAX_GROWTH * n_rows:
            return expected[0] - n_rows
    return None
