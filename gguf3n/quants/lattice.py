"""The lattices of the IQ3, IQ2 and IQ1 types: which points exist, and which of them are near any other.

Such a type stores groups of `dim` weights as one index into a grid: `size` points of the cube {0 .. levels-1}^dim. A
search rounds a group to a cell of the cube. If the cell is a grid point, that is the answer; if not, the search
compares the cell's neighbours: the grid points in the `shells` nearest distinct distances from it.

    IQ3_S     512 points of 8^4, 3 shells          IQ2_XXS  256 points of 3^8, 2 shells
    IQ3_XXS   256 points of 8^4, 2 shells          IQ2_XS   512 points of 3^8, 2 shells
    IQ1_S    2048 points of 3^8, 3 shells          IQ2_S   1024 points of 3^8, 1 shell
    (IQ1_M uses IQ1_S's)

A cell's number is sum(level[i] * levels**i): the first weight counts least.

Source: iq2xs_init_impl and iq3xs_init_impl in ggml-quants.c (neighbours sorted by distance, then by grid index; the
tables are made for the process once). The grids themselves come from the `gguf` package.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import gguf.quants
import numpy as np


@dataclass(frozen=True)
class Lattice:
    """One grid and what is derived from it.

    Shapes: points uint8[size, dim], levels of each grid point;
        index int16[levels ** dim], grid index of each cell, or -1;
        start int32[levels ** dim + 1], neighbour uint16[start[-1]]: the neighbours of a cell are the grid indices
        neighbour[start[cell] : start[cell + 1]], nearest first, equally near ones by index; none for a grid point.
    """

    levels: int
    points: np.ndarray
    index: np.ndarray
    start: np.ndarray
    neighbour: np.ndarray


SPECS: dict[str, tuple[type, int, int]] = {
    # name: (class of the gguf package that has the grid, levels, shells)
    "IQ3_S": (gguf.quants.IQ3_S, 8, 3),
    "IQ3_XXS": (gguf.quants.IQ3_XXS, 8, 2),
    "IQ2_XXS": (gguf.quants.IQ2_XXS, 3, 2),
    "IQ2_XS": (gguf.quants.IQ2_XS, 3, 2),
    "IQ2_S": (gguf.quants.IQ2_S, 3, 1),
    "IQ1_S": (gguf.quants.IQ1_S, 3, 3),
}


def grid_points(source: type) -> np.ndarray:
    """Unpack a grid of the gguf package to levels.

    Shapes: uint8[size, dim].
    Source: gguf.quants: `grid_hex` is hexadecimal; a byte holds two levels (nibbles) of an eight-level grid or four
        (bit pairs) of a three-level one, the first level lowest.
    """
    size, dim = source.grid_shape  # type: ignore[attr-defined]
    packed = np.frombuffer(bytes.fromhex(source.grid_hex.decode()), dtype=np.uint8)  # type: ignore[attr-defined]
    bits = 4 if len(source.grid_map) > 4 else 2  # type: ignore[attr-defined]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & np.uint8(2**bits - 1)).reshape(size, dim)


def cell_levels(levels: int, dim: int) -> np.ndarray:
    """The levels of every cell of the cube, in the order of their numbers: uint8[levels ** dim, dim]."""
    numbers = np.arange(levels**dim)
    return ((numbers[:, None] // levels ** np.arange(dim)) % levels).astype(np.uint8)


@functools.cache
def lattice(name: str) -> Lattice:
    """Grid, index and neighbours of one entry of SPECS; derived at the first call of a process."""
    source, levels, shells = SPECS[name]
    points = grid_points(source)
    size, dim = points.shape
    cells = cell_levels(levels, dim)
    index = np.full(len(cells), -1, dtype=np.int16)
    index[points.astype(np.int64) @ levels ** np.arange(dim)] = np.arange(size)

    off_grid = np.flatnonzero(index < 0)
    offsets, members = nearest_shells(cells[off_grid], points, shells)
    count = np.zeros(len(cells) + 1, dtype=np.int32)
    count[off_grid + 1] = np.diff(offsets)
    return Lattice(levels, points, index, np.cumsum(count, dtype=np.int32), members.astype(np.uint16))


def nearest_shells(cells: np.ndarray, points: np.ndarray, shells: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in the `shells` smallest distinct distances from each cell.

    Shapes: returns offsets int64[n_cells + 1] and members int64[offsets[-1]], nearest first, then by index.
    """
    # Exact: squared distances are small integers, also in float32.
    a, b = cells.astype(np.float32), points.astype(np.float32)
    distance = ((a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None, :] - 2 * (a @ b.T)).astype(np.uint8)
    limit = distance.min(axis=1)
    for _ in range(shells - 1):
        limit = np.where(distance > limit[:, None], distance, 255).min(axis=1)
    # ggml quirk: a cell with fewer distinct distances than `shells` would take every point; the grids have none.
    row, member = np.nonzero(distance <= limit[:, None])
    order = np.argsort(row * 256 + distance[row, member], kind="stable")
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=len(cells)))))
    return offsets, member[order]


@dataclass(frozen=True)
class Contenders:
    """The neighbours that can win a search in an eight-level lattice of four dimensions, for each half-cell.

    A group y, in units in which level l is the value 2 * l + 1 and its cell reaches from 2 * l to 2 * l + 2, lies in
    the half-cell sum(floor(y[i]) << 4 * i), where every y[i] is first brought into 1.5 .. 14.5: beyond the outermost
    values the half does not matter.

    Shapes: heads float32[16 ** 4]: pair * 16 + count, where count is how many pairs of entries a half-cell has, 0 if
        the cell is a grid point; entries uint16[2 * n]: from 2 * pair on, the values of a grid point each, four bits a
        value, in the order of the neighbours; the last one is repeated to complete a pair. A grid point's own values
        are its first entry.
    Why: in which half of its cell y lies says, coordinate by coordinate, which of two values is nearer. A neighbour
        that is nowhere nearer than an earlier one cannot win, whatever the importances are; and as rounding is
        monotone, not after rounding either, if y is far enough from the border of the half-cell.
        # measured: a Gaussian search compares 4.1 entries for IQ3_S (11.3 neighbours), 3.7 for IQ3_XXS (8.1)
    """

    heads: np.ndarray
    entries: np.ndarray


@functools.cache
def contenders(name: str) -> Contenders:
    """Derive the contenders of a lattice; at the first call of a process."""
    grid = lattice(name)
    dim = grid.points.shape[1]
    cells = cell_levels(grid.levels, dim).astype(np.int32)
    number = np.diff(grid.start)
    cell = np.repeat(np.arange(len(cells)), number)
    apart = grid.points[grid.neighbour] - cells[cell]

    # Every pair of neighbours of one cell, the earlier one first.
    n_earlier = np.arange(len(cell)) - grid.start[cell]
    later = np.repeat(np.arange(len(cell)), n_earlier)
    earlier = np.arange(len(later)) - np.repeat(np.cumsum(n_earlier) - n_earlier, n_earlier) + grid.start[cell[later]]

    # How far a value is, in order: the cell's own, the next on y's side, the next on the other side, and so on.
    far = [2 * np.abs(apart) - (apart < 0), 2 * np.abs(apart) - (apart > 0)]
    not_farther = [side[earlier] <= side[later] for side in far]

    places = 16 ** np.arange(dim)
    point_code = (2 * grid.points.astype(np.int32) + 1) @ places
    on_grid = np.flatnonzero(grid.index >= 0)
    half_cells, codes = [], []
    for upper in cell_levels(2, dim).astype(np.int32):
        beaten = np.logical_and.reduce([not_farther[upper[i]][:, i] for i in range(dim)])
        alive = np.ones(len(cell), dtype=bool)
        alive[later[beaten]] = False
        half_cell = (2 * cells + upper) @ places
        half_cells += [half_cell[cell[alive]], half_cell[on_grid]]
        codes += [point_code[grid.neighbour[alive]], point_code[grid.index[on_grid]]]
    half_cell, code = np.concatenate(half_cells), np.concatenate(codes)
    order = np.argsort(half_cell, kind="stable")
    half_cell, code = half_cell[order], code[order]

    count = np.bincount(half_cell, minlength=16**dim)
    pairs = (count + 1) // 2
    first = np.cumsum(pairs) - pairs
    entries = np.empty(2 * pairs.sum(), dtype=np.uint16)
    entries[2 * (first + pairs) - 1] = code[np.cumsum(count) - 1]
    entries[2 * first[half_cell] + np.arange(len(code)) - (np.cumsum(count) - count)[half_cell]] = code
    grid_cells = grid.index[np.arange(16**dim)[:, None] // places % 16 // 2 @ grid.levels ** np.arange(dim)] >= 0
    heads = first * 16 + np.where(grid_cells, 0, pairs)
    return Contenders(heads.astype(np.float32), entries)
