"""<end_of_image> in the text file: what the model embeds it as, in the rows where llama.cpp looks it up.

The mark follows every picture, and its id is past the text's own vocabulary. The model embeds such a token by a table
of the vision encoder, and gives it the pad token's row of the per-layer table:

    embedding    rms(projection @ (rms(table[id - offset]) * hard_embedding_norm))
    per layer    row 0

llama.cpp has neither rule: it takes the token's rows of both tables, where its converter writes padding. So the rows
are written here as the model has them; the embedding divided by sqrt(width), by which llama.cpp multiplies every row.

The token embeddings are the output matrix too: this row's logit is another one then. A chat program does not show the
mark, and the model has never learned to say it, so it is left out where logits are compared.

# measured: 2026-11-21, next-token distributions of the small checkpoint in llama.cpp, F32, mean KL divergence from
# transformers in nats, without the mark itself. After a picture and a question: as the converter has it 0.006 to 0.025,
# with the per-layer rows alone the same, with the embedding alone and with both 3e-6. Right after the picture: 3.1,
# 3.0, 0.003 and 4e-6. A text without pictures, the mark's own logit counted: 2.0e-4, all of it that logit

Source: Gemma3nModel.forward and get_per_layer_inputs of transformers; build_inp_embd of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gguf3n.errors import ConfigError, MappingError, SourceError
from gguf3n.formats.rows import Repeated, RowReader, Rows, SourceTensor, Stored, Values, Zeros, cut, largest_magnitude
from gguf3n.gemma3n.encoders import read_image_tokens
from gguf3n.gemma3n.mapping import MappedTensor
from gguf3n.gemma3n.mmproj import VISION_NAMES
from gguf3n.gemma3n.names import bare_name
from gguf3n.gemma3n.source import Checkpoint
from gguf3n.gemma3n.text import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD

MARK = "<end_of_image>"
PIECE = 64
"""Rows of the projection that are read at once."""


@dataclass(frozen=True)
class HardEmbedding:
    """The row of the token embeddings for a token of an encoder's own table.

    Exact: computed in float64, and rounded once.
    """

    table: SourceTensor
    row: int
    norm: SourceTensor
    projection: SourceTensor
    epsilon: float

    n_rows: ClassVar[int] = 1
    dtypes: ClassVar[frozenset[str]] = frozenset({"F32"})

    @property
    def n_per_row(self) -> int:
        return self.projection.shape[0]

    @property
    def stored_bytes(self) -> int:
        return sum(rows.stored_bytes for rows in self.projection.rows)

    @property
    def origin(self) -> str:
        return self.table.origin

    @property
    def stored(self) -> tuple[Stored, ...]:
        return *self.table.stored, *self.norm.stored, *self.projection.stored

    def fill(self, reader: RowReader, first: int, out: Values) -> float:
        own = _read(reader, self.table, self.row, 1)[0]
        normed = _rms_normed(own, self.epsilon) * _read(reader, self.norm, 0, 1)[0]
        n = self.n_per_row
        projected = np.concatenate(
            [_read(reader, self.projection, at, min(PIECE, n - at)) @ normed for at in range(0, n, PIECE)]
        )
        out[:] = _rms_normed(projected, self.epsilon) / math.sqrt(n)
        return largest_magnitude(out)


def _rms_normed(values: NDArray[np.float64], epsilon: float) -> NDArray[np.float64]:
    normed: NDArray[np.float64] = values / np.sqrt(np.mean(values**2) + epsilon)
    return normed


def _read(reader: RowReader, tensor: SourceTensor, first: int, n_rows: int) -> NDArray[np.float64]:
    """Consecutive rows of a tensor, whatever its pieces."""
    out = np.empty((n_rows, tensor.shape[-1]), np.float32)
    start = 0
    for rows in tensor.rows:
        begin, end = max(first, start), min(first + n_rows, start + rows.n_rows)
        if begin < end:
            reader.fill(rows, begin - start, out[begin - first : end - first])
        start += rows.n_rows
    return out.astype(np.float64)


def with_end_of_image(
    tensors: tuple[MappedTensor, ...], source: Checkpoint
) -> tuple[tuple[MappedTensor, ...], tuple[str, ...]]:
    """The text model's tensors, with the rows of <end_of_image> as the model has them, and what a user should know.

    A checkpoint without a vision encoder has no pictures: its tensors are returned as they are. So are those of one
    whose config.json or embedder does not say what the rows are, with a notice.
    """
    if not any(bare_name(name).startswith(VISION_NAMES) for name in source.tensors):
        return tensors, ()
    try:
        token_id, row = _hard_embedding(source)
    except SourceError as error:
        notice = f"the rows of {MARK} are padding, as llama.cpp's converter writes them: {error.one_line}"
        return tensors, (notice,)
    mends: dict[str, Callable[[MappedTensor], MappedTensor]] = {
        TOKEN_EMBD: lambda tensor: _with_row(tensor, token_id, row),
        PER_LAYER_TOKEN_EMBD: _padded_with_the_first,
    }
    return tuple(mends[tensor.name](tensor) if tensor.name in mends else tensor for tensor in tensors), ()


def _hard_embedding(source: Checkpoint) -> tuple[int, HardEmbedding]:
    """The mark's id and its row. Raises: ConfigError, MappingError: the checkpoint has no such thing."""
    config, path = source.config, source.path / "config.json"
    tokens = read_image_tokens(source.raw_config, path)
    token_id, first, end = tokens.eoi_token_id, config.vocab_size_per_layer_input, config.vocab_size
    if not first <= token_id < end:
        raise ConfigError(
            f"{path}: eoi_token_id is not past the text's own vocabulary",
            expected=f"an id from {first:,} on, below vocab_size, {end:,}",
            found=f"{token_id:,}",
        )
    table, norm, projection = _embedder(source)
    width = projection.shape[-1:]
    shapes = tuple(tensor.shape for tensor in (table, norm, projection))
    if shapes != ((*table.shape[:1], *width), width, (config.hidden_size, *width)):
        raise MappingError(
            f"{source.origin}: tensors of embed_vision do not fit each other",
            expected=f"[n, width], [width], [{config.hidden_size}, width]",
            found=", ".join(str(list(shape)) for shape in shapes),
        )
    row = token_id - tokens.vocab_offset
    if not 0 <= row < table.shape[0]:
        raise ConfigError(
            f"{path}: eoi_token_id less vocab_offset is no row of embed_vision.embedding",
            expected=f"0 to {table.shape[0] - 1:,}",
            found=f"{token_id:,} - {tokens.vocab_offset:,}",
        )
    return token_id, HardEmbedding(table, row, norm, projection, tokens.rms_norm_eps)


def _embedder(source: Checkpoint) -> Iterator[SourceTensor]:
    """Its table, norm and projection. Raises: MappingError."""
    bare = {bare_name(name): tensor for name, tensor in source.tensors.items() if "embed_vision." in name}
    for part in ("embedding", "hard_embedding_norm", "embedding_projection"):
        name = f"embed_vision.{part}.weight"
        if name not in bare:
            raise MappingError(f"{source.origin}: tensor {name!r} is missing", expected="it, in a vision encoder")
        yield bare[name]


def _with_row(tensor: MappedTensor, index: int, row: HardEmbedding) -> MappedTensor:
    """One row replaced, where the tensor has it. Why pieces in both: what other outputs take is read once."""
    mended: list[Rows] = []
    plain: list[Rows] = []
    start = 0
    for rows in tensor.rows:
        at = index - start
        start += rows.n_rows
        if not 0 <= at < rows.n_rows or isinstance(rows, Zeros):
            mended.append(rows)
            plain.append(rows)
            continue
        places = range(at), range(at, at + 1), range(at + 1, rows.n_rows)
        before, own, after = (cut(rows, place) for place in places)
        mended += [piece for piece in (before, row, after) if piece.n_rows]
        plain += [piece for piece in (before, own, after) if piece.n_rows]
    return replace(tensor, rows=tuple(mended), plain_rows=tuple(plain))


def _padded_with_the_first(tensor: MappedTensor) -> MappedTensor:
    """The zeros at the end of a table replaced by copies of its first row."""
    *own, last = tensor.rows
    if not own or not isinstance(last, Zeros):
        return tensor
    return replace(tensor, rows=(*own, Repeated(own[0], 0, last.n_rows)), plain_rows=tensor.rows)
