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
# 3.0, 0.003 and 4e-6

Source: Gemma3nModel.forward and get_per_layer_inputs of transformers; build_inp_embd of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.rows import Repeated, RowReader, Rows, SourceTensor, Values, Zeros, cut, largest_magnitude
from gguf3n.gemma3n.mapping import MappedTensor
from gguf3n.gemma3n.names import bare_name
from gguf3n.gemma3n.source import Checkpoint
from gguf3n.gemma3n.text import PER_LAYER_TOKEN_EMBD, TOKEN_EMBD

MARK = "<end_of_image>"
EPSILON = 1e-6
"""Of the norms, where config.json does not say."""
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


def with_end_of_image(tensors: tuple[MappedTensor, ...], source: Checkpoint) -> tuple[MappedTensor, ...]:
    """The text model's tensors, with the rows of <end_of_image> as the model has them.

    A checkpoint without a vision encoder has no pictures: its tensors are returned as they are.
    """
    embedding = _hard_embedding(source)
    if embedding is None:
        return tensors
    mends: dict[str, Callable[[MappedTensor], MappedTensor]] = {
        TOKEN_EMBD: lambda tensor: _with_row(tensor, *embedding),
        PER_LAYER_TOKEN_EMBD: _padded_with_the_first,
    }
    return tuple(mends[tensor.name](tensor) if tensor.name in mends else tensor for tensor in tensors)


def _hard_embedding(source: Checkpoint) -> tuple[int, HardEmbedding] | None:
    """The mark's id and its row; None where the checkpoint has no such thing."""
    raw, config = source.raw_config, source.config
    vision = raw.get("vision_config")
    found = _embedder(source.tensors)
    if not isinstance(vision, dict) or found is None:
        return None
    table, norm, projection = found
    token_id, offset = raw.get("eoi_token_id"), vision.get("vocab_offset")
    epsilon = vision.get("rms_norm_eps", EPSILON)
    if type(token_id) is not int or type(offset) is not int or not isinstance(epsilon, float):
        return None
    width = table.shape[-1]
    row = token_id - offset
    shapes = (len(table.shape), norm.shape, projection.shape)
    fits = shapes == (2, (width,), (config.hidden_size, width)) and 0 <= row < table.shape[0]
    if not fits or not config.vocab_size_per_layer_input <= token_id < config.vocab_size:
        return None
    return token_id, HardEmbedding(table, row, norm, projection, epsilon)


def _embedder(tensors: Mapping[str, SourceTensor]) -> tuple[SourceTensor, SourceTensor, SourceTensor] | None:
    names = ("embedding", "hard_embedding_norm", "embedding_projection")
    bare = {bare_name(name): tensor for name, tensor in tensors.items() if "embed_vision." in name}
    found = [bare.get(f"embed_vision.{name}.weight") for name in names]
    table, norm, projection = found
    return None if table is None or norm is None or projection is None else (table, norm, projection)


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
        before, own, after = cut(rows, 0, at), cut(rows, at, 1), cut(rows, at + 1, rows.n_rows - at - 1)
        mended += [piece for piece in (before, row, after) if piece.n_rows]
        plain += [piece for piece in (before, own, after) if piece.n_rows]
    return replace(tensor, rows=tuple(mended), plain_rows=tuple(plain))


def _padded_with_the_first(tensor: MappedTensor) -> MappedTensor:
    """The zeros at the end of a table replaced by copies of its first row."""
    *own, last = tensor.rows
    if not own or not isinstance(last, Zeros):
        return tensor
    return replace(tensor, rows=(*own, Repeated(own[0], 0, last.n_rows)), plain_rows=tensor.rows)
