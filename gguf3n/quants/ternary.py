"""Groups of eight weights on a three-level lattice: what the IQ2 and IQ1 types share.

A search first rounds each weight of a group to a level on its own. If the resulting code (see `codes`) is a point of
the lattice's grid, it stands; if not, the nearest of the code's neighbours takes its place, by weighted squared
distance.

Why: a distance is a sum over the eight weights, in order, of a term that has only three values, one a level. So
    `find_terms` computes these 24 terms for all lanes, a group each, and `nearest_code` then takes one group after the
    other, its neighbours in the lanes: a lane picks its terms and adds them up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from gguf3n.quants.codes import as_code, digit, first_smallest, load_codes, pick_term, store_terms
from gguf3n.quants.lanes import f32_bits, f32_from_bits, inlined, kernel
from gguf3n.quants.lattice import cell_levels, lattice
from gguf3n.quants.vectors import WIDTH, Vector, level, load, nearest, splat, store, where

GROUP = 8
LEVELS = 3
TERMS = GROUP * 4
"""Rows that the terms of a group take, four a weight; see codes.store_terms."""

MOVED_BIT = 16
MOVED = np.uint32(1 << MOVED_BIT)
"""Set in a code that the search has put in the place of another one."""

ZERO = np.float32(0.0)
HALF = np.float32(0.5)
ONE = np.float32(1.0)
TWO = np.float32(2.0)

NEARLY_HALF = np.float32(0.4999)
"""A weight that is not nearer than this to the middle between two levels has its smallest term at its own level."""


class Tables(NamedTuple):
    """One grid, and the neighbours of every code that is not in it.

    Shapes: place int16[65536], by code: the index in the grid, or -1 - list;
        neighbours uint16[n_rows, WIDTH], codes, nearest first, a list filled up with copies of its first one;
        every int32[n_lists + 1]: a list has the rows every[list] : every[list + 1];
        likely int32[n_lists + 1], the same for lists without the neighbours that cannot win in a sound search.
    """

    place: np.ndarray
    neighbours: np.ndarray
    every: np.ndarray
    likely: np.ndarray


@functools.cache
def tables(name: str) -> Tables:
    """The tables of one of the three-level lattices; derived at the first call of a process."""
    grid = lattice(name)
    cells = cell_levels(LEVELS, GROUP)
    bits = 4 ** np.arange(GROUP)
    codes = cells @ bits
    off_grid = grid.index < 0
    place = np.zeros(4**GROUP, dtype=np.int16)
    place[codes[~off_grid]] = grid.index[~off_grid]
    place[codes[off_grid]] = -1 - np.arange(off_grid.sum())

    cell = np.repeat(np.arange(len(cells)), np.diff(grid.start))
    neighbours = (grid.points @ bits).astype(np.uint16)[grid.neighbour]
    can_win = undominated(cells, grid.points, grid.start, grid.neighbour)
    likely, likely_rows = in_rows(cell[can_win], neighbours[can_win], off_grid)
    every, every_rows = in_rows(cell, neighbours, off_grid)
    return Tables(place, np.concatenate((likely_rows, every_rows)), every + np.int32(len(likely_rows)), likely)


@kernel
def undominated(cells: np.ndarray, points: np.ndarray, start: np.ndarray, neighbour: np.ndarray) -> np.ndarray:
    """Which neighbours can win in a sound search: those for which no earlier one lies, level by level, between the
    cell and them.

    Exact: of two levels on the same side of the cell's, the nearer one has no larger term, and a sum of rounded
        additions does not fall when a term grows. So the earlier neighbour is at least as near, and first.
    """
    keep = np.ones(neighbour.size, np.bool_)
    for cell in range(len(cells)):
        for later in range(start[cell], start[cell + 1]):
            b = points[neighbour[later]]
            for earlier in range(start[cell], later):
                a = points[neighbour[earlier]]
                between = True
                for i in range(GROUP):
                    c = cells[cell, i]
                    if a[i] < min(c, b[i]) or a[i] > max(c, b[i]):
                        between = False
                        break
                if between:
                    keep[later] = False
                    break
    return keep


def in_rows(cell: np.ndarray, codes: np.ndarray, off_grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay out lists in whole rows: int32[n_lists + 1], where each begins, and uint16[n_rows, WIDTH]."""
    count = np.bincount(cell, minlength=len(off_grid))
    start = np.cumsum(count) - count
    n_rows = -(-count // WIDTH)
    first_row = np.cumsum(n_rows) - n_rows
    rows = np.repeat(codes[np.where(off_grid, start, 0)], n_rows * WIDTH)
    rows[np.arange(len(cell)) - start[cell] + first_row[cell] * WIDTH] = codes
    return np.append(first_row[off_grid], n_rows.sum()).astype(np.int32), rows.reshape(-1, WIDTH)


@inlined
def round_groups(S: np.ndarray, x: int, n_groups: int, inverse: Vector, codes: int, sound: int) -> None:
    """Round each weight on its own: the code whose values 2 * level + 1 are nearest to inverse * x.

    Shapes: rows of S from x, 8 a group; from codes and sound, 1 a group.
    """
    for k in range(n_groups):
        code = splat(ZERO)
        is_sound = inverse == inverse
        for i in range(GROUP):
            y = HALF * (inverse * load(S, x + GROUP * k + i) - ONE)
            code = code + level(y, 0, LEVELS - 1) * np.float32(1 << 2 * i)
            is_sound = is_sound & (abs(y - nearest(y)) <= NEARLY_HALF)
        store(S, codes + k, as_code(code))
        store(S, sound + k, where(is_sound, ONE, ZERO))


@inlined
def choose(levels: Vector, values: tuple[Vector, Vector, Vector]) -> Vector:
    """The value of each level."""
    return where(levels == ZERO, values[0], where(levels == ONE, values[1], values[2]))


@inlined
def check_codes(
    S: np.ndarray, x: int, n_groups: int, values: tuple[Vector, Vector, Vector], codes: int, sound: int
) -> None:
    """Whether every weight of a group has the nearest of these values as its level's value.

    Shapes: rows of S from x, 8 a group; from codes and sound, 1 a group.
    """
    for k in range(n_groups):
        code = load(S, codes + k)
        is_sound = values[0] == values[0]
        for i in range(GROUP):
            x_i = load(S, x + GROUP * k + i)
            apart_0 = abs(values[0] - x_i)
            apart_1 = abs(values[1] - x_i)
            apart_2 = abs(values[2] - x_i)
            own = choose(digit(code, i), (apart_0, apart_1, apart_2))
            is_sound = is_sound & (own <= apart_0) & (own <= apart_1) & (own <= apart_2)
        store(S, sound + k, where(is_sound, ONE, ZERO))


@inlined
def find_terms(
    S: np.ndarray, x: int, weights: int, n_groups: int, values: tuple[Vector, Vector, Vector], terms: int
) -> None:
    """Compute the terms of the groups' distances from points whose levels have these values.

    Shapes: rows of S from x and weights, 8 a group; from terms, TERMS a group.
    """
    value_0, value_1, value_2 = values
    for i in range(GROUP * n_groups):
        x_i = load(S, x + i)
        weight = load(S, weights + i)
        apart_0 = value_0 - x_i
        apart_1 = value_1 - x_i
        apart_2 = value_2 - x_i
        store_terms(
            S,
            terms + 4 * i,
            weight * apart_0 * apart_0,
            weight * apart_1 * apart_1,
            weight * apart_2 * apart_2,
        )


@inlined
def settle(S: np.ndarray, n_groups: int, codes: int, terms: int, sound: int, pending: np.ndarray, grid: Tables) -> None:
    """Move each code that is not in the grid to its nearest neighbour, and mark it as MOVED.

    Shapes: rows of S from codes and sound, 1 a group; from terms, TERMS a group; pending int64[WIDTH * n_groups + 1],
        scratch.
    """
    n_pending = 0
    for k in range(n_groups):
        for lane in range(WIDTH):
            place = find_place(grid, S[codes + k, lane])
            pending[n_pending] = (-1 - place) << 8 | k << 4 | lane
            n_pending += place < 0
    for j in range(n_pending):
        neighbours = (pending[j] >> 8) & 0xFFFF
        k = (pending[j] >> 4) & 15
        lane = pending[j] & 15
        rows = grid.likely if S[sound + k, lane] != ZERO else grid.every
        code = nearest_code(S, terms + TERMS * k, lane, grid.neighbours, rows[neighbours], rows[neighbours + 1])
        S[codes + k, lane] = f32_from_bits(code | MOVED)


@inlined
def nearest_code(S: np.ndarray, terms: int, lane: int, neighbours: np.ndarray, begin: int, end: int) -> np.uint32:
    """The first of the nearest codes among rows begin..end - 1 of the neighbours of one lane's group."""
    # ggml ends the process where no distance is finite; here one of the neighbours is taken.
    best = np.uint64(0xFFFFFFFFFFFFFFFF)
    for row in range(begin, end):
        codes = load_codes(neighbours, row)
        total = splat(ZERO)
        for i in range(GROUP):
            total = total + pick_term(S, terms + 4 * i, lane, codes, i)
        best = min(best, first_smallest(total) + np.uint64(row - begin) * np.uint64(WIDTH))
    position = np.int64(best & np.uint64(0xFFFFFFFF))
    return np.uint32(neighbours[begin + position // WIDTH, position % WIDTH])


@inlined
def find_place(grid: Tables, code: np.float32) -> np.int64:
    """The entry in grid.place of a code from a lane."""
    return np.int64(grid.place[f32_bits(code) & np.uint32(0xFFFF)])


@inlined
def round_scales(S: np.ndarray, scales: int, n: int, highest: int) -> tuple[Vector, Vector]:
    """Round n scales to 0..highest, in units of d, as d * (2 * scale + 1); returns d and the largest scale."""
    largest = splat(ZERO)
    for j in range(n):
        scale = load(S, scales + j)
        largest = where(largest > scale, largest, scale)
    d = largest / np.float32(2 * highest + 1)
    inverse = ONE / d
    for j in range(n):
        store(S, scales + j, level(HALF * (inverse * load(S, scales + j) - ONE), 0, highest))
    return d, largest
