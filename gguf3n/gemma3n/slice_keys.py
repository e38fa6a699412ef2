"""What a GGUF file says of the slice that it has. Engines do not read it; validation does, as padding hides the widths.

gguf3n.slice.name                   as it was asked for
gguf3n.slice.skipped_layers         their numbers in the whole model; nothing where none is
gguf3n.slice.feed_forward_length    the true width of each layer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gguf.constants import Keys

from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.gguf_reader import GGUFArray, GGUFKey
from gguf3n.gemma3n.config import MAX_INT, MAX_LAYERS
from gguf3n.gemma3n.slices import Slice, SlicedCheckpoint, take_slice
from gguf3n.gemma3n.source import Checkpoint
from gguf3n.gemma3n.text import ARCH

NAME, SKIPPED, WIDTHS = (f"gguf3n.slice.{name}" for name in ("name", "skipped_layers", "feed_forward_length"))
MAX_NAME = 100


def slice_keys(wanted: Slice) -> list[KeyValue]:
    """What a file says of the slice that it has."""
    keys = [KeyValue(NAME, GGUFValueType.STRING, wanted.name)]
    for name, numbers in ((SKIPPED, wanted.skip), (WIDTHS, wanted.widths)):
        if numbers:
            keys.append(KeyValue(name, GGUFValueType.ARRAY, list(numbers), GGUFValueType.UINT32))
    return keys


def slice_in(keys: Mapping[str, GGUFKey]) -> Slice | None:
    """The slice that a file says it has; None where it says nothing that could be one."""
    name = keys[NAME].value if NAME in keys else None
    skip, widths = (_numbers_in(keys, key) for key in (SKIPPED, WIDTHS))
    if not isinstance(name, str) or len(name) > MAX_NAME or skip is None or not widths:
        return None
    return Slice(name, skip, widths)


def _numbers_in(keys: Mapping[str, GGUFKey], name: str) -> tuple[int, ...] | None:
    """Layers or widths; None for what is neither."""
    value = keys[name].value if name in keys else None
    if value is None:
        return ()
    if not isinstance(value, GGUFArray) or len(value) > MAX_LAYERS:
        return None
    numbers = [number for number in value if isinstance(number, int) and 0 <= number <= MAX_INT]
    return tuple(numbers) if len(numbers) == len(value) else None


def as_in_file(source: Checkpoint, keys: Mapping[str, GGUFKey]) -> Checkpoint:
    """What a file says that it was made of: a slice of a checkpoint, or, where that has none such, all of it."""
    wanted = slice_in(keys)
    if wanted is None or isinstance(source, SlicedCheckpoint):
        return source
    if len(wanted.skip) + len(wanted.widths) != source.config.num_hidden_layers:
        return source  # another model, or one that was sliced before
    is_true = _numbers_in(keys, Keys.LLM.FEED_FORWARD_LENGTH.format(arch=ARCH)) == wanted.widths
    try:
        made = take_slice(source, wanted, pad=not is_true)
    except UsageError:  # a smaller model
        return source
    return replace(made, notices=(*made.notices, f"held against slice {wanted.name} of {source.origin}"))
