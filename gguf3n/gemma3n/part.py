"""One file to write, whatever its types: keys, and tensors with the place of their rows.

A source is written as one or two parts: the text model, and the vision and audio encoders, which llama.cpp reads from a
file of their own.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from gguf.constants import Keys

from gguf3n.errors import MappingError, SourceError, UsageError
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import KeyValue
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile
from gguf3n.formats.rows import SourceTensor
from gguf3n.gemma3n import mmproj, text
from gguf3n.gemma3n.encoders import read_encoders
from gguf3n.gemma3n.end_of_image import with_end_of_image
from gguf3n.gemma3n.lora import check_no_adapter
from gguf3n.gemma3n.mapping import MappedTensor, Rule, in_channels, map_tensors
from gguf3n.gemma3n.metadata import REPLACED_KEYS, general_keys, tokenizer_keys
from gguf3n.gemma3n.slice_keys import slice_keys
from gguf3n.gemma3n.slices import SlicedCheckpoint
from gguf3n.gemma3n.source import Checkpoint, GGUFSource, Source

READABLE = frozenset(qtype.name for qtype in GGML_TYPES)
"""Types of tensors that weights are read from."""


AGAIN = "take another file of this model, or convert its checkpoint again"
"""What to do about a GGUF file whose tensors are not a Gemma 3n's."""


class PartKind(enum.Enum):
    """What a file holds; the value is how its name is made."""

    TEXT = "{name}-{quant}.gguf"
    MMPROJ = "mmproj-{name}-{quant}.gguf"
    LORA = "{name}-{quant}-LoRA.gguf"


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


ENCODERS = ("vision", "audio")


def text_part(source: Source, *, beside: Collection[str] = ()) -> Part:
    """The text model of a source.

    Args:
        beside: which of ENCODERS go without a notice that they are left out: they have a file of their own.

    Raises: SourceError or a class below it; GGUFError.
    """
    if isinstance(source, GGUFSource):
        return _of_gguf(source)
    assert isinstance(source, Checkpoint), source
    return _of_checkpoint(source, tuple(beside))


def _of_checkpoint(source: Checkpoint, beside: tuple[str, ...]) -> Part:
    config = source.config
    mapping = map_tensors(text.table(config), source.tensors, source.origin)
    tensors, end_notices = with_end_of_image(mapping.tensors, source)
    vocabulary = source.vocabulary
    notices = [*source.notices, *vocabulary.notices, *end_notices]
    notices += [
        f"left out {count} source tensors: {reason}"
        for reason, count in mapping.dropped
        if not reason.startswith(beside)
    ]
    if synthesized := mapping.synthesized:
        notices.append(
            f"zeros for {len(synthesized)} tensors that the checkpoint lacks ({synthesized[0]} …): keys and values "
            "of KV-shared layers, which llama.cpp loads but never evaluates"
        )
    keys = (
        *general_keys(
            source.path, source.repo_id, text.ARCH, mapping.n_weights, folder=source.folder, changes=source.changes
        ),
        *text.model_keys(config),
        *(slice_keys(source.slice) if isinstance(source, SlicedCheckpoint) else ()),
        *tokenizer_keys(vocabulary),
    )
    return Part(PartKind.TEXT, source, keys, tensors, tuple(notices))


def mmproj_part(source: Source, *, vision: bool = True, audio: bool = True) -> Part:
    """The vision and audio encoders of a source.

    Args:
        vision, audio: which of the two are wanted.

    Raises: UsageError where neither is; SourceError or a class below it, also where one is wanted that is not there;
        GGUFError.
    """
    if not vision and not audio:
        raise UsageError("an mmproj file with neither vision nor audio", fix="leave one of --no-vision, --no-audio out")
    if isinstance(source, GGUFSource):
        return _mmproj_of_gguf(source, vision=vision, audio=audio)
    assert isinstance(source, Checkpoint), source
    encoders = read_encoders(source.raw_config, source.path, source.config.hidden_size, vision=vision, audio=audio)
    mapping = map_tensors(mmproj.table(encoders, source.tensors, source.origin), source.tensors, source.origin)
    notices = [*source.notices, *mmproj.concerns(encoders)]
    notices += [
        f"mmproj: left out {count} source tensors: {reason}"
        for reason, count in mapping.dropped
        if reason != mmproj.TEXT_REASON
    ]
    keys = (
        *general_keys(
            source.path,
            source.repo_id,
            mmproj.ARCH,
            mapping.n_weights,
            mmproj.FILE_KIND,
            folder=source.folder,
            changes=source.changes,
        ),
        *mmproj.model_keys(encoders),
    )
    return Part(PartKind.MMPROJ, source, keys, mapping.tensors, tuple(notices))


def _architecture(source: GGUFSource) -> str:
    key = source.gguf.keys.get(Keys.General.ARCHITECTURE)
    return "none" if key is None else str(key.value)


def check_kind(source: GGUFSource, kind: PartKind) -> None:
    """Refuse a file of another kind. Raises: SourceError."""
    wanted = {PartKind.TEXT: text.ARCH, PartKind.MMPROJ: mmproj.ARCH}[kind]
    found = _architecture(source)
    check_no_adapter(source.gguf)
    if found == wanted:
        return
    if {found, wanted} == {text.ARCH, mmproj.ARCH}:
        is_text = found == text.ARCH
        raise SourceError(
            f"{source.origin}: {'the text model' if is_text else 'the vision and audio encoders, not the text model'}",
            expected=f"general.architecture {wanted}",
            found=found,
            fix=f"give the {'mmproj' if is_text else 'text'} file instead; "
            f"to quantize this one, choose its types with {'--quant' if is_text else '--mmproj'}",
        )
    raise SourceError(f"{source.origin}: not a Gemma 3n", expected=f"general.architecture {wanted}", found=found)


def _mmproj_of_gguf(source: GGUFSource, *, vision: bool, audio: bool) -> Part:
    """Keys and values are taken over as they are, of the encoders that are there and wanted."""
    check_kind(source, PartKind.MMPROJ)
    projectors = [str(key.value) for name, key in source.gguf.keys.items() if name.endswith("projector_type")]
    if not {mmproj.VISION_PROJECTOR, mmproj.AUDIO_PROJECTOR}.intersection(projectors):
        raise SourceError(
            f"{source.origin}: the encoders of another model",
            expected=f"a projector {mmproj.VISION_PROJECTOR} or {mmproj.AUDIO_PROJECTOR}",
            found=", ".join(projectors) or "none",
        )
    dropped = [what for what, is_wanted in (("vision", vision), ("audio", audio)) if not is_wanted]
    tensors = {name: tensor for name, tensor in source.tensors.items() if mmproj.encoder_of(name) not in dropped}
    if not tensors:
        raise SourceError(
            f"{source.origin}: no {'vision' if vision else 'audio'} encoder",
            expected="the tensors of one that is wanted",
            found=f"{len(source.tensors)} tensors, all of another",
            fix="leave --no-vision and --no-audio out, or give a file that has it",
        )
    order = mmproj.order_of_names({name: tensor.shape for name, tensor in tensors.items()}, source.origin)
    mapped = [
        MappedTensor(rule.name(bid), mmproj.shape_from_gguf(rule, tensor), rule.storage, bid, in_channels(tensor))
        for rule, bid, tensor in _matched(order, tensors, source.origin, "the encoders of a Gemma 3n")
    ]
    left_out = re.compile("|".join(rf"clip\.(?:has_{what}_encoder|{what}\..+)" for what in dropped) or "(?!)")
    keys = tuple(key for key in _kept_keys(source.gguf) if not left_out.fullmatch(key.name))
    return Part(PartKind.MMPROJ, source, keys, tuple(mapped), source.notices)


def _of_gguf(source: GGUFSource) -> Part:
    """Keys and values are taken over as they are, but for those that say how the file is quantized or split."""
    check_kind(source, PartKind.TEXT)
    gguf = source.gguf
    n_layers = _number(gguf, Keys.LLM.BLOCK_COUNT)
    n_kv_layers = n_layers - _number(gguf, Keys.Attention.SHARED_KV_LAYERS)
    order = text.written_order(n_layers)
    tensors = [
        MappedTensor(
            tensor.name, tensor.shape, rule.storage, bid, tensor.rows, text.is_evaluated(rule, bid, n_kv_layers)
        )
        for rule, bid, tensor in _matched(order, source.tensors, source.origin, f"a model of {n_layers} layers")
    ]
    return Part(PartKind.TEXT, source, _kept_keys(gguf), tuple(tensors), source.notices)


def _matched(
    order: Iterable[tuple[Rule, int | None]], tensors: Mapping[str, SourceTensor], origin: str, model: str
) -> Iterator[tuple[Rule, int | None, SourceTensor]]:
    """Each rule with its tensor. Raises: MappingError for one that is missing, unreadable, or of no rule."""
    left = dict(tensors)
    for rule, bid in order:
        name = rule.name(bid)
        tensor = left.pop(name, None)
        if tensor is None:
            raise MappingError(f"{origin}: tensor {name!r} is missing", expected=f"it, in {model}", fix=AGAIN)
        _check_readable(tensor)
        yield rule, bid, tensor
    if left:
        found = ", ".join(sorted(left)[:5])
        raise MappingError(
            f"{origin}: {len(left)} tensors that are not Gemma 3n's",
            expected=f"those of {model}",
            found=found,
            fix=AGAIN,
        )


def _kept_keys(gguf: GGUFFile) -> tuple[KeyValue, ...]:
    """All keys but those that say how the file is quantized or split."""
    return tuple(
        KeyValue(key.name, key.type, key.value.tolist(), key.value.element_type)
        if isinstance(key.value, GGUFArray)
        else KeyValue(key.name, key.type, key.value)
        for key in gguf.keys.values()
        if not REPLACED_KEYS.fullmatch(key.name)
    )


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
