"""One file to write, whatever its types: keys, and tensors with the place of their rows.

A source is written as one or more parts: today the text model; vision and audio belong in a file of their own.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from gguf.constants import Keys

from gguf3n.errors import MappingError, SourceError
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import KeyValue
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile
from gguf3n.formats.rows import SourceTensor
from gguf3n.gemma3n import text
from gguf3n.gemma3n.mapping import MappedTensor, map_tensors
from gguf3n.gemma3n.metadata import REPLACED_KEYS, general_keys, tokenizer_keys
from gguf3n.gemma3n.source import Checkpoint, GGUFSource, Source

READABLE = frozenset(qtype.name for qtype in GGML_TYPES)
"""Types of tensors that weights are read from."""


class PartKind(enum.Enum):
    """What a file holds; the value is how its name is made."""

    TEXT = "{name}-{quant}.gguf"


@dataclass(frozen=True)
class Part:
    """What is to be written of a source, but for the types.

    `keys` are all but those that say how the file is quantized; `notices` are what a user should know, those of the
    source among them.
    """

    kind: PartKind
    source: Source
    keys: tuple[KeyValue, ...]
    tensors: tuple[MappedTensor, ...]
    notices: tuple[str, ...] = ()

    @property
    def n_weights(self) -> int:
        return sum(tensor.n_weights for tensor in self.tensors)

    def file_name(self, quant: str) -> str:
        """As in "gemma-3n-E4B-it-Q4_K_M.gguf"."""
        return self.kind.value.format(name=self.source.name, quant=quant)


def text_part(source: Source) -> Part:
    """The text model of a source.

    Raises: SourceError or a class below it; GGUFError.
    """
    if isinstance(source, GGUFSource):
        return _of_gguf(source)
    assert isinstance(source, Checkpoint), source
    return _of_checkpoint(source)


def _of_checkpoint(source: Checkpoint) -> Part:
    config = source.config
    mapping = map_tensors(text.table(config), source.tensors, source.origin)
    vocabulary = source.vocabulary
    notices = [*source.notices, *vocabulary.notices]
    notices += [f"left out {count} source tensors: {reason}" for reason, count in mapping.dropped]
    if synthesized := mapping.synthesized:
        notices.append(
            f"zeros for {len(synthesized)} tensors that the checkpoint lacks ({synthesized[0]} …): keys and values "
            "of KV-shared layers, which llama.cpp loads but never evaluates"
        )
    keys = (
        *general_keys(source.path, source.repo_id, text.ARCH, mapping.n_weights),
        *text.model_keys(config),
        *tokenizer_keys(vocabulary),
    )
    return Part(PartKind.TEXT, source, keys, mapping.tensors, tuple(notices))


def _of_gguf(source: GGUFSource) -> Part:
    """Keys and values are taken over as they are, but for those that say how the file is quantized or split."""
    gguf = source.gguf
    key = gguf.keys.get(Keys.General.ARCHITECTURE)
    if key is None or key.value != text.ARCH:
        found = "none" if key is None else str(key.value)
        raise SourceError(f"{source.origin}: not a Gemma 3n", expected=f"general.architecture {text.ARCH}", found=found)
    n_layers = _number(gguf, Keys.LLM.BLOCK_COUNT)
    n_kv_layers = n_layers - _number(gguf, Keys.Attention.SHARED_KV_LAYERS)
    left = dict(source.tensors)
    tensors = []
    for rule, bid in text.written_order(n_layers):
        name = rule.name(bid)
        tensor = left.pop(name, None)
        if tensor is None:
            raise MappingError(
                f"{source.origin}: tensor {name!r} is missing", expected=f"it, in a model of {n_layers} layers"
            )
        _check_readable(tensor)
        evaluated = text.is_evaluated(rule, bid, n_kv_layers)
        tensors.append(MappedTensor(name, tensor.shape, rule.storage, bid, tensor.rows, evaluated))
    if left:
        found = ", ".join(sorted(left)[:5])
        raise MappingError(f"{source.origin}: {len(left)} tensors that are not Gemma 3n's", found=found)
    keys = tuple(
        KeyValue(key.name, key.type, key.value.tolist(), key.value.element_type)
        if isinstance(key.value, GGUFArray)
        else KeyValue(key.name, key.type, key.value)
        for key in gguf.keys.values()
        if not REPLACED_KEYS.fullmatch(key.name)
    )
    return Part(PartKind.TEXT, source, keys, tuple(tensors), source.notices)


def _check_readable(tensor: SourceTensor) -> None:
    """Refuse a tensor that has no weights, or none that can be widened. Raises: MappingError."""
    if 0 in tensor.shape:
        raise MappingError(f"{tensor.origin} is empty", expected="weights", found=str(list(tensor.shape)))
    if unknown := tensor.dtypes.difference(READABLE):
        raise MappingError(
            f"{tensor.origin} has a type that weights can't be read from",
            expected=", ".join(sorted(READABLE)),
            found=", ".join(unknown),
        )


def _number(gguf: GGUFFile, key: str) -> int:
    name = key.format(arch=text.ARCH)
    value = gguf.value(name) if name in gguf.keys else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise SourceError(f"{gguf.path}: key {name} is unusable", expected="a whole number", found=str(value))
    return int(value)
