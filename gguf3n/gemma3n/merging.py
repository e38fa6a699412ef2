"""A checkpoint and adapters become a checkpoint whose weights are what PEFT's merge_and_unload would make of them.

    LoRA, rsLoRA            W + s (B A)                        LowRank(W, A, B, s)
    of an embedding         W + s (B A)^T                      LowRank(W, B^T, A^T, s)
    DoRA                    (m / |V|) V, V = W + s (B A)       OfLength(LowRank(W, A, B, s), m), row by row
    trained tokens          other rows in their places         Stored, some of W's, some of the adapter's
    modules_to_save         another weight                     Stored

s = alpha / rank, or alpha / sqrt(rank) with rsLoRA. Nothing is computed here: the rows are forms (see formats/rows.py),
so plans, pipeline, statistics and validation read a merged checkpoint like any other, and no merged copy is on a disk.

Exact: a product is added in float64 and rounded to float32 once, where PEFT rounds it, and the sum, in the dtype that
    the model was loaded in; DoRA rounds once more.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from gguf3n.errors import MappingError, UsageError
from gguf3n.formats.rows import LowRank, OfLength, Rows, SourceTensor, Stored, Transposed, cut
from gguf3n.gemma3n.adapter import MERGE_IT, Adapter, Piece
from gguf3n.gemma3n.mmproj import AUDIO_NAMES, VISION_NAMES
from gguf3n.gemma3n.names import bare_name
from gguf3n.gemma3n.slices import SlicedCheckpoint
from gguf3n.gemma3n.source import Checkpoint, Source

EMBEDDING, OUTPUT = "embed_tokens.weight", "lm_head.weight"
TABLES = (EMBEDDING, "embed_tokens_per_layer.weight")
"""What has a row for each token."""
KEYS_AND_VALUES = re.compile(r"layers\.(\d+)\.self_attn\.(?:k_proj|v_proj|k_norm)\.weight")

IDLE = "keys and values of KV-shared layers, which nothing reads"
"""Why they are left out."""

QUANTIZED_BASE = re.compile(r"(?i)(-unsloth)?-bnb-4bit$")
"""How Unsloth calls the copies of a base that it trains on; without it, the name of the base in 16 bits."""

KINDS: Mapping[frozenset[Piece], str] = {
    frozenset({Piece.A, Piece.B}): "LoRA",
    frozenset({Piece.A, Piece.B, Piece.LENGTHS}): "DoRA",
    frozenset({Piece.EMBEDDING_A, Piece.EMBEDDING_B}): "LoRA of an embedding",
    frozenset({Piece.TOKENS}): "trained tokens",
    frozenset({Piece.WHOLE}): "replaced",
}
"""What an adapter may have of one weight, and what that is called."""

ONLY_ADDED = ("LoRA", "LoRA of an embedding")
"""Kinds that --adapter-scale can make more or less of."""


def check_given(adapters: Sequence[str | Path], scale: float) -> None:
    """Raises: UsageError for a scale that is none, or is given without adapters; for an adapter that is named twice."""
    if not math.isfinite(scale) or scale == 0:
        raise UsageError(f"--adapter-scale {scale:g}", expected="a number that is not 0")
    if scale != 1 and not adapters:
        raise UsageError("--adapter-scale without --adapter", fix="name the adapter, or leave it out")
    for number, adapter in enumerate(adapters):
        if os.path.realpath(adapter) in map(os.path.realpath, adapters[:number]):
            raise UsageError(
                f"{adapter}: the same adapter twice", fix="name it once; --adapter-scale 2 adds twice as much of it"
            )


def output_error(adapter: Adapter) -> MappingError:
    """Why an output matrix of its own is refused."""
    return adapter.error(
        f"{adapter.paths[OUTPUT]} is changed apart from the embedding table",
        expected="one table for both, as in every Gemma 3n and in the files that are written",
        fix="train without lm_head among target_modules and modules_to_save",
    )


def check_kind(adapter: Adapter, weight: str, pieces: Mapping[Piece, Stored]) -> str:
    """Which of KINDS an adapter has of a weight. Raises: MappingError."""
    kind = KINDS.get(frozenset(pieces))
    if kind is None:
        raise adapter.error(
            f"{adapter.paths[weight]} can't be merged",
            expected="; ".join(_spelled()),
            found=" and ".join(sorted(piece.value for piece in pieces)),
            fix=MERGE_IT,
        )
    return kind


def merge(source: Source, adapters: Sequence[Adapter], scale: float = 1.0) -> Source:
    """The checkpoint with adapters merged into it, one after another: each into what those before it have made.

    Args:
        scale: how much of what they add is added.

    Raises: MappingError for an adapter that does not fit the checkpoint, or can't be merged into its file; ConfigError
        or SourceError for the checkpoint; UsageError for a GGUF file or a slice, or a scale of what can't be scaled.
    """
    for adapter in adapters:
        if isinstance(source, SlicedCheckpoint):
            raise UsageError(
                f"{source.origin}: adapters are merged into the whole model, before a slice is taken",
                fix="take the slice of what has the adapters; for an adapter that was trained on the slice, write the "
                "slice as a checkpoint, and give that",
            )
        if not isinstance(source, Checkpoint):
            raise UsageError(
                f"{source.origin}: adapters are merged into a checkpoint, not into a GGUF file",
                expected="a directory with a Hugging Face checkpoint, or a Hub id",
            )
        source = _Merge(source, adapter, scale).result()
    return source


class _Merge:
    """One adapter on its way into a checkpoint."""

    def __init__(self, source: Checkpoint, adapter: Adapter, scale: float) -> None:
        self.source = source
        self.adapter = adapter
        self.scale = scale
        self.names = {bare_name(name): name for name in source.tensors}
        self.n_kv_layers = source.config.n_kv_layers
        self.kinds: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def result(self) -> Checkpoint:
        merged: dict[str, SourceTensor] = {}
        for weight, pieces in self.adapter.pieces.items():
            if weight in TABLES:
                self.check_vocabulary(weight, pieces)
            pieces = {piece: tensor for piece, tensor in pieces.items() if piece is not Piece.BASE}
            if not pieces:
                continue
            why = self.why_not(weight)
            if why is None:
                tensor = self.changed(weight, pieces)
                merged[tensor.name] = tensor
            else:
                self.left_out[why] += 1
        return replace(
            self.source,
            origin=f"{self.source.origin} with {self.adapter.origin}",
            name=f"{self.source.name}-{self.adapter.name}",
            tensors={**self.source.tensors, **merged},
            notices=(*self.source.notices, *self.notices(merged)),
            changes=(*self.source.changes, self.adapter.name),
            as_it_stands=False,
        )

    def why_not(self, weight: str) -> str | None:
        """Why a weight is left out; None where it is to be changed. Raises: MappingError for one of another model."""
        match = KEYS_AND_VALUES.fullmatch(weight)
        if match and int(match[1]) >= self.n_kv_layers:
            return IDLE
        if weight == OUTPUT:
            raise output_error(self.adapter)
        if weight in self.names:
            return None
        for names, what in ((AUDIO_NAMES, "audio"), (VISION_NAMES, "vision")):
            if weight.startswith(names) and not any(name.startswith(names) for name in self.names):
                return f"{what}, which {self.source.origin} does not have"
        raise self.adapter.error(
            f"{self.adapter.paths[weight]} is no module of {self.source.origin}",
            expected="the weights of this Gemma 3n",
            fix="give the base that it was trained on",
        )

    def check_vocabulary(self, weight: str, pieces: Mapping[Piece, Stored]) -> None:
        """Refuse rows of new tokens. Raises: MappingError."""
        whole = pieces.get(Piece.WHOLE, pieces.get(Piece.BASE))
        if whole is None or weight not in self.names or whole.n_rows == self.base(weight).shape[0]:
            return
        raise self.adapter.error(
            "the vocabulary was changed before the training",
            expected=f"{self.base(weight).shape[0]:,} tokens, as in {self.source.origin}",
            found=f"{whole.n_rows:,} rows of {whole.name}",
            fix=MERGE_IT + ", with its tokenizer",
        )

    def base(self, weight: str) -> SourceTensor:
        return self.source.tensors[self.names[weight]]

    def changed(self, weight: str, pieces: Mapping[Piece, Stored]) -> SourceTensor:
        """A weight as the adapter makes it. Raises: MappingError."""
        base = self.base(weight)
        kind = check_kind(self.adapter, weight, pieces)
        path = self.adapter.paths[weight]
        if self.scale != 1 and kind not in ONLY_ADDED:
            raise UsageError(
                f"{self.adapter.origin}: --adapter-scale for weights that are replaced, not added to",
                found=f"{kind} at {path}",
                fix="leave --adapter-scale out",
            )
        self.kinds[kind] += 1
        if kind == "replaced":
            whole = pieces[Piece.WHOLE]
            self.check(whole, base.shape)
            return replace(base, rows=(whole,))
        if len(base.shape) != 2:
            raise self.adapter.error(
                f"{path} is no matrix", expected="a layer or an embedding", found=str(list(base.shape))
            )
        if kind == "trained tokens":
            return self.with_tokens(weight, base, pieces[Piece.TOKENS])
        n_outputs, n_inputs = base.shape
        a: Rows
        b: Rows
        if Piece.EMBEDDING_A in pieces:
            down, up = pieces[Piece.EMBEDDING_A], pieces[Piece.EMBEDDING_B]
            rank = down.shape[0]  # the tensor's, whatever rank_pattern says
            self.check(down, (rank, n_outputs))
            self.check(up, (n_inputs, rank))
            a, b = Transposed(up), Transposed(down)
        else:
            a, b = pieces[Piece.A], pieces[Piece.B]
            rank = a.shape[0]
            self.check(a, (rank, n_inputs))
            self.check(b, (n_outputs, rank))
        scale = self.adapter.scale(weight, rank) * self.scale
        merged = _each(base, lambda rows, part: LowRank(rows, a, cut(b, part), scale))
        if Piece.LENGTHS in pieces:
            self.check(pieces[Piece.LENGTHS], (n_outputs,))
            lengths = pieces[Piece.LENGTHS].in_rows_of(1)
            merged = _each(merged, lambda rows, part: OfLength(rows, lengths.some(part)))
        return merged

    def check(self, tensor: Stored, shape: tuple[int, ...]) -> None:
        """Raises: MappingError for another shape."""
        if tensor.shape != shape:
            raise self.adapter.error(
                f"{tensor.name} has the wrong shape for {self.source.origin}",
                expected=str(list(shape)),
                found=str(list(tensor.shape)),
                fix="give the base that it was trained on",
            )

    def with_tokens(self, weight: str, base: SourceTensor, rows: Stored) -> SourceTensor:
        """An embedding with other rows for some tokens."""
        ids = self.adapter.tokens_of(weight)
        if ids is None or max(ids, default=0) >= base.shape[0]:
            raise self.adapter.error(
                f"which rows of {self.adapter.paths[weight]} were trained is not said",
                expected=f"trainable_token_indices in adapter_config.json, below {base.shape[0]:,}",
                found="none" if ids is None else f"{max(ids):,}",
            )
        self.check(rows, (len(ids), base.shape[1]))
        places = sorted(((token, place) for place, token in enumerate(ids)), reverse=True)
        table: list[Rows] = []
        for form, part in _parts(base):
            first = part.start
            while places and places[-1][0] in part:
                token, place = places.pop()
                table += [_cut(form, part, first, token), cut(rows, range(place, place + 1))]
                first = token + 1
            table.append(_cut(form, part, first, part.stop))
        return replace(base, rows=tuple(each for each in table if each.n_rows))

    def notices(self, merged: Mapping[str, SourceTensor]) -> list[str]:
        """What a user should know of it."""
        weights = {bare_name(name) for name in merged}
        done = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items()) or "nothing"
        said = [f"merged {self.adapter.origin}: {done}", *self.adapter.notices]
        said += [f"{self.adapter.origin}: left out {count}: {why}" for why, count in self.left_out.items()]
        n_audio = sum(weight.startswith(AUDIO_NAMES) for weight in weights)
        if n_audio:
            said.append(f"{self.adapter.origin}: {n_audio} of its weights are audio: they are in the mmproj file")
        if EMBEDDING in weights:
            said.append(
                f"{self.adapter.origin}: it changes embed_tokens, which is the output matrix too; unless they were "
                "tied in training, that was done with the output matrix as it was"
            )
        trained_on = self.adapter.trained_on or ""
        if QUANTIZED_BASE.search(trained_on):
            said.append(
                f"{self.adapter.origin}: trained on {trained_on}, whose weights have 4 bits; the base that is meant "
                f"here is {QUANTIZED_BASE.sub('', trained_on)} in 16 bits"
            )
        return said


def _spelled() -> Iterator[str]:
    for pieces in KINDS:
        yield " and ".join(sorted(piece.value for piece in pieces))


def _parts(tensor: SourceTensor) -> Iterator[tuple[Rows, range]]:
    """Its forms, each with the range of the tensor's rows that it has."""
    ends = accumulate(rows.n_rows for rows in tensor.rows)
    for rows, end in zip(tensor.rows, ends, strict=True):
        yield rows, range(end - rows.n_rows, end)


def _each(tensor: SourceTensor, make: Callable[[Rows, range], Rows]) -> SourceTensor:
    """A tensor whose rows are other forms, made of each form and its range."""
    return replace(tensor, rows=tuple(make(rows, part) for rows, part in _parts(tensor)))


def _cut(rows: Rows, part: range, first: int, end: int) -> Rows:
    """Some of the rows of a form, by their numbers in the tensor."""
    return cut(rows, range(first - part.start, end - part.start))
