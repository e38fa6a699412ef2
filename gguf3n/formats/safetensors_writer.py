"""Writes a checkpoint: tensors that are somewhere already, copied into shards with an index, and the small files.

Every file has a temporary name until all are complete. The weights go from file to file as they are, a few megabytes at
a time.

Source: the format section of the safetensors README; save_pretrained of transformers for names and sizes of shards.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf3n.errors import OutputError, UsageError
from gguf3n.formats.checkpoint import INDEX, SINGLE
from gguf3n.formats.rows import DTYPE_BYTES, RowReader, SourceTensor, chunks
from gguf3n.formats.whole_file import WholeFile, check_space, make_directory, remove_stale

MAX_SHARD_BYTES = 5_000_000_000
"""As transformers has it."""
CHUNK_WEIGHTS = 1 << 22
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Shard:
    """One safetensors file. `header` is packed; the data follow in the order of the tensors."""

    name: str
    tensors: tuple[SourceTensor, ...]
    header: bytes

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(map(tensor_bytes, self.tensors))


def tensor_bytes(tensor: SourceTensor) -> int:
    """Of a tensor as it is stored. Raises: UsageError for one that is not, such as one with an adapter."""
    return sum(DTYPE_BYTES[dtype_of(tensor)] * rows.n_rows * rows.n_per_row for rows in tensor.rows)


def dtype_of(tensor: SourceTensor) -> str:
    """Its one dtype. Raises: UsageError for several or none, which no file has."""
    if len(tensor.dtypes) != 1:
        raise UsageError(
            f"{tensor.origin}: can't be copied",
            expected="a tensor of one dtype, stored in a file",
            found=", ".join(sorted(tensor.dtypes)) or "none",
        )
    (dtype,) = tensor.dtypes
    return dtype


def write_checkpoint(
    directory: Path,
    tensors: Sequence[SourceTensor],
    small_files: Mapping[str, bytes],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    copied: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write a directory in Hugging Face's layout; returns its files.

    Args:
        directory: is made, or is empty but for what a killed run has left.
        small_files: the contents of everything beside the weights, by name; the names may have one folder in them.
        copied: told of each few megabytes, in bytes.

    Raises: OutputError, and then nothing stands there; UsageError for what can't be copied; the sources' error where
        they can't be read, or change meanwhile.
    """
    shards = _shards(tensors, max_shard_bytes)
    files = dict(small_files)
    if len(shards) > 1:
        files[INDEX] = _index(shards)
    paths = [directory / name for name in (*(shard.name for shard in shards), *files)]
    is_new = not directory.exists()
    make_directory(directory)
    for path in paths:
        remove_stale(path)
    if any(directory.iterdir()):
        raise OutputError(f"{directory} is not empty", expected="a new directory", fix="name another one")
    check_space(directory / SINGLE, sum(shard.n_bytes for shard in shards) + sum(map(len, files.values())))
    folders = sorted({path.parent for path in paths} - {directory})
    try:
        for folder in folders:
            make_directory(folder)
        _write(directory, shards, files, copied)
    except BaseException:
        for folder in (*folders, *([directory] if is_new else [])):
            _remove_empty(folder)
        raise
    return paths


def _write(directory: Path, shards: Sequence[Shard], files: Mapping[str, bytes], copied: Callable[[int], None]) -> None:
    with closing(RowReader()) as reader, ExitStack() as stack:
        written = []
        for shard in shards:
            file = WholeFile(directory / shard.name, n_bytes=shard.n_bytes)
            stack.callback(file.discard)
            written.append(file)
            file.write(shard.header)
            for data in _data(shard, reader):
                file.write(data)
                copied(len(data))
        for name, contents in files.items():
            file = WholeFile(directory / name, n_bytes=len(contents))
            stack.callback(file.discard)
            written.append(file)
            file.write(contents)
        reader.check_unchanged()
        for file in written:
            file.commit()


def _data(shard: Shard, reader: RowReader) -> Iterator[memoryview]:
    """Its tensors, in pieces that are good until the next."""
    for tensor in shard.tensors:
        for rows in tensor.rows:
            for chunk in chunks(rows, CHUNK_WEIGHTS):
                raw = reader.read_raw(rows, chunk.first, chunk.n_rows)
                if raw is None:
                    raise UsageError(
                        f"{tensor.origin}: can't be copied",
                        expected="a tensor that is stored in a file",
                        fix="convert it to GGUF, where what is computed has a place",
                    )
                yield raw.data


def _shards(tensors: Sequence[SourceTensor], max_bytes: int) -> list[Shard]:
    """Tensors in their order, each shard as full as it may be; none is empty."""
    groups: list[list[SourceTensor]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = tensor_bytes(tensor)
        if groups[-1] and size + n_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += n_bytes
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]), _header(groups[0]))]
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    return [Shard(name, tuple(group), _header(group)) for name, group in zip(names, groups, strict=True)]


def _header(tensors: Sequence[SourceTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor_bytes(tensor)
        header[tensor.name] = {
            "dtype": dtype_of(tensor),
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(packed)) + packed


def _index(shards: Sequence[Shard]) -> bytes:
    total = sum(tensor_bytes(tensor) for shard in shards for tensor in shard.tensors)
    places = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _remove_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return  # not made, or not empty: files of others
