"""Blocks taken apart and put together again: the levels, scales and minima of the types whose codes can be refined.

    weight = scale * unit * point + minimum * minimum's unit

A point is what a level means: a whole number, or a value of IQ4's scale. A scale is an integer in units of the block's
`d`, or, of types with blocks of 32, a float16 by itself. Where the bits lie is told by `Bits`, and both ways follow.

Source: the comments of each type's module; ggml-common.h.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType as QType
from numpy.typing import NDArray

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.quants.iq4_nl import VALUES
from gguf3n.quants.lanes import kernel

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Bits:
    """Where some bits of consecutive integers lie: in `n_groups` groups of `n_bytes` bytes of a field, from byte
    `first` of it.

    The integers go through a group's bytes `times` times: `width` bits of each byte, from bit `shift` upwards. They
    are bits `place` and up of the integers, and are stored with those of `flip` turned over.
    """

    field: str
    n_groups: int
    n_bytes: int
    times: int
    width: int
    place: int = 0
    first: int = 0
    shift: int = 0
    flip: int = 0


@dataclass(frozen=True)
class Parts:
    """What a block is made of.

    Args:
        sub_block: weights of a scale.
        levels: all of them describe the same integers.
        zero: the level that means zero; none for IQ4, whose levels mean VALUES.
        integers: of scales and minima, group by group; none where the scale is the field d and the minimum m.
        scales, minima: where these are among the integers; no minima for types that have none.
        zero_scale: the integer that means zero.
    """

    sub_block: int
    levels: tuple[Bits, ...]
    zero: int | None
    integers: tuple[tuple[Bits, ...], ...] = ()
    scales: Sequence[int] = ()
    minima: Sequence[int] = ()
    zero_scale: int = 0

    @property
    def points(self) -> tuple[int, int]:
        """The lowest and the highest; (0, 0) for IQ4's."""
        return (0, 0) if self.zero is None else (-self.zero, 2 ** _width(self.levels) - 1 - self.zero)

    @property
    def scale_range(self) -> tuple[int, int]:
        """The lowest and the highest integer of a scale; (0, 0) where it is a float16."""
        return (-self.zero_scale, 2 ** _width(self.integers[0]) - 1 - self.zero_scale) if self.integers else (0, 0)


def _width(bits: Sequence[Bits]) -> int:
    return max(each.place + each.width for each in bits)


HALVES = Bits("qs", 1, 16, 2, 4)
FIFTH = Bits("qh", 4, 1, 8, 1, place=4)
QUARTERS = Bits("qs", 2, 32, 4, 2)
NIBBLES = Bits("qs", 4, 32, 2, 4)
SIX_BITS = (
    (Bits("scales", 1, 8, 1, 6),),
    (Bits("scales", 1, 4, 2, 4, first=8), Bits("scales", 1, 8, 1, 2, place=4, shift=6)),
)
"""Scales 0-3, minima 0-3, scales 4-7, minima 4-7; see six_bits.write_six_bits."""
SIX_BIT_SCALES, SIX_BIT_MINIMA = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)

# fmt: off
PARTS: Mapping[QType, Parts] = {
    QType.Q4_0: Parts(32, (HALVES,), 8),
    QType.Q4_1: Parts(32, (HALVES,), 0, minima=(0,)),
    QType.Q5_0: Parts(32, (HALVES, FIFTH), 16),
    QType.Q5_1: Parts(32, (HALVES, FIFTH), 0, minima=(0,)),
    QType.IQ4_NL: Parts(32, (HALVES,), None),
    QType.Q2_K: Parts(16, (QUARTERS,), 0, ((Bits("scales", 16, 1, 2, 4),),), range(0, 32, 2), range(1, 32, 2)),
    QType.Q3_K: Parts(16, (QUARTERS, Bits("hmask", 1, 32, 8, 1, place=2)), 4,
                      ((Bits("scales", 1, 8, 2, 4), Bits("scales", 1, 4, 4, 2, place=4, first=8)),),
                      range(16), zero_scale=32),
    QType.Q4_K: Parts(32, (NIBBLES,), 0, SIX_BITS, SIX_BIT_SCALES, SIX_BIT_MINIMA),
    QType.Q5_K: Parts(32, (NIBBLES, Bits("qh", 1, 32, 8, 1, place=4)), 0, SIX_BITS, SIX_BIT_SCALES, SIX_BIT_MINIMA),
    QType.Q6_K: Parts(16, (Bits("ql", 2, 64, 2, 4), Bits("qh", 2, 32, 4, 2, place=4)), 32,
                      ((Bits("scales", 1, 16, 1, 8, flip=128),),), range(16), zero_scale=128),
    QType.IQ4_XS: Parts(32, (Bits("qs", 8, 16, 2, 4),), None,
                        ((Bits("scales_l", 4, 1, 2, 4), Bits("scales_h", 2, 1, 4, 2, place=4)),),
                        range(8), zero_scale=32),
}
# fmt: on
"""The types whose weights have a level each and whose scales can be moved by themselves.

Left out: Q8_0, whose error no file shows; TQ1_0 and TQ2_0, which take a model's three levels as they are; IQ1 to IQ3,
whose eight weights at a time come from a table.
"""


@dataclass(frozen=True)
class Unpacked:
    """Rows of blocks as numbers, which a kernel may change.

    Shapes: points float32[n_rows, n_per_row]; scales and minima float32[n_rows, n], one a sub-block; units
        float32[n_rows, n, 2], of the scale and of the minimum.
    """

    points: Floats
    scales: Floats
    minima: Floats
    units: Floats

    @property
    def values(self) -> Floats:
        """The weights. Shapes: float32[n_rows, n_per_row]."""
        n_rows, n = self.scales.shape
        scale = (self.scales * self.units[..., 0])[..., None]
        minimum = (self.minima * self.units[..., 1])[..., None]
        values: Floats = (self.points.reshape(n_rows, n, -1) * scale + minimum).reshape(n_rows, -1)
        return values


def unpack(blocks: Bytes, qtype: QType) -> Unpacked:
    """Shapes: blocks uint8[n_rows, row_bytes], C-contiguous."""
    parts, n_rows = PARTS[qtype], len(blocks)
    raw = blocks.reshape(-1, GGML_TYPES[qtype].block_bytes)
    levels = _take(raw, parts.levels, qtype)
    points = VALUES[levels] if parts.zero is None else levels.astype(np.float32) - np.float32(parts.zero)
    fields = raw.reshape(-1).view(GGML_TYPES[qtype].block)
    if parts.integers:
        integers = np.concatenate([_take(raw, bits, qtype) for bits in parts.integers], axis=1).astype(np.float32)
        scales = integers[:, parts.scales] - np.float32(parts.zero_scale)
        minima = integers[:, parts.minima] if parts.minima else np.zeros_like(scales)
        units = np.stack([fields["d"], -fields["dmin"] if parts.minima else np.zeros_like(fields["d"])], axis=1)
        units = np.repeat(units.astype(np.float32)[:, None], scales.shape[1], axis=1)
    else:
        scales = fields["d"].astype(np.float32)[:, None]
        minima = fields["m"].astype(np.float32)[:, None] if parts.minima else np.zeros_like(scales)
        units = np.ones((*scales.shape, 2), np.float32)
    return Unpacked(
        points.reshape(n_rows, -1), scales.reshape(n_rows, -1), minima.reshape(n_rows, -1), units.reshape(n_rows, -1, 2)
    )


def pack(numbers: Unpacked, qtype: QType, blocks: Bytes) -> None:
    """The reverse of `unpack`; what a block has besides stays as it is."""
    parts = PARTS[qtype]
    raw = blocks.reshape(-1, GGML_TYPES[qtype].block_bytes)
    points = numbers.points.reshape(len(raw), -1)
    levels = _levels()[points.astype(np.int16)] if parts.zero is None else points + np.float32(parts.zero)
    _put(raw, parts.levels, qtype, levels.astype(np.uint8))
    scales, minima = (values.reshape(len(raw), -1) for values in (numbers.scales, numbers.minima))
    if parts.integers:
        integers = np.zeros((len(raw), len(parts.scales) + len(parts.minima)), np.uint8)
        integers[:, parts.scales] = (scales + np.float32(parts.zero_scale)).astype(np.uint8)
        if parts.minima:
            integers[:, parts.minima] = minima.astype(np.uint8)
        for bits, some in zip(parts.integers, np.split(integers, len(parts.integers), axis=1), strict=True):
            _put(raw, bits, qtype, some)
        return
    fields = raw.reshape(-1).view(GGML_TYPES[qtype].block)
    fields["d"] = scales[:, 0]
    if parts.minima:
        fields["m"] = minima[:, 0]


@functools.cache
def _levels() -> Bytes:
    """The level of each value of IQ4's, by that value; negative ones count from the end."""
    levels = np.zeros(256, np.uint8)
    levels[VALUES.astype(np.int16)] = np.arange(len(VALUES))
    return levels


def _offset(bits: Bits, qtype: QType) -> int:
    """The first of the bytes that the integers go through."""
    fields = GGML_TYPES[qtype].block.fields
    assert fields is not None
    return int(fields[bits.field][1]) + bits.first


def _take(raw: Bytes, described: Sequence[Bits], qtype: QType) -> Bytes:
    """The integers of each block. Shapes: uint8[n_blocks, n]."""
    n = described[0].n_groups * described[0].times * described[0].n_bytes
    integers = np.zeros((len(raw), n), np.uint8)
    for bits in described:
        start = _offset(bits, qtype)
        add_bits(raw, start, bits.n_bytes, bits.times, bits.width, bits.shift, bits.place, bits.flip, integers)
    return integers


def _put(raw: Bytes, described: Sequence[Bits], qtype: QType, integers: Bytes) -> None:
    """The reverse of `_take`; other bits of the bytes stay."""
    for bits in described:
        start = _offset(bits, qtype)
        set_bits(raw, start, bits.n_bytes, bits.times, bits.width, bits.shift, bits.place, bits.flip, integers)


@kernel
def add_bits(
    raw: np.ndarray,
    start: int,
    n_bytes: int,
    times: int,
    width: int,
    shift: int,
    place: int,
    flip: int,
    integers: np.ndarray,
) -> None:
    """Add to integers what `Bits` says of them. Shapes: raw uint8[n_blocks, block_bytes], integers uint8[n_blocks, n].

    Why loops: # measured: 4 to 8 ns a weight as NumPy expressions, on the core where these take 1.
    """
    mask = np.uint8((1 << width) - 1)
    for block in range(raw.shape[0]):
        for run in range(integers.shape[1] // n_bytes):
            first = start + run // times * n_bytes
            source = raw[block, first : first + n_bytes]
            target = integers[block, run * n_bytes : (run + 1) * n_bytes]
            low = np.uint8(shift + width * (run % times))
            for i in range(n_bytes):
                target[i] |= np.uint8(np.uint8(np.uint8(source[i] >> low) & mask) << np.uint8(place)) ^ np.uint8(flip)


@kernel
def set_bits(
    raw: np.ndarray,
    start: int,
    n_bytes: int,
    times: int,
    width: int,
    shift: int,
    place: int,
    flip: int,
    integers: np.ndarray,
) -> None:
    """Set in raw what `Bits` says of the integers; the reverse of `add_bits`."""
    mask = np.uint8((1 << width) - 1)
    for block in range(raw.shape[0]):
        for run in range(integers.shape[1] // n_bytes):
            first = start + run // times * n_bytes
            target = raw[block, first : first + n_bytes]
            source = integers[block, run * n_bytes : (run + 1) * n_bytes]
            low = np.uint8(shift + width * (run % times))
            others = np.uint8(~np.uint8(mask << low))
            for i in range(n_bytes):
                bits = np.uint8(np.uint8(source[i] ^ np.uint8(flip)) >> np.uint8(place)) & mask
                target[i] = np.uint8(target[i] & others) | np.uint8(bits << low)
