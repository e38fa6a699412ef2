"""A GGUF file of Gemma 3n as the source of another: what `gguf3n quantize` reads.

Keys and values are taken over as they are, but for those that say how the file is quantized or split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from gguf.constants import Keys

from gguf3n.errors import MappingError, SourceError, UsageError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue
from gguf3n.formats.gguf_reader import GGUFArray, GGUFFile, open_part
from gguf3n.formats.source import FLOAT_DTYPES, SourceTensor
from gguf3n.gemma3n.metadata import ARCH
from gguf3n.gemma3n.model import Model
from gguf3n.gemma3n.tensors import MappedTensor, Missing, Rows, target_name, written_order

SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
REPLACED_KEYS = re.compile(r"general\.(file_type|quantization_version)|split\..+|quantize\.imatrix\..+")


def read_gguf_source(path: Path, *, allow_requantize: bool = False) -> Model:
    """Read the header of a GGUF file, or of all parts of a split one; no weights.

    Args:
        path: the file, or any part of a split file.
        allow_requantize: take a source that is quantized already.

    Raises: GGUFError; SourceError for another model or a missing part; MappingError for tensors that are not
        Gemma 3n's; UsageError for a quantized source.
    """
    parts = [open_part(part) for part in _parts(path)]
    first = parts[0]
    architecture = first.value(Keys.General.ARCHITECTURE) if Keys.General.ARCHITECTURE in first.keys else "none"
    if architecture != ARCH:
        raise SourceError(f"{path}: not a Gemma 3n", expected=f"general.architecture {ARCH}", found=str(architecture))
    n_layers = _number(first, Keys.LLM.BLOCK_COUNT)
    n_kv_layers = n_layers - _number(first, Keys.Attention.SHARED_KV_LAYERS)
    sources = {tensor.name: tensor for part in parts for tensor in _source_tensors(part)}
    tensors = []
    for rule, bid in written_order(n_layers):
        name = target_name(rule, bid)
        source = sources.pop(name, None)
        if source is None:
            raise MappingError(f"{path}: tensor {name!r} is missing", expected=f"it, in a model of {n_layers} layers")
        evaluated = rule.missing is Missing.ERROR or bid is None or bid < n_kv_layers
        n_rows = math.prod(source.shape[:-1])
        tensors.append(MappedTensor(name, source.shape, rule.storage, bid, (Rows(source, n_rows),), evaluated))
    if sources:
        found = ", ".join(sorted(sources)[:5])
        raise MappingError(f"{path}: {len(sources)} tensors that are not Gemma 3n's", found=found)
    quantized = sorted({dtype for tensor in tensors for dtype in tensor.source_dtypes} - set(FLOAT_DTYPES))
    if quantized and not allow_requantize:
        raise UsageError(
            f"{path}: quantized already",
            expected="a file in F32, F16 or BF16",
            found=", ".join(quantized),
            fix="quantize from the original; or add --allow-requantize and lose quality twice",
        )
    notices = []
    if quantized:
        notices.append(
            f"the source is quantized already ({', '.join(quantized)}): what it has lost is lost, and is rounded again"
        )
    return Model(str(path), path, _name(path), tuple(_keys(first)), tuple(tensors), tuple(notices))


def _parts(path: Path) -> list[Path]:
    match = SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    parts = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise SourceError(f"{part}: missing", expected=f"{count} parts", fix="download the missing part")
    return parts


def _name(path: Path) -> str:
    """The model's name in new file names: without the parts' numbers and the type at its end."""
    match = SPLIT_NAME.fullmatch(path.name)
    stem = match[1] if match else path.stem
    return re.sub(r"[-.](B?F16|F32)$", "", stem, flags=re.IGNORECASE)


def _source_tensors(gguf: GGUFFile) -> Iterator[SourceTensor]:
    if gguf.byte_order != "little":
        raise SourceError(f"{gguf.path}: big-endian", expected="a little-endian file")
    for tensor in gguf.tensors.values():
        yield SourceTensor(tensor.name, tensor.qtype.name, tensor.shape, gguf.path, tensor.offset)


def _keys(gguf: GGUFFile) -> Iterator[KeyValue]:
    for key in gguf.keys.values():
        if REPLACED_KEYS.fullmatch(key.name):
            continue
        if isinstance(key.value, GGUFArray):
            yield KeyValue(key.name, GGUFValueType.ARRAY, key.value.tolist(), key.value.element_type)
        else:
            yield KeyValue(key.name, key.type, key.value)


def _number(gguf: GGUFFile, key: str) -> int:
    name = key.format(arch=ARCH)
    value = gguf.value(name) if name in gguf.keys else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise SourceError(f"{gguf.path}: key {name} is unusable", expected="a whole number", found=str(value))
    return int(value)
