"""MatFormer slices: smaller models inside a larger one, as a function from a checkpoint to a checkpoint.

Gemma 3n was trained so that the first half of each feed-forward network is a network by itself, and so that some layers
can be left out. A slice says which; it moves no weight, it only says where they are:

    layers         those that are left keep their order and get new numbers, with all that belongs to them
    widths         gate and up keep their first rows, down its first columns
    per layer      the two matrices that hold something for each layer keep the groups of those that are left

llama.cpp takes one width for all layers. So a slice of mixed widths is padded to its largest one, which changes nothing
that the model says (see `padded`).

Source: the MatFormer Lab notebook of google-gemini/gemma-cookbook, whose algorithm this is; it forgets layer_types.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf3n.errors import UsageError
from gguf3n.formats.rows import Padded, Rows, SourceTensor, Zeros, some_columns, some_rows
from gguf3n.gemma3n.config import Config
from gguf3n.gemma3n.mapping import map_tensors
from gguf3n.gemma3n.names import bare_name
from gguf3n.gemma3n.source import Checkpoint, Source, open_checkpoint
from gguf3n.gemma3n.text import EMBED_TOKENS, EMBED_TOKENS_PER_LAYER, PER_LAYER_MODEL_PROJECTION, table
from gguf3n.gemma3n.tokenizer import Vocabulary

OF_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
GATE, UP, DOWN = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class Slice:
    """What is taken of a model.

    Args:
        name: for the names of files.
        skip: layers that are left out, by their numbers in the whole model.
        widths: of the feed-forward network of each layer that is left.
    """

    name: str
    skip: tuple[int, ...]
    widths: tuple[int, ...]

    def kept(self, n_layers: int) -> list[int]:
        """The layers that are left, by their numbers in the whole model."""
        return [bid for bid in range(n_layers) if bid not in self.skip]


@dataclass(frozen=True, kw_only=True)
class SlicedCheckpoint(Checkpoint):
    """A slice of a checkpoint, whose files it shares.

    Args:
        whole: what it is a slice of.
        slice: what was taken.
        widths: of each layer, padding included.
    """

    whole: Checkpoint
    slice: Slice
    widths: tuple[int, ...]

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The content that its config.json would have."""
        raw, config = self.whole.raw_config, slice_config(self.whole.config, self.slice, self.widths)
        changes = {
            name: list(value) if isinstance(value := getattr(config, name), tuple) else value for name in CHANGED
        }
        if "text_config" in raw:
            return {**raw, "text_config": {**raw["text_config"], **changes}}
        return {**raw, **changes}

    @property
    def true_config(self) -> Config:
        """The config without padding."""
        return slice_config(self.whole.config, self.slice, self.slice.widths)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The whole's, which is read once. Raises: as of any checkpoint."""
        return self.whole.vocabulary

    @property
    def is_padded(self) -> bool:
        return self.widths != self.slice.widths

    @cached_property
    def unpadded(self) -> SlicedCheckpoint:
        """The same slice with its true widths."""
        return take_slice(self.whole, self.slice, pad=False) if self.is_padded else self


def take_slice(source: str | Path | Source, wanted: Slice, *, pad: bool = True) -> SlicedCheckpoint:
    """A slice of a checkpoint; no weights are read.

    Args:
        source: a checkpoint directory or a Hub id, or one that is open.
        pad: make it one that llama.cpp runs, or refuse; else the true widths, for other engines.

    Raises: UsageError for a slice that the model does not have, or that llama.cpp can't run; SourceError or a class
        below it.
    """
    whole = open_checkpoint(source)
    check_slice(wanted, whole.config, whole.origin)
    map_tensors(table(whole.config), whole.tensors, whole.origin)  # so every tensor is there in its right shape
    made = SlicedCheckpoint(
        origin=f"{whole.origin}, slice {wanted.name}",
        path=whole.path,
        name=f"{whole.name}-{wanted.name}",
        tensors={tensor.name: tensor for tensor in _sliced(whole, wanted)},
        notices=(*whole.notices, *_notices(wanted, whole.config)),
        folder=whole.folder,
        repo_id=whole.repo_id,
        changes=(*whole.changes, wanted.name),
        as_it_stands=False,
        whole=whole,
        slice=wanted,
        widths=wanted.widths,
    )
    return padded(made) if pad else made


CHANGED = (
    "num_hidden_layers", "num_kv_shared_layers", "intermediate_size", "layer_types", "activation_sparsity_pattern"
)  # fmt: skip
"""What a slice has otherwise in its config.json."""


def slice_config(config: Config, wanted: Slice, widths: tuple[int, ...]) -> Config:
    """The config of a slice, its feed-forward networks as wide as is said."""
    kept = wanted.kept(config.num_hidden_layers)
    return replace(
        config,
        num_hidden_layers=len(kept),
        num_kv_shared_layers=sum(config.is_kv_shared(bid) for bid in kept),
        intermediate_size=widths,
        layer_types=tuple(config.layer_types[bid] for bid in kept),
        activation_sparsity_pattern=tuple(config.activation_sparsity_pattern[bid] for bid in kept),
    )


def check_slice(wanted: Slice, config: Config, origin: str) -> None:
    """Refuse a slice that the model does not have. Raises: UsageError."""
    n_layers = config.num_hidden_layers
    place = f"slice {wanted.name}"
    for bid in wanted.skip:
        if not 0 <= bid < n_layers:
            raise UsageError(f"{place}: no layer {bid} to skip", expected=f"0 to {n_layers - 1}, as {origin} has")
    if len(set(wanted.skip)) < len(wanted.skip):
        raise UsageError(f"{place}: a layer is skipped twice", found=_numbers(wanted.skip), fix="name each once")
    if reused := sorted(set(wanted.skip) & reused_layers(config)):
        raise UsageError(
            f"{place}: layer {reused[0]} can't be skipped",
            expected=f"{_numbers(sorted(reused_layers(config)))} kept: all layers from {config.n_kv_layers} on reuse "
            "their keys and values",
            fix="skip others",
        )
    kept = wanted.kept(n_layers)
    if len(wanted.widths) != len(kept):
        raise UsageError(
            f"{place}: {len(wanted.widths)} widths for {len(kept)} layers",
            expected="one for each layer that is not skipped",
        )
    for width, bid in zip(wanted.widths, kept, strict=True):
        if not 1 <= width <= config.intermediate_size[bid]:
            raise UsageError(
                f"{place}: layer {bid} has no part of width {width}",
                expected=f"1 to {config.intermediate_size[bid]}, as {origin} has",
            )


def reused_layers(config: Config) -> set[int]:
    """The layers whose keys and values later layers reuse: the last of each kind that has some of its own."""
    own = config.layer_types[: config.n_kv_layers]
    return {bid for bid, kind in enumerate(own) if kind not in own[bid + 1 :]} if config.num_kv_shared_layers else set()


def _notices(wanted: Slice, config: Config) -> Iterator[str]:
    trained = {part for width in config.intermediate_size for part in (width, width // 2)}
    if other := sorted(set(wanted.widths) - trained):
        yield (
            f"slice {wanted.name}: no model was trained with a width of {_numbers(other)}, only with "
            f"{_numbers(sorted(trained))}; expect it to say little that makes sense"
        )


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _sliced(whole: Checkpoint, wanted: Slice) -> Iterator[SourceTensor]:
    """The tensors of a slice, vision and audio included."""
    config = whole.config
    kept = wanted.kept(config.num_hidden_layers)
    widths = dict(zip(kept, wanted.widths, strict=True))
    size = config.hidden_size_per_layer_input
    groups = tuple(range(run.start * size, run.stop * size) for run in _runs(kept))
    for tensor in whole.tensors.values():
        bare = bare_name(tensor.name)
        if layer := OF_LAYER.fullmatch(bare):
            bid, part = int(layer[1]), layer[2]
            if bid in widths:
                name = f"{tensor.name.removesuffix(bare)}layers.{kept.index(bid)}.{part}"
                yield replace(_narrowed(tensor, part, widths[bid]), name=name)
        elif bare == PER_LAYER_MODEL_PROJECTION:
            rows = tuple(part for group in groups for part in some_rows(tensor.rows, group))
            yield replace(tensor, shape=(len(kept) * size, *tensor.shape[1:]), rows=rows)
        elif bare == EMBED_TOKENS_PER_LAYER:
            rows = some_columns(tensor.rows, groups)
            yield replace(tensor, shape=(tensor.shape[0], len(kept) * size), rows=rows)
        else:
            yield tensor


def _narrowed(tensor: SourceTensor, part: str, width: int) -> SourceTensor:
    """The first rows or columns of a matrix of the feed-forward network; any other tensor as it is."""
    if part in (GATE, UP):
        return replace(tensor, shape=(width, tensor.shape[1]), rows=some_rows(tensor.rows, range(width)))
    if part == DOWN:
        return replace(tensor, shape=(tensor.shape[0], width), rows=some_columns(tensor.rows, (range(width),)))
    return tensor


def _runs(bids: Sequence[int]) -> list[range]:
    """Sorted numbers as ranges."""
    runs: list[range] = []
    for bid in bids:
        if runs and runs[-1].stop == bid:
            runs[-1] = range(runs[-1].start, bid + 1)
        else:
            runs.append(range(bid, bid + 1))
    return runs


def padded(source: SlicedCheckpoint) -> SlicedCheckpoint:
    """The same model with one width for all layers, the largest, as llama.cpp wants it.

        dense layers     zeros for the rows that gate and up lack, and for the columns that down lacks
        sparse layers    the same, but gate's own rows again: what survives depends on the mean and the deviation of all
                         of its outputs, which are those of the repeated ones

    Exact: what is added is multiplied by zero. llama.cpp divides the variance by one less than the width, transformers
        by the width, so its deviation of twice as many outputs is another by one part in four widths, and nearer.

    Raises: UsageError for layers that llama.cpp needs, and for a width that does not divide the largest.
    """
    wanted, config = source.slice, source.whole.config
    if early := sorted(bid for bid in wanted.skip if not config.is_kv_shared(bid)):
        raise UsageError(
            f"slice {wanted.name}: llama.cpp runs no Gemma 3n without layer {early[0]}",
            expected=f"only layers from {config.n_kv_layers} on to be skipped: llama.cpp has the number of layers with "
            "keys and values of their own and of sparse layers built in, and would give wrong results",
            found=f"{_numbers(early)} skipped",
            fix="skip later layers, or add --no-pad for an engine that reads these numbers",
        )
    width = max(wanted.widths)
    if set(wanted.widths) == {width}:
        return source
    made = dict(source.tensors)
    for name, tensor in source.tensors.items():
        layer = OF_LAYER.fullmatch(bare_name(name))
        if layer and layer[2] in (GATE, UP, DOWN):
            bid = int(layer[1])
            is_sparse = source.true_config.activation_sparsity_pattern[bid] > 0
            if is_sparse and width % wanted.widths[bid]:
                raise UsageError(
                    f"slice {wanted.name}: layer {bid} is sparse, and can't be padded from {wanted.widths[bid]} to "
                    f"{width}",
                    expected=f"a width that divides {width}",
                    fix="choose another width, or add --no-pad for an engine that takes mixed ones",
                )
            made[name] = _widened(tensor, layer[2], wanted.widths[bid], width, repeat=is_sparse)
    return replace(source, tensors=made, widths=(width,) * len(wanted.widths))


def _widened(tensor: SourceTensor, part: str, narrow: int, wide: int, *, repeat: bool) -> SourceTensor:
    if narrow == wide:
        return tensor
    rows: tuple[Rows, ...]
    if part == DOWN:
        rows = tuple(Padded(form, wide) for form in tensor.rows)
        return replace(tensor, shape=(tensor.shape[0], wide), rows=rows)
    if part == GATE and repeat:
        rows = tensor.rows * (wide // narrow)
    else:
        rows = (*tensor.rows, Zeros(wide - narrow, tensor.shape[1]))
    return replace(tensor, shape=(wide, tensor.shape[1]), rows=rows)


def effective_parameters(config: Config) -> int:
    """Weights that are computed with for each token: all of the text model but the two tables, which are looked up in.

    Source: what Google calls effective, as in E4B; a table may stay on a disk.
    """
    known = table(config)
    return sum(
        math.prod(known.shape(rule.shape, bid))
        for rule, bid in known.order
        if rule.source not in (EMBED_TOKENS, EMBED_TOKENS_PER_LAYER)
    )
