"""Hugging Face safetensors checkpoints: the tensor table now, rows when asked for.

    file     header length uint64 (little endian), header JSON, tensor data
    header   {"name": {"dtype": "BF16", "shape": [...], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    shards   model.safetensors.index.json: {"weight_map": {"name": "model-00001-of-00003.safetensors"}}
    pieces   shard-00001-model-00001-of-00001.safetensors: what one rank of a training has of each tensor

Every header is checked in full before a weight is read: the ranges must tile the data without gap or overlap.

Source: the format section of the safetensors README; for pieces see pieces.py.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gguf3n.errors import CheckpointError, SourceError, shown
from gguf3n.formats.byte_source import stamp
from gguf3n.formats.pieces import RANK_SHARD, Piece, piece_at, put_together, read_offsets
from gguf3n.formats.rows import DTYPE_BYTES, FLOAT_DTYPES, SourceTensor, Stored
from gguf3n.formats.small_file import check_small, is_there, parse_json, read_checkpoint_json

MAX_HEADER_BYTES = 1 << 24
"""Gemma 3n's have a hundredth of it. The safetensors library itself allows six times as much, which is a gigabyte of
Python's objects."""
MAX_TENSORS = 1 << 16
"""Of a checkpoint, as of a GGUF file; Gemma 3n has less than two thousand."""

MAX_PIECES = 1 << 20
"""Of the tensors of a checkpoint: Gemma 3n's on five hundred ranks."""

MAX_DIMENSIONS = 16
MAX_SIZE = 1 << 63
"""No dimension or offset of a real file is larger; Python's integers would not mind."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

TO_SAFETENSORS = (
    'python -c "import sys, torch; from safetensors.torch import save_file; save_file('
    "{n: t.clone() for f in sys.argv[2:] for n, t in torch.load(f, map_location='cpu', weights_only=True).items()}, "
    'sys.argv[1])" {folder}/model.safetensors {entries}'
)
"""Makes safetensors of pickled tensors."""

FOREIGN_FILES: tuple[tuple[str, str, str], ...] = (
    (
        "adapter_config.json",
        "a PEFT adapter, not a model",
        "merge it into its base: gguf3n convert BASE --adapter {folder}",
    ),
    (
        r"pytorch_model_fsdp_\d+(/[^/]+\.distcp)?",
        "unconsolidated FSDP training shards",
        "consolidate: accelerate merge-weights {shards} DIR",
    ),
    (
        r"epoch_\d+_step_\d+/model/[^/]+\.distcp",
        "unconsolidated training shards of NeMo Automodel",
        "consolidate, in the repository of NeMo Automodel: torchrun --nproc-per-node=1 scripts/export_llm_dcp_to_hf.py "
        "--checkpoint-dir {parent} --output-dir DIR",
    ),
    (
        r"[^/]+\.distcp",
        "unconsolidated FSDP training shards (DCP)",
        "consolidate: accelerate merge-weights {folder} DIR\n"
        "or, without accelerate: mkdir DIR; "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} DIR/pytorch_model.bin",
    ),
    (
        r"pytorch_model_fsdp.*_rank\d+\.bin",
        "unconsolidated FSDP training shards, each rank's in a pickle of its own",
        "resume the training, and save with fsdp_state_dict_type FULL_STATE_DICT",
    ),
    ("zero_to_fp32.py", "unconsolidated DeepSpeed training shards", "consolidate: python {entry} {folder} DIR"),
    (r"global_step\d+", "unconsolidated DeepSpeed training shards", "consolidate: python zero_to_fp32.py {folder} DIR"),
    (
        r"pytorch_model_fsdp.*\.bin",
        "a model that FSDP saved in PyTorch's pickle format",
        f"convert it: {TO_SAFETENSORS}",
    ),
    (r"pytorch_model.*\.bin", "a checkpoint in PyTorch's pickle format", f"convert it: {TO_SAFETENSORS}"),
    (r".*\.gguf", "GGUF files, already converted", "give the Hugging Face checkpoint they were made from"),
)
"""What a directory without safetensors may hold instead: how a path in it ends, what it is, what to do; there {entry}
is that path, {entries} all of them, {folder} its directory, {parent} the one above, {shards} that of *.distcp."""


def read_tensor_table(directory: Path, *, kept_in: Path | None = None) -> dict[str, SourceTensor]:
    """The tensors of a checkpoint directory, by name, every header checked.

    Args:
        kept_in: where the files are, if those in the directory have only the same headers.

    Raises: SourceError if it holds no safetensors checkpoint; CheckpointError for a broken one.
    """
    pieces: list[Piece] = []
    names: set[str] = set()
    for path in _shards(directory):
        if len(names) > MAX_TENSORS or len(pieces) > MAX_PIECES:
            raise _too_many(path, max(len(names), len(pieces)))
        found = read_file(path)
        names.update(piece.stored.name for piece in found)
        pieces += found
    table = put_together(pieces)
    _check_index(directory, pieces)
    return table if kept_in is None else put_together(_moved(piece, kept_in) for piece in pieces)


def _moved(piece: Piece, directory: Path) -> Piece:
    return replace(piece, stored=replace(piece.stored, file=directory / Path(piece.stored.file_name).name, stamp=None))


def read_header(path: Path) -> list[Stored]:
    """The tensors of one safetensors file, in the order of their offsets. Raises: as `read_file`."""
    return [piece.stored for piece in read_file(path)]


def read_file(path: Path) -> list[Piece]:
    """What one safetensors file has of tensors, in the order of the offsets.

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
    metadata = header.pop("__metadata__", None)
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
    offsets = read_offsets(path, metadata, header.keys())
    return [piece_at(tensor, offsets[tensor.name]) if offsets else Piece(tensor) for tensor in tensors]


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
    return _rank_shards(directory)


def _rank_shards(directory: Path) -> list[Path]:
    """The files that the ranks of a training have written; a rank without a part of a file's tensors writes none."""
    found = [match for match in map(RANK_SHARD.fullmatch, _listing(directory)) if match]
    if not found:
        raise not_a_checkpoint(directory)
    n_files = int(found[0][3])
    ranks, numbers = ({int(match[group]) for match in found} for group in (1, 2))
    missing = [f"shard-{rank:05d}-model-*" for rank in range(1, max(ranks)) if rank not in ranks]
    missing += [f"shard-*-model-{i:05d}-of-{n_files:05d}" for i in range(1, n_files + 1) if i not in numbers]
    if missing:
        raise CheckpointError(
            f"{directory / missing[0]}.safetensors: missing",
            expected=f"files of ranks 1 to {max(ranks)}, {n_files} of each",
            found=f"{len(found):,} files",
            fix="copy all shard files of this save",
        )
    surplus = next((match[0] for match in found if int(match[3]) != n_files or int(match[2]) > n_files), None)
    if surplus is not None:
        raise CheckpointError(
            f"{directory / surplus}: a shard of another set",
            expected=f"shards of {n_files}",
            found=f"{len(found):,} files of several saves",
            fix="remove the shards that belong to another save of the model",
        )
    return [directory / match[0] for match in found]


def _listing(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise SourceError(f"{directory}: cannot be read", found=error.strerror or str(error)) from error


def has_weights(directory: Path) -> bool:
    """Whether there are files of a safetensors checkpoint, complete or not. Raises: SourceError."""
    names = _listing(directory)
    return any(name in (SINGLE, INDEX) or SHARD.fullmatch(name) or RANK_SHARD.fullmatch(name) for name in names)


def what_else(directory: Path, names: Sequence[str]) -> tuple[str, list[str], str] | None:
    """What the files of a directory without safetensors are, which ones, and what to do; None for what is not known."""
    above = Path(os.path.abspath(directory)).as_posix()
    for pattern, what, fix in FOREIGN_FILES:
        ends = re.compile(f".*/{pattern}")
        found = [name for name in names if ends.fullmatch(f"{above}/{name}")]
        if found:
            entries = [directory / name for name in found]
            places = {
                "entry": entries[:1],
                "entries": entries,
                "folder": [directory],
                "parent": [directory.parent],
                "shards": [directory] if entries[0].suffix == ".distcp" else entries[:1],
            }
            for word, paths in places.items():
                fix = fix.replace(f"{{{word}}}", shlex.join(map(str, paths)))
            return what, found, fix
    return None


def foreign(directory: Path) -> SourceError | None:
    """What a directory without safetensors has instead, and what to do; None for what is not known."""
    known = what_else(directory, _listing(directory))
    if known is None:
        return None
    what, found, fix = known
    return SourceError(
        f"{directory}: {what}", expected=f"{SINGLE} or shards with {INDEX}", found=", ".join(found[:5]), fix=fix
    )


def not_a_checkpoint(directory: Path) -> SourceError:
    """What is said of a directory without safetensors."""
    error = foreign(directory)
    if error is not None:
        return error
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


def _check_index(directory: Path, pieces: list[Piece]) -> None:
    index = directory / INDEX
    if is_there(directory / SINGLE, CheckpointError) or not is_there(index, CheckpointError):
        return
    found = {piece.stored.name: Path(piece.stored.file_name).name for piece in pieces}
    for name, shard in weight_map(index).items():
        if found.get(name) != shard:
            raise CheckpointError(
                f"{directory / shard}: tensor {name!r} is missing",
                expected=f"it in this shard, as {INDEX} says",
                found=f"it in {found[name]}" if name in found else "it in no shard",
                fix="download the shards and the index of one revision",
            )
