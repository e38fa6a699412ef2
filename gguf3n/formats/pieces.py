"""Tensors that a training has saved in pieces, each rank its own, put together again as rows.

    files       shard-00001-model-00002-of-00003.safetensors: what rank 0 has of the second of three files
    metadata    "DCP_SHARDING_INFO": '{"name": {"saved_offsets": [row, column]}, …}', in the header's "__metadata__"

A header has a piece's own shape, and the metadata say where in its tensor it begins. A tensor reaches as far as its
pieces do, and they must cover it, each place once. FSDP cuts the first dimension, tensor parallelism the first or the
second, in parts of different sizes where it can't be helped.

Source: hf_storage.py and _hf_utils.py in torch/distributed/checkpoint, which NeMo Automodel writes with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf3n.errors import CheckpointError, shown
from gguf3n.formats.rows import Rows, SideBySide, SourceTensor, Stored
from gguf3n.formats.small_file import parse_json

INFO = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"

MAX_OFFSET = 1 << 63
"""No place in a real tensor is farther out; Python's integers would not mind."""

RANK_SHARD = re.compile(r"shard-(\d{5})-model-(\d{5})-of-(\d{5})\.safetensors")
SHOWN = 5
"""Files that a message names."""
ALL_FILES = "copy all shard files of this save, and none of another"


@dataclass(frozen=True)
class Piece:
    """What one file has of a tensor. `offsets`: where that begins; None where the file has the whole tensor."""

    stored: Stored
    offsets: tuple[int, ...] | None = None


def read_offsets(path: Path, metadata: Any, names: Collection[str]) -> dict[str, Any]:
    """Where the pieces of a file begin, as it says that; nothing for a file that is not of pieces.

    Args:
        metadata: what the header has under "__metadata__".
        names: the tensors of the file.

    Raises: CheckpointError.
    """
    text = metadata.get(INFO) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    origin = f"{path}: {INFO}"
    if not isinstance(text, str):
        raise CheckpointError(f"{origin} is malformed", expected="JSON in a string", found=shown(text))
    info = parse_json(text.encode("utf-8", "surrogatepass"), origin, CheckpointError)
    if not isinstance(info, dict) or info.keys() != set(names):
        odd = sorted(info.keys() ^ set(names))[:1] if isinstance(info, dict) else []
        raise CheckpointError(
            f"{origin} is malformed",
            expected=f"an entry for each of the file's {len(names):,} tensors",
            found=f"{len(info):,}, of which {shown(odd[0])} is without a match" if odd else shown(info),
        )
    return {name: entry.get(OFFSETS) if isinstance(entry, dict) else entry for name, entry in info.items()}


def piece_at(stored: Stored, offsets: Any) -> Piece:
    """A piece that begins where a file says that it does. Raises: CheckpointError."""
    sane = isinstance(offsets, list) and all(type(n) is int and 0 <= n < MAX_OFFSET for n in offsets)
    if not sane or len(offsets) != len(stored.shape):
        raise CheckpointError(
            f"{stored.origin} has unusable {OFFSETS} in {INFO}",
            expected=f"{len(stored.shape)} numbers, where the piece of {list(stored.shape)} begins",
            found=shown(offsets),
        )
    return Piece(stored, tuple(offsets))


def put_together(pieces: Iterable[Piece]) -> dict[str, SourceTensor]:
    """The tensors that pieces make up, by their names. Raises: CheckpointError for pieces that make up none."""
    of_tensor: dict[str, list[Piece]] = {}
    for piece in pieces:
        of_tensor.setdefault(piece.stored.name, []).append(piece)
    return {name: _tensor(name, own) for name, own in of_tensor.items()}


def _tensor(name: str, pieces: list[Piece]) -> SourceTensor:
    shape, first = _shape(pieces), pieces[0].stored
    is_whole = 0 in shape or (len(pieces) == 1 and first.shape == shape)
    return SourceTensor(name, shape, (first,) if is_whole else tuple(_rows(pieces, shape)))


def _shape(pieces: list[Piece]) -> tuple[int, ...]:
    """As far as the pieces of a tensor reach, which must be alike."""
    first = pieces[0].stored
    for piece in pieces[1:]:
        other = piece.stored
        if piece.offsets is None or pieces[0].offsets is None:
            raise CheckpointError(
                f"{other.origin} is in {Path(first.file_name).name} as well",
                expected="each tensor in one shard",
                fix="remove the shards that belong to another model",
            )
        if (other.dtype, len(other.shape)) != (first.dtype, len(first.shape)):
            raise CheckpointError(
                f"{other.origin} is not like its piece in {Path(first.file_name).name}",
                expected=f"{first.dtype} with {len(first.shape)} dimensions",
                found=f"{other.dtype} with {len(other.shape)}",
                fix=ALL_FILES,
            )
    ends = [[begin + n for begin, n in zip(_offsets(piece), piece.stored.shape, strict=True)] for piece in pieces]
    return tuple(map(max, zip(*ends, strict=True)))


def _offsets(piece: Piece) -> tuple[int, ...]:
    return piece.offsets or (0,) * len(piece.stored.shape)


@dataclass(frozen=True)
class _Box:
    """The rows and columns of a tensor that a piece has."""

    stored: Stored
    top: int
    bottom: int
    left: int
    right: int


def _rows(pieces: list[Piece], shape: tuple[int, ...]) -> Iterator[Rows]:
    """The rows of a tensor from top to bottom, cut wherever a piece begins or ends."""
    boxes = [_box(piece, shape) for piece in pieces if 0 not in piece.stored.shape]
    n_rows, n_columns = math.prod(shape[:-1]), math.prod(shape[-1:])
    boxes.sort(key=lambda box: box.top, reverse=True)
    edges = sorted({0, n_rows, *(box.top for box in boxes), *(box.bottom for box in boxes)})
    here: list[_Box] = []
    for top, bottom in pairwise(edges):
        here = [box for box in here if box.bottom > top]
        while boxes and boxes[-1].top == top:
            here.append(boxes.pop())
        here.sort(key=lambda box: box.left)
        gap = _uncovered(here, n_columns)
        if gap is not None:
            raise _untiled(pieces, shape, f"rows {top:,} to {bottom - 1:,}", gap)
        parts = [box.stored.some(range(top - box.top, bottom - box.top)) for box in here]
        yield parts[0] if len(parts) == 1 else SideBySide(tuple(parts))


def _box(piece: Piece, shape: tuple[int, ...]) -> _Box:
    stored, offsets = piece.stored, _offsets(piece)
    if len(shape) > 2 and stored.shape[1:] != shape[1:]:
        raise CheckpointError(
            f"{stored.origin} is cut in a way that can't be read",
            expected="pieces along the first dimension of what has more than two",
            found=f"{list(stored.shape)} at {list(offsets)}, of {list(shape)}",
            fix="save the model consolidated, or consolidate it",
        )
    left = math.prod(offsets[-1:]) if len(shape) in (1, 2) else 0
    top = offsets[0] * math.prod(shape[1:-1]) if len(shape) > 1 else 0
    return _Box(stored, top, top + stored.n_rows, left, left + stored.n_per_row)


def _uncovered(boxes: list[_Box], n_columns: int) -> tuple[int, int] | None:
    """Where, from left to right, the next box should begin and where it does; None where all columns are there once."""
    edges = [0, *(edge for box in boxes for edge in (box.left, box.right)), n_columns]
    return next((gap for gap in zip(edges[::2], edges[1::2], strict=True) if gap[0] != gap[1]), None)


def _untiled(pieces: list[Piece], shape: tuple[int, ...], rows: str, gap: tuple[int, int]) -> CheckpointError:
    paths = sorted({Path(piece.stored.file_name) for piece in pieces})
    names = ", ".join(path.name for path in paths[:SHOWN])
    more = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
    is_missing = gap[0] < gap[1]
    absent = _absent(paths) if is_missing else []
    return CheckpointError(
        f"{pieces[0].stored.origin} and its other pieces {'leave a gap' if is_missing else 'overlap'}",
        expected=f"each place of {list(shape)} once",
        found=f"{rows}, columns {min(gap):,} to {max(gap) - 1:,} "
        f"{'in none' if is_missing else 'more than once'} of {names}{more}",
        fix=f"{ALL_FILES}: {absent[0]} is not there" if absent else ALL_FILES,
    )


def _absent(paths: list[Path]) -> list[str]:
    """Files like these that ranks among theirs do not have."""
    found = [match for path in paths if (match := RANK_SHARD.fullmatch(path.name))]
    ranks = range(1, max((int(match[1]) for match in found), default=0))
    ends = {match[0].removeprefix(f"shard-{match[1]}") for match in found}
    names = {f"shard-{rank:05d}{end}" for rank in ranks for end in ends}
    return sorted(name for name in names if not (paths[0].parent / name).exists())
