"""IQ3_S: super-blocks of 8 blocks of 32 weights; groups of 4 magnitudes on a grid of 512 points, a sign bit a weight
and a 4-bit scale a block; 3.4375 bits a weight.

    super-block (110 bytes)   d       float16     scale of the scales
                              qs      uint8[64]   low eight bits of the grid indices, one a group
                              qh      uint8[8]    ninth bits, one byte a block
                              signs   uint8[32]   one bit a weight, set where it is negative
                              scales  uint8[4]    scales, even blocks in the low halves
    weight = d * (2 * scale + 1) * (2 * level + 1), with its sign

The search, which IQ3_XXS shares, tries a row of scales a block. For each it rounds every group to the lattice, to the
best of the near grid points where the cell is not one itself, and computes the least-squares scale; the points of the
best one are found again with the final scale.

Source: quantize_row_iq3_s_impl and iq3_find_best_neighbour in ggml-quants.c.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from gguf3n.quants.lanes import (
    SUPER_BLOCK,
    gather,
    inlined,
    kernel,
    round_half_even,
    scratch,
    sum_of_squares,
    weigh,
    write_f16,
)
from gguf3n.quants.lattice import contenders, lattice
from gguf3n.quants.lookups import half_byte, look_up, look_up_pair, place_value
from gguf3n.quants.vectors import WIDTH, Vector, any_lane, floor, level, load, splat, sqrt, store, where

BLOCK = 32
BLOCKS = SUPER_BLOCK // BLOCK
GROUPS = BLOCK // 4
SUPER_BYTES = 2 + 64 + 8 + 32 + 4

# Rows of the scratch array S[row, lane], one super-block a lane: its weights, the block in work, all its blocks.
MAGNITUDE = SUPER_BLOCK
WEIGHT = MAGNITUDE + BLOCK
ROOT = WEIGHT + BLOCK
TRIED = ROOT + BLOCK
INVERSE = TRIED + GROUPS
STEP = INVERSE + 1
DOUBT = STEP + 1
POINTS = DOUBT + 1
SIGNS = POINTS + BLOCKS * GROUPS
SCALES = SIGNS + 4 * BLOCKS
LEVELS = SCALES + BLOCKS
EMPTY = LEVELS + BLOCKS
HIGHEST = EMPTY + BLOCKS
D = HIGHEST + 1
ROWS = D + 1

ZERO = np.float32(0)
ONE = np.float32(1)
HALF = np.float32(0.5)
BORDER = np.float32(1e-4)
"""How close to the border of a half-cell rounding errors may matter; they are some 1e-6."""
FLT_MAX = np.finfo(np.float32).max
SMALLEST = np.float32(2.0**-149)

OFF_GRID = 2**16
"""Added to the packed values of a point, it says that the group's own cell is not on the grid."""

LOWEST = 4369.0
"""The packed values of a group of level zero: 1, four bits each."""

Grid: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def grid_arrays(name: str) -> Grid:
    """What a search needs of a lattice: contenders, index and neighbours, and the packed values of each point."""
    grid, near = lattice(name), contenders(name)
    codes = (2 * grid.points.astype(np.int32) + 1) @ (1 << np.arange(0, 16, 4, dtype=np.int32))
    return near.heads, near.entries, grid.index, grid.start, grid.neighbour, codes


@kernel
def find_among_all(S: np.ndarray, group: int, lane: int, grid: Grid) -> np.float32:
    """The packed values of the grid point for one group: the slow way, which is ggml's and good for every case.

    Exact: ggml aborts the process where no neighbour has a finite distance, as with weights of 1e19; this takes the
        nearest one then.
    """
    _, _, index, start, neighbour, codes = grid
    inverse, step = S[INVERSE, lane], S[STEP, lane]
    cell = 0
    for i in range(4):
        nearest = round_half_even(HALF * (inverse * S[MAGNITUDE + 4 * group + i, lane] - ONE))
        cell |= max(0, min(7, nearest)) << (3 * i)
    if index[cell] >= 0:
        return np.float32(codes[index[cell]])
    best = FLT_MAX
    found = neighbour[start[cell]]
    for n in range(start[cell], start[cell + 1]):
        code = codes[neighbour[n]]
        distance = ZERO
        for i in range(4):
            apart = step * np.float32((code >> (4 * i)) & 15) - S[MAGNITUDE + 4 * group + i, lane]
            distance += S[ROOT + 4 * group + i, lane] * apart * apart
        if distance < best:
            best = distance
            found = neighbour[n]
    return np.float32(codes[found] + OFF_GRID)


@inlined
def lesser(a: Vector, b: Vector | np.float32) -> Vector:
    return where(a < b, a, b)


@inlined
def greater(a: Vector, b: Vector | np.float32) -> Vector:
    return where(a > b, a, b)


@inlined
def bounded(y: Vector) -> Vector:
    """Brought into the range that lattice.Contenders asks for."""
    return lesser(greater(y, np.float32(1.5)), np.float32(14.5))


@inlined
def find_points(S: np.ndarray, largest: Vector, inverse: Vector, step: Vector, grid: Grid) -> None:
    """Round each group to a grid point, for the scale `step` and its inverse: packed values to rows TRIED.

    Why: close to the border of a half-cell, and where float32 leaves its usual range, more neighbours than the
        contenders can win; such groups, less than one in a thousand of Gaussian weights, take the slow way.
        # measured: entries one by one as float32, and half bytes shifted down: a tenth slower than pairs in place
    """
    heads, entries = grid[0], grid[1]
    usual = (largest * inverse < np.float32(1e6)) & (step > np.float32(1e-30)) & (step < np.float32(1e30))
    unusual = where(usual, ZERO, ONE)
    step1 = step * np.float32(2**-4)
    step2 = step * np.float32(2**-8)
    step3 = step * np.float32(2**-12)
    for group in range(GROUPS):
        x0 = load(S, MAGNITUDE + 4 * group)
        x1 = load(S, MAGNITUDE + 4 * group + 1)
        x2 = load(S, MAGNITUDE + 4 * group + 2)
        x3 = load(S, MAGNITUDE + 4 * group + 3)
        y0 = bounded(inverse * x0)
        y1 = bounded(inverse * x1)
        y2 = bounded(inverse * x2)
        y3 = bounded(inverse * x3)
        f0 = floor(y0)
        f1 = floor(y1)
        f2 = floor(y2)
        f3 = floor(y3)
        below = lesser(lesser(y0 - f0, y1 - f1), lesser(y2 - f2, y3 - f3))
        above = greater(greater(y0 - f0, y1 - f1), greater(y2 - f2, y3 - f3))
        doubt = (unusual > ZERO) | (below < BORDER) | (above > ONE - BORDER)

        head = look_up(heads, f0 + f1 * np.float32(16) + f2 * np.float32(256) + f3 * np.float32(4096))
        pair = floor(head * np.float32(1 / 16))
        count = head - pair * np.float32(16)
        w0 = load(S, ROOT + 4 * group)
        w1 = load(S, ROOT + 4 * group + 1)
        w2 = load(S, ROOT + 4 * group + 2)
        w3 = load(S, ROOT + 4 * group + 3)
        two = look_up_pair(entries, pair)
        point = two[0]
        nearest = splat(FLT_MAX)
        n = ONE
        while True:
            for other in two:
                a0 = step * place_value(other, 0) - x0
                a1 = step1 * place_value(other, 1) - x1
                a2 = step2 * place_value(other, 2) - x2
                a3 = step3 * place_value(other, 3) - x3
                distance = w0 * a0 * a0 + w1 * a1 * a1 + w2 * a2 * a2 + w3 * a3 * a3
                nearer = distance < nearest
                nearest = where(nearer, distance, nearest)
                point = where(nearer, other, point)
            if not any_lane(count > n):
                break
            two = look_up_pair(entries, where(count > n, pair + n, pair))
            n += ONE
        point = where(count > ZERO, point + np.float32(OFF_GRID), point)
        store(S, TRIED + group, point)
        if any_lane(doubt):
            store(S, INVERSE, inverse)
            store(S, STEP, step)
            store(S, DOUBT, where(doubt, ONE, ZERO))
            for lane in range(WIDTH):
                if S[DOUBT, lane] > ZERO:
                    S[TRIED + group, lane] = find_among_all(S, group, lane, grid)


@inlined
def products(S: np.ndarray, points: int) -> tuple[Vector, Vector]:
    """Weighted sums of magnitude * q and of q * q, for the packed values q in the rows from `points`."""
    sumqx = splat(ZERO)
    sumq2 = splat(ZERO)
    for group in range(GROUPS):
        point = load(S, points + group)
        for i in range(4):
            q = half_byte(point, i)
            weight = load(S, WEIGHT + 4 * group + i)
            sumqx = sumqx + weight * load(S, MAGNITUDE + 4 * group + i) * q
            sumq2 = sumq2 + weight * q * q
    return sumqx, sumq2


@inlined
def search(S: np.ndarray, block: int, tries: int, tiny: np.float32, again: bool, grid: Grid) -> None:
    """Find scale and grid points of each lane's block of 32 magnitudes.

    Shapes: reads rows MAGNITUDE, WEIGHT, ROOT; writes the rows of `block` among POINTS, SCALES, EMPTY.
    Args:
        tries: how many scales above and below the one that makes the largest magnitude the highest level.
        tiny: blocks whose largest magnitude is less are empty.
        again: in the end, find all groups again if any is off the grid; else only those that are.
    """
    points = POINTS + GROUPS * block
    peak = load(S, MAGNITUDE)
    largest = abs(peak)
    for i in range(1, BLOCK):
        x = load(S, MAGNITUDE + i)
        peak = greater(peak, x)
        largest = greater(largest, abs(x))
    empty = peak < tiny
    store(S, EMPTY + block, where(empty, ONE, ZERO))
    # ggml quirk: where no try is any good, IQ3_S counts the groups as off the grid, IQ3_XXS does not.
    for group in range(GROUPS):
        store(S, points + group, splat(np.float32(LOWEST + OFF_GRID if again else LOWEST)))
    scale = peak / np.float32(15)
    best = splat(ZERO)
    for t in range(-tries, tries + 1):
        inverse = where(empty, ZERO, (np.float32(15) + np.float32(t) * np.float32(0.2)) / peak)
        find_points(S, largest, inverse, where(empty, ONE, ONE / inverse), grid)
        sumqx, sumq2 = products(S, TRIED)
        better = (sumq2 > ZERO) & (sumqx * sumqx > best * sumq2)
        if any_lane(better):
            fit = sumqx / sumq2
            scale = where(better, fit, scale)
            best = where(better, fit * sumqx, best)
            for group in range(GROUPS):
                store(S, points + group, where(better, load(S, TRIED + group), load(S, points + group)))
    off_grid = splat(ZERO)
    for group in range(GROUPS):
        off_grid = where(load(S, points + group) >= np.float32(OFF_GRID), ONE, off_grid)
    refit = (off_grid > ZERO) & (scale > ZERO)
    find_points(S, largest, where(refit, ONE / scale, ZERO), where(refit, scale, ONE), grid)
    for group in range(GROUPS):
        point = load(S, points + group)
        replace = refit if again else refit & (point >= np.float32(OFF_GRID))
        store(S, points + group, where(replace, load(S, TRIED + group), point))
    sumqx, sumq2 = products(S, points)
    scale = where(refit & (sumq2 > ZERO), sumqx / sumq2, scale)
    store(S, SCALES + block, where(empty, ZERO, scale))


@inlined
def quantize_scales(S: np.ndarray) -> Vector:
    """Round the scales of the blocks to 4 bits: rows LEVELS; returns the scale of the scales. Row HIGHEST is set."""
    highest = splat(ZERO)
    for block in range(BLOCKS):
        scale = load(S, SCALES + block)
        highest = greater(highest, scale)
    store(S, HIGHEST, highest)
    d = highest / np.float32(31)
    inverse = where(highest > ZERO, ONE / d, ZERO)
    for block in range(BLOCKS):
        store(S, LEVELS + block, level(HALF * (inverse * load(S, SCALES + block) - ONE), 0, 15))
    return d


@inlined
def weigh_block(S: np.ndarray, block: int, quant_weights: np.ndarray | None, start: int, variance: Vector) -> None:
    """The importances of the weights of a block (rows WEIGHT), and their square roots (rows ROOT)."""
    weigh(S, block * BLOCK, BLOCK, quant_weights, start + block * BLOCK, variance, WEIGHT)
    for i in range(BLOCK):
        store(S, ROOT + i, sqrt(load(S, WEIGHT + i)))


@kernel
def search_and_write(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray, grid: Grid) -> None:
    """The kernel of quantize."""
    S = scratch(ROWS, WIDTH)
    for first in range(0, rows.shape[0], WIDTH):
        for start in range(0, rows.shape[1], SUPER_BLOCK):
            gather(rows, first, start, SUPER_BLOCK, S)
            variance = np.float32(2) * sum_of_squares(S, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
            for block in range(BLOCKS):
                weigh_block(S, block, quant_weights, start, variance)
                split_signs(S, block)
                search(S, block, 9, SMALLEST, True, grid)
            store(S, D, quantize_scales(S) * np.float32(1.033))
            for lane in range(min(WIDTH, rows.shape[0] - first)):
                y = out[first + lane, start // SUPER_BLOCK * SUPER_BYTES : (start // SUPER_BLOCK + 1) * SUPER_BYTES]
                write(S, lane, grid[2], y)


@inlined
def split_signs(S: np.ndarray, block: int) -> None:
    """Split the weights of a block into magnitudes (rows MAGNITUDE) and sign bits, eight a row (rows SIGNS)."""
    for k in range(4):
        signs = splat(ZERO)
        for i in range(8):
            x = load(S, block * BLOCK + 8 * k + i)
            store(S, MAGNITUDE + 8 * k + i, abs(x))
            signs = signs + where(x < ZERO, np.float32(1 << i), ZERO)
        store(S, SIGNS + 4 * block + k, signs)


@kernel
def point_index(point: np.float32, index: np.ndarray) -> int:
    """The grid index of packed values."""
    code = int(point)
    cell = 0
    for i in range(4):
        cell |= (code >> (4 * i + 1) & 7) << (3 * i)
    return int(index[cell])


@kernel
def write(S: np.ndarray, lane: int, index: np.ndarray, y: np.ndarray) -> None:
    """Write the super-block of one lane."""
    y[:] = np.uint8(0)
    write_f16(S[D, lane], y)
    place = 0
    for block in range(BLOCKS):
        y[106 + block // 2] |= np.uint8(np.int32(S[LEVELS + block, lane]) << 4 * (block % 2))
        # ggml quirk: qs and signs leave out empty blocks, and later ones move up; qh and scales do not.
        if S[EMPTY + block, lane] > ZERO:
            continue
        for k in range(GROUPS):
            point = point_index(S[POINTS + GROUPS * block + k, lane], index)
            y[2 + GROUPS * place + k] = np.uint8(point & 255)
            y[66 + block] |= np.uint8(point >> 8 << k)
        for k in range(4):
            y[74 + 4 * place + k] = np.uint8(S[SIGNS + 4 * block + k, lane])
        place += 1


def quantize(rows: np.ndarray, quant_weights: np.ndarray | None, out: np.ndarray) -> None:
    """Quantize float32 rows; a weight's error counts by its column's quant_weight and its size, or else by its square.

    Shapes: rows float32[n_rows, n_per_row], n_per_row a multiple of 256; quant_weights float32[n_per_row] or None;
        out uint8[n_rows, n_per_row / 256 * 110].
    Exact: byte-equal to ggml, where ggml does not give up; see find_among_all.
    """
    search_and_write(rows, quant_weights, out, grid_arrays("IQ3_S"))
