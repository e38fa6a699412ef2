"""Hugging Face safetensors checkpoints: the tensor table now, rows when asked for.

    file     header length uint64 (little endian), header JSON, tensor data
    header   {"name": {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    shards   model.safetensors.index.json: {"weight_map": {"name": "model-00001-of-00003.safetensors"}}

Every header is checked in full before a weight is read: the ranges must tile the data without gap or overlap.

Source: the format section of the safetensors README.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf3n.errors import CheckpointError, SourceError, shown
from gguf3n.formats.byte_source import stamp
from gguf3n.formats.rows import DTYPE_BYTES, FLOAT_DTYPES, Stored
from gguf3n.formats.small_file import check_small, is_there, parse_json, read_checkpoint_json

MAX_HEADER_BYTES = 1 << 24
"""Gemma 3n's have a hundredth of it. The safetensors library itself allows six times as much, which is a gigabyte of
Python's objects."""
MAX_TENSORS = 1 << 16
"""Of a checkpoint, as of a GGUF file; Gemma 3n has less than two thousand."""

MAX_DIMENSIONS = 16
MAX_SIZE = 1 << 63
"""No dimension or offset of a real file is larger; Python's integers would not mind."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

FOREIGN_FILES: tuple[tuple[str, str, str], ...] = (
    ("adapter_config.json", "a PEFT adapter, not a model", "merge it into its base: gguf3n convert BASE --adapter DIR"),
    ("*.distcp", "unconsolidated FSDP training shards", "consolidate: accelerate merge-weights SRC DIR"),
    ("pytorch_model_fsdp*", "unconsolidated FSDP training shards", "consolidate: accelerate merge-weights SRC DIR"),
    ("zero_to_fp32.py", "unconsolidated DeepSpeed training shards", "consolidate: python zero_to_fp32.py . DIR"),
    ("global_step*", "unconsolidated DeepSpeed training shards", "consolidate: python zero_to_fp32.py . DIR"),
    ("pytorch_model*.bin", "a checkpoint in PyTorch's pickle format", "save it as safetensors: save_pretrained(DIR)"),
    ("*.gguf", "GGUF files, already converted", "give the Hugging Face checkpoint they were made from"),
)
"""What a directory without safetensors may hold instead: file pattern, what it is, what to do."""


def read_tensor_table(directory: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint directory, by name, every header checked.

    Raises: SourceError if it holds no safetensors checkpoint; CheckpointError for a broken one.
    """
    table: dict[str, Stored] = {}
    for path in _shards(directory):
        if len(table) > MAX_TENSORS:
            raise _too_many(path, len(table))
        for tensor in read_header(path):
            if tensor.name in table:
                raise CheckpointError(
                    f"{path}: tensor {tensor.name!r} is in {Path(table[tensor.name].file_name).name} as well",
                    expected="each tensor in one shard",
                    fix="remove the shards that belong to another model",
                )
            table[tensor.name] = tensor
    _check_index(directory, table)
    return table


def read_header(path: Path) -> list[Stored]:
    """The tensors of one safetensors file, in the order of their offsets.

    Raises: CheckpointError for anything but a complete and consistent file.
    """
    try:
        seen = stamp(path)
        file_bytes = check_small(path, MAX_SIZE, CheckpointError)
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _truncated(path, "a header of at least 8 bytes", file_bytes)
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file, or truncated",
                    expected=f"a header of at most {min(MAX_HEADER_BYTES, file_bytes - 8):,} bytes",
                    found=f"a claimed header of {header_bytes:,} bytes in a file of {file_bytes:,}",
                    fix="download the file again",
                )
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read", found=error.strerror or str(error)) from error
    header = parse_json(raw, f"{path}: the header", CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object", found=type(header).__name__)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _too_many(path, len(header))
    data_start = 8 + header_bytes
    tensors = [replace(_tensor(path, name, entry, data_start), stamp=seen) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.stored_bytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} {'overlaps another' if tensor.offset < position else 'leaves a gap'}",
                expected=f"data from byte {position:,}",
                found=f"data from byte {tensor.offset:,}",
                fix="download or save the file again",
            )
        position += tensor.stored_bytes
    if position > file_bytes:
        raise _truncated(path, f"{position:,} bytes", file_bytes)
    if position < file_bytes:
        raise CheckpointError(
            f"{path}: bytes after the last tensor", expected=f"{position:,} bytes", found=f"{file_bytes:,} bytes"
        )
    return tensors


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sane = len(shape) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < MAX_SIZE for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane or not isinstance(dtype, str):
        raise CheckpointError(
            f"{path}: the header entry of tensor {name!r} is malformed",
            expected="dtype, shape and data_offsets",
            found=shown(entry),
        )
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has an unknown dtype", expected=", ".join(FLOAT_DTYPES), found=dtype
        )
    tensor = Stored(name, dtype, shape, path, data_start + begin)
    if end - begin != tensor.stored_bytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} has a range that does not fit its shape",
            expected=f"{tensor.stored_bytes:,} bytes for {dtype} {list(shape)}",
            found=f"{end - begin:,} bytes",
        )
    return tensor


def _too_many(path: Path, n_tensors: int) -> CheckpointError:
    return CheckpointError(f"{path}: too many tensors", expected=f"at most {MAX_TENSORS:,}", found=f"{n_tensors:,}")


def _truncated(path: Path, expected: str, file_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: truncated", expected=expected, found=f"{file_bytes:,} bytes", fix="download the file again"
    )


def _shards(directory: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint; one whole file goes before an index, as in transformers."""
    if is_there(directory / SINGLE, CheckpointError):
        return [directory / SINGLE]
    index = directory / INDEX
    if is_there(index, CheckpointError):
        names = sorted(set(weight_map(index).values()))
        for name in names:
            if not is_there(directory / name, CheckpointError):
                raise CheckpointError(
                    f"{directory / name}: missing",
                    expected=f"the {len(names)} shards that {INDEX} names",
                    fix="download the missing shard",
                )
        return [directory / name for name in names]
    found = {match[0]: match for match in map(SHARD.fullmatch, _listing(directory)) if match}
    if found:
        count = int(next(iter(found.values()))[2])
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        missing = [name for name in names if name not in found]
        surplus = [name for name in sorted(found) if name not in names]
        if surplus:
            raise CheckpointError(
                f"{directory / surplus[0]}: a shard of another set",
                expected=f"shards of {count}, or {INDEX}",
                found=", ".join(sorted(found)),
                fix="remove the shards that belong to another save of the model",
            )
        if missing:
            raise CheckpointError(
                f"{directory / missing[0]}: missing",
                expected=f"{count} shards, or {INDEX}",
                found=", ".join(sorted(found)),
                fix="download the missing files",
            )
        return [directory / name for name in names]
    raise _not_a_checkpoint(directory)


def _listing(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read", found=error.strerror or str(error)) from error


def _not_a_checkpoint(directory: Path) -> SourceError:
    for pattern, what, fix in FOREIGN_FILES:
        if any(directory.glob(pattern)):
            expected = f"{SINGLE} or shards with {INDEX}"
            return SourceError(f"{directory}: {what}", expected=expected, found=pattern, fix=fix)
    names = _listing(directory)
    return SourceError(
        f"{directory}: no checkpoint here",
        expected=f"config.json, tokenizer files, {SINGLE} or shards with {INDEX}",
        found=", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "an empty directory",
    )


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, from an index file. Raises: CheckpointError."""
    shards = read_checkpoint_json(index).get("weight_map")
    sane = isinstance(shards, dict) and all(
        isinstance(name, str) and Path(name).name == name for name in shards.values()
    )
    if not sane or not shards:
        raise CheckpointError(f"{index}: the weight map is unusable", expected="tensor names -> file names beside it")
    return dict(shards)


def _check_index(directory: Path, table: dict[str, Stored]) -> None:
    index = directory / INDEX
    if is_there(directory / SINGLE, CheckpointError) or not is_there(index, CheckpointError):
        return
    for name, shard in weight_map(index).items():
        if name not in table or Path(table[name].file_name).name != shard:
            raise CheckpointError(
                f"{directory / shard}: tensor {name!r} is missing",
                expected=f"it in this shard, as {INDEX} says",
                found=f"it in {Path(table[name].file_name).name}" if name in table else "it in no shard",
                fix="download the shards and the index of one revision",
            )
