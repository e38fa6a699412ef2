"""The IQ4 and IQ3 types against plain loops, one block of each byte by byte, and the lattices of all IQ types."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.engines import ggml
from gguf3n.quants import QUANTIZERS, iq4_nl, lattice, lookups, vectors
from gguf3n.quants.lanes import kernel
from tests.quants import inputs, oracle_iq34
from tests.quants.oracle_legacy import F

TYPES = [QType.IQ4_NL, QType.IQ4_XS, QType.IQ3_S, QType.IQ3_XXS]
FAMILIES = ["student_t3", "signed_zeros", "sparse", "denormal", "mixed_sizes", "ties", "ternary", "negative_only"]


def quantize(rows: np.ndarray, qtype: QType, quant_weights: np.ndarray | None = None) -> np.ndarray:
    out = np.full((rows.shape[0], ggml.row_bytes(qtype, rows.shape[1])), 0xAA, dtype=np.uint8)
    quantizer = QUANTIZERS[qtype]
    if quant_weights is None:
        assert quantizer.plain is not None
        quantizer.plain(rows, out)
    else:
        assert quantizer.weighted is not None
        quantizer.weighted(rows, quant_weights, out)
    return out


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_agrees_with_plain_loops(qtype: QType, weighted: bool, family: str) -> None:
    rows = inputs.rows(family, 1, 256, seed=7)
    quant_weights = inputs.quant_weights("with_zeros", 256) if weighted else None
    expected = oracle_iq34.quantize(rows[0], qtype, quant_weights)
    assert quantize(rows, qtype, quant_weights)[0].tobytes().hex(" ") == expected.hex(" ")


# Blocks byte by byte --------------------------------------------------------------------------------------------------

UP_AND_DOWN = np.concatenate([iq4_nl.VALUES, iq4_nl.VALUES[::-1]])
UP_AND_DOWN_LEVELS = " f0 e1 d2 c3 b4 a5 96 87 78 69 5a 4b 3c 2d 1e 0f"


def test_a_block_of_iq4_nl() -> None:
    assert quantize(UP_AND_DOWN[None] * F(0.5), QType.IQ4_NL).tobytes().hex(" ") == (
        "00 38"  # d = 0.5
        + UP_AND_DOWN_LEVELS  # weight 0: level 0, weight 16: level 15, and so on
    )


def test_a_block_of_iq4_xs() -> None:
    x = np.concatenate([UP_AND_DOWN * F(scale) for scale in (32, 16, -31, 0, 1, 2, -4, 8)])
    assert quantize(x[None], QType.IQ4_XS).tobytes().hex(" ") == (
        "00 bc"  # d = 32 / -32 = -1; scales 0 16 63 32 31 30 36 24, less 32: -32 -16 31 0 -1 -2 4 -8
        " b4 65"  # their high bits: 0 1 3 2 1 1 2 1, the first one lowest: 10 11 01 00, 01 10 01 01
        " 00 0f ef 84"  # their low bits: 0 0, 15 0, 15 14, 4 8
        + UP_AND_DOWN_LEVELS * 3
        + " 88" * 16  # zeros: level 8 (1, the value nearest to zero)
        + UP_AND_DOWN_LEVELS * 4
    )


def test_a_block_of_iq3_s() -> None:
    points = [1, 2, 200, 256, 300, 511, 7, 8]
    x = np.zeros(256, dtype=np.float32)
    x[32:64] = 2 * lattice.lattice("IQ3_S").points[points].reshape(-1).astype(np.float32) + 1
    x[[32, 41, 63]] *= -1
    x[64:96] = -x[32:64] / 3
    assert quantize(x[None], QType.IQ3_S).tobytes().hex(" ") == (
        "44 28"  # d = 1 / 31 * 1.033
        " 01 02 c8 00 2c ff 07 08"  # block 1 comes first, as block 0 is empty
        " 01 02 c8 00 2c ff 07 08"  # block 2
        + " 00" * 48
        + " 00 38 38 00 00 00 00 00"  # blocks 1 and 2: the fourth to sixth point is 256 or more
        + " 01 02 00 80"  # block 1: weights 0, 9 and 31 are negative
        + " fe fd ff 7f"  # block 2: all others
        + " 00" * 24
        + " f0 05 00 00"  # scales: block 1 15, for 31 * d; block 2 5, for 11 * d
    )


def test_a_block_of_iq3_xxs() -> None:
    points = [1, 2, 200, 255, 100, 50, 7, 8]
    x = np.zeros(256, dtype=np.float32)
    x[32:64] = 2 * lattice.lattice("IQ3_XXS").points[points].reshape(-1).astype(np.float32) + 1
    x[[32, 41, 42, 63]] *= -1
    x[64:96] = -x[32:64] / 3
    assert quantize(x[None], QType.IQ3_XXS).tobytes().hex(" ") == (
        "2e 28"  # d = 1 / 31 * 1.0125
        + " 00" * 8  # block 0 is empty
        + " 01 02 c8 ff 64 32 07 08"  # block 1
        + " 01 02 c8 ff 64 32 07 08"  # block 2
        + " 00" * 40
        + " 00 00 00 00"
        # block 1: scale 15; weights 31 and 26, none, 9 and 10, 0 and 1: f 0000100 0000000 0000110 0000011
        + " 03 03 80 f0"  # 26 and 1 are positive, but a single negative weight of eight cannot be
        + " fc fc 7f 5f"  # block 2: scale 5; all others: 5 1111011 1111111 1111001 1111100
        + " 00" * 20
    )


# Lattices -------------------------------------------------------------------------------------------------------------

SIZES = {"IQ3_S": 512, "IQ3_XXS": 256, "IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024, "IQ1_S": 2048}


@pytest.mark.parametrize("name", lattice.SPECS)
def test_grid_points(name: str) -> None:
    """Each once, in the order of the codes that ggml lists: two or three bits a level, the first level lowest."""
    grid = lattice.lattice(name)
    levels = lattice.SPECS[name][1]
    assert grid.points.shape == ((SIZES[name], 4) if levels == 8 else (SIZES[name], 8))
    assert grid.points.max() == levels - 1
    places = (8 if levels == 8 else 4) ** np.arange(grid.points.shape[1])
    assert all(a < b for a, b in pairwise(grid.points @ places))
    cells = grid.points @ levels ** np.arange(grid.points.shape[1])
    assert np.array_equal(grid.index[cells], np.arange(len(cells)))
    assert np.count_nonzero(grid.index >= 0) == len(cells)


@pytest.mark.parametrize("name", lattice.SPECS)
def test_neighbours(name: str) -> None:
    """Those of a few cells, from a sorted list of all points."""
    grid = lattice.lattice(name)
    _, levels, shells = lattice.SPECS[name]
    points = grid.points.tolist()
    for cell in np.random.default_rng(0).integers(len(grid.index), size=60):
        found = grid.neighbour[grid.start[cell] : grid.start[cell + 1]].tolist()
        if grid.index[cell] >= 0:
            assert found == []
            continue
        place = [int(cell) // levels**i % levels for i in range(len(points[0]))]
        distances = [sum((a - b) ** 2 for a, b in zip(point, place, strict=True)) for point in points]
        limit = sorted(set(distances))[shells - 1]
        expected = sorted((distance, i) for i, distance in enumerate(distances) if distance <= limit)
        assert found == [i for _, i in expected]


@pytest.mark.parametrize("qtype", [QType.IQ3_S, QType.IQ3_XXS], ids=lambda qtype: qtype.name)
def test_contenders_decide_as_all_neighbours_do(qtype: QType) -> None:
    """Whatever the importances are, some of them zero."""
    near = lattice.contenders(qtype.name)
    rng = np.random.default_rng(0)
    compared = off_grid = 0
    for _ in range(1000):
        half_cell = rng.integers(1, 15, size=4)
        y = half_cell + rng.uniform(0.001, 0.999, size=4)
        root = rng.choice([0.0, 1.0], size=4, p=[0.1, 0.9]) * 10.0 ** rng.uniform(-6, 3, size=4)
        step = F(10.0 ** rng.uniform(-9, 3))
        x, root = (y * step).astype(F), root.astype(F)

        pair, count = divmod(int(near.heads[half_cell @ 16 ** np.arange(4)]), 16)
        codes = near.entries[2 * pair : 2 * pair + max(2 * count, 1)].tolist()
        points = [tuple(code >> 4 * i & 15 for i in range(4)) for code in codes]
        best, found = F(np.inf), points[0]
        for point in points:
            distance = F(0)
            for q, value, weight in zip(point, x, root, strict=True):
                distance += weight * (step * F(q) - value) * (step * F(q) - value)
            if distance < best:
                best, found = distance, point
        assert (found, count == 0) == oracle_iq34.grid_point(list(x), list(root), F(1) / step, step, qtype)
        compared += len(points)
        off_grid += count > 0
    assert 500 < off_grid < 1000
    assert compared < 6 * 1000


@kernel
def every_lookup(table: np.ndarray, pairs: np.ndarray, S: np.ndarray) -> None:
    index = vectors.load(S, 0)
    vectors.store(S, 1, lookups.look_up(table, index))
    even, odd = lookups.look_up_pair(pairs, index)
    vectors.store(S, 2, even)
    vectors.store(S, 3, odd)
    for i in range(4):
        vectors.store(S, 4 + i, lookups.half_byte(odd, i))
        vectors.store(S, 8 + i, lookups.place_value(odd, i))


def test_lookups_do_what_their_definitions_say() -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal(1000, dtype=np.float32)
    pairs = rng.integers(2**16, size=2000).astype(np.uint16)
    compiled = np.zeros((12, vectors.WIDTH), dtype=np.float32)
    compiled[0] = rng.integers(1000, size=vectors.WIDTH)
    defined = compiled.copy()
    every_lookup(table, pairs, compiled)
    every_lookup.py_func(table, pairs, defined)
    assert np.array_equal(compiled, defined)
    assert np.array_equal(compiled[1], table[compiled[0].astype(int)])
