"""A reference model's log-probabilities over a text, in a file: written once, then compared with many files.

A text is read in chunks of n_ctx tokens, each for itself, and its second half is scored: positions n_ctx // 2 to
n_ctx - 2, whose next token is in the chunk too, as llama-perplexity has it. Two formats, one row a scored position:

    safetensors   token_ids I32 [n_chunks, n_ctx], logprobs F32 [n_chunks, n_scored, vocab], metadata
    .kld          llama-perplexity's --kl-divergence-base: 16 bits a token

The second one, all little-endian:

    char[8]  "_logits_"
    int32    n_ctx, n_vocab, n_chunks
    int32    token ids [n_chunks, n_ctx]; llama-perplexity puts the begin mark in place of each chunk's first
    rows     float32 scale, float32 minimum, uint16 levels [n_vocab], one more where n_vocab is odd

    log-probability = scale * level + minimum

Level 0 stands for all that is 16 or more below the row's maximum: of these only that much is known, so they are left
out of a divergence.

Source: tools/perplexity/perplexity.cpp of llama.cpp (log_softmax, perplexity, kl_divergence).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import CheckpointError, UsageError
from gguf3n.formats.checkpoint import MAX_SIZE, read_header
from gguf3n.formats.rows import Stored
from gguf3n.formats.small_file import check_small
from gguf3n.formats.whole_file import WholeFile

FORMAT = "gguf3n.logprobs/1"
DTYPES = {"token_ids": "I32", "logprobs": "F32"}
KLD_SUFFIX = ".kld"
KLD_MAGIC = b"_logits_"
KLD_HEADER = struct.Struct("<8s3i")
KLD_RANGE = np.float32(16)
"""A row's levels reach this far below its maximum, in nats."""
KLD_LEVELS = np.float32(65535)


def scored_positions(n_ctx: int) -> range:
    """The positions of a chunk whose next token is predicted from at least half a chunk, and known."""
    return range(n_ctx // 2, n_ctx - 1)


@dataclass(frozen=True)
class SavedLogprobs:
    """A file that has been opened.

    Shapes: token_ids int32[n_chunks, n_ctx]. `offset` is that of the first row.
    """

    path: Path
    token_ids: NDArray[np.int32]
    n_vocab: int
    metadata: Mapping[str, str]
    is_kld: bool
    offset: int

    @property
    def n_ctx(self) -> int:
        return int(self.token_ids.shape[1])

    @property
    def floor(self) -> float | None:
        """Log-probabilities up to this are not known; None where all are."""
        return -float(KLD_RANGE) if self.is_kld else None

    def rows(self) -> Iterator[NDArray[np.float32]]:
        """The log-probabilities, one scored position at a time, chunk by chunk.

        Shapes: `[vocab]`.
        """
        row_bytes = _row_bytes(self.n_vocab, is_kld=self.is_kld)
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            for _ in range(len(self.token_ids) * len(scored_positions(self.n_ctx))):
                row = file.read(row_bytes)
                yield unpack_kld_row(row, self.n_vocab) if self.is_kld else np.frombuffer(row, "<f4")


class LogprobsWriter:
    """Takes the rows of a file in their order."""

    def __init__(self, file: WholeFile, *, is_kld: bool) -> None:
        self._file = file
        self._is_kld = is_kld

    def add(self, row: NDArray[np.float32]) -> None:
        """Shapes: `[vocab]`, log-probabilities."""
        self._file.write(pack_kld_row(row) if self._is_kld else row.astype("<f4").tobytes())


@contextmanager
def write_logprobs(
    path: Path,
    token_ids: NDArray[np.int32],
    n_vocab: int,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> Iterator[LogprobsWriter]:
    """Open a file for writing: by its suffix llama-perplexity's format, which has no metadata, or ours.

    Shapes: token_ids `[n_chunks, n_ctx]`.

    Raises: OutputError.
    """
    is_kld = path.suffix == KLD_SUFFIX
    header = _kld_header(token_ids, n_vocab) if is_kld else _safetensors_header(token_ids, n_vocab, metadata or {})
    n_bytes = len(header) + rows_bytes(path, token_ids, n_vocab)
    with WholeFile(path, force=force, n_bytes=n_bytes) as file:
        file.write(header)
        yield LogprobsWriter(file, is_kld=is_kld)
        if file.n_written != n_bytes:
            raise ValueError(f"{file.n_written:,} bytes were written instead of {n_bytes:,}: rows are missing")


def rows_bytes(path: Path, token_ids: NDArray[np.int32], n_vocab: int) -> int:
    """The size of a file of this name, without its header."""
    return _data_bytes(token_ids.shape, n_vocab, is_kld=path.suffix == KLD_SUFFIX)


def open_logprobs(path: Path) -> SavedLogprobs:
    """Open a file of either format, whatever its name.

    Raises: UsageError: a file that is neither. CheckpointError: a broken one.
    """
    check_small(path, MAX_SIZE, UsageError)
    try:
        with open(path, "rb") as file:
            is_kld = file.read(len(KLD_MAGIC)) == KLD_MAGIC
    except OSError as error:
        raise UsageError(f"{path}: cannot be read", found=error.strerror or str(error)) from error
    return _open_kld(path) if is_kld else _open_safetensors(path)


def _row_bytes(n_vocab: int, *, is_kld: bool) -> int:
    return 8 + 2 * (n_vocab + n_vocab % 2) if is_kld else 4 * n_vocab


def _data_bytes(shape: tuple[int, ...], n_vocab: int, *, is_kld: bool) -> int:
    n_chunks, n_ctx = shape
    return n_chunks * len(scored_positions(n_ctx)) * _row_bytes(n_vocab, is_kld=is_kld)


def _safetensors_header(token_ids: NDArray[np.int32], n_vocab: int, metadata: Mapping[str, str]) -> bytes:
    """The header and the token ids; the rows come after them."""
    n_chunks, n_ctx = token_ids.shape
    ids = token_ids.astype("<i4").tobytes()
    n_bytes = _data_bytes(token_ids.shape, n_vocab, is_kld=False)
    header = {
        "__metadata__": {"format": FORMAT, **metadata},
        "token_ids": {"dtype": "I32", "shape": [n_chunks, n_ctx], "data_offsets": [0, len(ids)]},
        "logprobs": {
            "dtype": "F32",
            "shape": [n_chunks, len(scored_positions(n_ctx)), n_vocab],
            "data_offsets": [len(ids), len(ids) + n_bytes],
        },
    }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + ids


def _open_safetensors(path: Path) -> SavedLogprobs:
    tensors = {tensor.name: tensor for tensor in read_header(path)}
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        metadata = json.loads(file.read(header_bytes)).get("__metadata__")
        if isinstance(metadata, dict) and metadata.get("format") == FORMAT and set(tensors) == set(DTYPES):
            ids, rows = tensors["token_ids"], tensors["logprobs"]
            if _fit(ids, rows):
                file.seek(ids.offset)
                token_ids = _token_ids(path, file.read(ids.stored_bytes), ids.shape, rows.shape[-1])
                texts = {str(name): str(value) for name, value in metadata.items()}
                return SavedLogprobs(path, token_ids, rows.shape[-1], texts, False, rows.offset)
    raise UsageError(
        f"{path}: not a file of log-probabilities",
        expected="one that --save-reference wrote, or llama-perplexity's --kl-divergence-base",
        found="a safetensors file with other tensors",
    )


def _fit(ids: Stored, rows: Stored) -> bool:
    if any(tensor.dtype != DTYPES[tensor.name] for tensor in (ids, rows)) or len(ids.shape) != 2:
        return False
    n_chunks, n_ctx = ids.shape
    return rows.shape[:-1] == (n_chunks, len(scored_positions(n_ctx))) and math.prod(rows.shape) > 0


def _kld_header(token_ids: NDArray[np.int32], n_vocab: int) -> bytes:
    n_chunks, n_ctx = token_ids.shape
    return KLD_HEADER.pack(KLD_MAGIC, n_ctx, n_vocab, n_chunks) + token_ids.astype("<i4").tobytes()


def _open_kld(path: Path) -> SavedLogprobs:
    found = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(KLD_HEADER.size)
        _, n_ctx, n_vocab, n_chunks = KLD_HEADER.unpack(header.ljust(KLD_HEADER.size, b"\0"))
        sane = len(header) == KLD_HEADER.size and min(n_vocab, n_chunks) > 0 and n_ctx > 2
        offset = KLD_HEADER.size + 4 * n_chunks * n_ctx
        expected = offset + _data_bytes((n_chunks, n_ctx), n_vocab, is_kld=True) if sane else 0
        if found != expected:
            raise CheckpointError(
                f"{path}: incomplete or damaged",
                expected=f"{expected:,} bytes for {n_chunks} chunks of {n_ctx} tokens" if sane else "a sound header",
                found=f"{found:,} bytes",
                fix="write it again",
            )
        token_ids = _token_ids(path, file.read(4 * n_chunks * n_ctx), (n_chunks, n_ctx), n_vocab)
    return SavedLogprobs(path, token_ids, n_vocab, {}, True, offset)


def _token_ids(path: Path, data: bytes, shape: tuple[int, ...], n_vocab: int) -> NDArray[np.int32]:
    token_ids = np.frombuffer(data, "<i4").reshape(shape).astype(np.int32)
    wrong = token_ids[(token_ids < 0) | (token_ids >= n_vocab)]
    if len(wrong):
        raise CheckpointError(
            f"{path}: damaged",
            expected=f"token ids below {n_vocab:,}",
            found=f"{wrong[0]:,}",
            fix="write it again",
        )
    return token_ids


def pack_kld_row(logprobs: NDArray[np.float32]) -> bytes:
    """A row of llama-perplexity's format.

    Exact: the bytes that its log_softmax writes for these values, but for the last bits of its sum.
    """
    values = logprobs.astype(np.float32)
    largest = values.max()
    smallest = np.maximum(values.min(), largest - KLD_RANGE)
    log_sum = np.float32(np.log(np.exp(values - largest).sum(dtype=np.float64)))
    scale = (largest - smallest) / KLD_LEVELS
    levels = np.zeros(len(values) + len(values) % 2, "<u2")
    if scale > 0:
        above = np.maximum(values - smallest, np.float32(0))
        levels[: len(values)] = np.rint(above * (np.float32(1) / scale))
    return struct.pack("<2f", scale, smallest - largest - log_sum) + levels.tobytes()


def unpack_kld_row(row: bytes, n_vocab: int) -> NDArray[np.float32]:
    """Log-probabilities of a row. Shapes: `[n_vocab]`."""
    scale, minimum = np.frombuffer(row, "<f4", 2)
    levels = np.frombuffer(row, "<u2", n_vocab, 8)
    with np.errstate(over="ignore", invalid="ignore"):  # of a damaged file, whose divergence is then no number
        logprobs: NDArray[np.float32] = levels.astype(np.float32) * scale + minimum
    return logprobs
