"""The IQ2 and IQ1 types against plain loops, one block of each byte by byte, and the search for grid points."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.engines import ggml
from gguf3n.quants import QUANTIZERS, codes, ternary, vectors
from gguf3n.quants.iq1_s import find_ranks
from gguf3n.quants.lanes import FLAGS
from gguf3n.quants.lattice import lattice
from gguf3n.quants.ternary import GROUP, TERMS, Tables, check_codes, find_terms, settle
from gguf3n.quants.vectors import WIDTH, load, store
from tests.quants import inputs, oracle_iq12
from tests.quants.oracle_legacy import F

TYPES = [QType.IQ2_XXS, QType.IQ2_XS, QType.IQ2_S, QType.IQ1_S, QType.IQ1_M]
MODES = [(qtype, weighted) for qtype in TYPES for weighted in (True, False)]
MODES = [mode for mode in MODES if mode[1] or QUANTIZERS[mode[0]].plain is not None]
FAMILIES = ["student_t3", "signed_zeros", "sparse", "denormal", "mixed_sizes", "ties", "ternary", "negative_only"]

every_mode = pytest.mark.parametrize(("qtype", "weighted"), MODES, ids=[f"{q.name}-{w}" for q, w in MODES])

compiled = numba.njit(**{**FLAGS, "cache": False})


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


@every_mode
@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_agrees_with_plain_loops(qtype: QType, weighted: bool, family: str) -> None:
    rows = inputs.rows(family, 1, 256, seed=7)
    quant_weights = inputs.quant_weights("with_zeros", 256) if weighted else None
    expected = oracle_iq12.quantize(rows[0], qtype, quant_weights)
    assert quantize(rows, qtype, quant_weights)[0].tobytes().hex(" ") == expected.hex(" ")


@every_mode
def test_weights_between_two_levels(qtype: QType, weighted: bool) -> None:
    """A few units in the last place around the middles, for one of the scales that are tried in each sub-block."""
    rng = np.random.default_rng(0)
    steps = 5 + rng.integers(-9, 10, size=(16, 64, 1)) * 0.1
    x = rng.choice([1, 2, 3, 4, 5], size=(16, 64, 16), p=[0.15, 0.35, 0.1, 0.35, 0.05]) / steps
    x[..., 0] = 1
    x *= rng.choice([-1, 1], size=x.shape) * 10.0 ** rng.uniform(-2, 1, size=(16, 64, 1))
    rows = (x.astype(F).view(np.int32) + rng.integers(-2, 3, size=x.shape).astype(np.int32)).view(F).reshape(16, 1024)
    quant_weights = inputs.quant_weights("random_weights", 1024) if weighted else None
    assert np.array_equal(quantize(rows, qtype, quant_weights), ggml.quantize(rows, qtype, quant_weights))


@every_mode
@pytest.mark.parametrize("size", [-15, -13, -8, -7, 6])
def test_sizes_near_the_thresholds_and_far_out(qtype: QType, weighted: bool, size: int) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((4, 768)) * 10.0 ** (size + rng.uniform(-1, 1, (4, 1)))).astype(F)
    quant_weights = inputs.quant_weights("ten_orders", 768) if weighted else None
    assert np.array_equal(quantize(rows, qtype, quant_weights), ggml.quantize(rows, qtype, quant_weights))


# Blocks byte by byte --------------------------------------------------------------------------------------------------

ONES = np.ones(256, dtype=np.float32)


def levels(name: str, *points: int) -> np.ndarray:
    return lattice(name).points[list(points)].reshape(-1).astype(np.float32)


def test_a_block_of_iq2_xxs() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[32:64] = 2 * levels("IQ2_XXS", 1, 2, 200, 255) + 1
    x[[32, 33, 41, 42, 62, 63]] *= -1
    x[64:96] = -x[32:64] / 3
    assert quantize(x[None], QType.IQ2_XXS, ONES).tobytes().hex(" ") == (
        "21 28"  # d = 1 / 31
        + " 00 00 00 00 00 00 00 00"  # sub-block 0 is empty
        + " 01 02 c8 ff"  # sub-block 1: its points
        + " 03 03 00 f8"  # scale 15, for 31 * d; weights 30 (and 31), none, 9 and 10, 0 and 1 are negative:
        #                   f 1000000 0000000 0000110 0000011
        + " 01 02 c8 ff"  # sub-block 2
        + " fc fc ff 57"  # scale 5, for 11 * d; all others: 5 0111111 1111111 1111001 1111100
        + " 00" * 40
    )


def test_a_block_of_iq2_xs() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[16:32] = 2 * levels("IQ2_XS", 1, 300) + 1
    x[[16, 18, 30, 31]] *= -1
    x[32:48] = -x[16:32] / 3
    assert quantize(x[None], QType.IQ2_XS, ONES).tobytes().hex(" ") == (
        "21 28"  # d = 1 / 31
        + " 00 00 00 00"  # sub-block 0 is empty
        + " 01 0a"  # sub-block 1: 0000101 000000001, weights 0 and 2 are negative
        + " 2c 81"  # 1000000 100101100, weight 14 (and 15)
        + " 01 f4"  # sub-block 2: 1111010 000000001, all others
        + " 2c 7f"  # 0111111 100101100
        + " 00" * 52
        + " f0 05 00 00 00 00 00 00"  # scales: sub-block 1 15, for 31 * d; sub-block 2 5, for 11 * d
    )


def test_a_block_of_iq2_s() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[16:32] = 2 * levels("IQ2_S", 1, 1000) + 1
    x[[16, 18, 31]] *= -1
    x[32:48] = -x[16:32] / 3
    expected = (
        "14 28"  # d = 1 / 31 * 0.9875
        + " 00 00 01 e8 01 e8"  # low bits of 1 and 1000, in sub-blocks 1 and 2
        + " 00" * 26
        + " 00 00 05 80 fa 7f"  # signs: weights 0, 2 and 15 of sub-block 1, all others of sub-block 2
        + " 00" * 26
        + " c0 0c 00 00 00 00 00 00"  # high bits: 3 in groups 3 and 5
        + " f0 05 00 00 00 00 00 00"  # scales: sub-block 1 15, for 31 * d; sub-block 2 5, for 11 * d
    )
    assert quantize(x[None], QType.IQ2_S, ONES).tobytes().hex(" ") == expected
    assert quantize(x[None], QType.IQ2_S).tobytes().hex(" ") == expected


def test_a_block_of_iq1_s() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[32:64] = levels("IQ1_S", 300, 700, 1500, 2040) - F(0.875)
    x[64:96] = -x[32:64] / 5
    assert quantize(x[None], QType.IQ1_S, ONES).tobytes().hex(" ") == (
        "cd 2c"  # d = 1 / 15 * 1.125
        + " 00 00 00 00"  # sub-block 0 is empty
        + " 2c bc dc f8"  # low bits of 300, 700, 1500, 2040
        + " e3 47 32 09"  # low bits of 1763, 1351, 562, 9, whose levels are 2 - level of these
        + " 00" * 20
        + " 00 00"
        + " 51 7f"  # scale 7, for 15 * d; high bits 7 5 2 1: 0 111 111 101 010 001
        + " ae 90"  # negative shift, scale 1, for 3 * d; high bits 0 2 5 6: 1 001 000 010 101 110
        + " 00" * 10
    )


def test_a_block_of_iq1_m() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[16:24] = levels("IQ1_S", 300) - F(0.875)
    x[24:32] = levels("IQ1_S", 1500) - F(1.125)
    x[32:48] = -x[16:32] / 5
    assert quantize(x[None], QType.IQ1_M, ONES).tobytes().hex(" ") == (
        "00 00 2c dc e3 32"  # low bits of 300, 1500 and 1763, 562, whose levels are 2 - level of these
        + " 00" * 26
        + " 00"
        + " d1"  # sub-block 1: 1 101 0 001: the second group's shift is negative; high bits 5 and 1
        + " 2e"  # sub-block 2: 0 010 1 110: the first group's shift is negative; high bits 2 and 6
        + " 00" * 13
        + " 78 40 00 a0 00 c0 00 20"  # scales: sub-block 1 7, sub-block 2 1: 4 000 001 111 000;
        # d = 2ca4 = 0.0725 = 0.0652 * 1.1125; empty sub-blocks, whose levels are not zero, pull it below 1 / 15
    )


# The search -----------------------------------------------------------------------------------------------------------

TRIED, SOUND, WEIGHT, TERM = 8, 9, 10, 18  # rows; the group's weights come first
ROWS = TERM + TERMS


@compiled
def settle_group(S: np.ndarray, scale: np.float32, grid: Tables) -> None:
    pending = np.empty(WIDTH + 1, np.int64)
    one = vectors.splat(scale)
    values = one, one * F(3), one * F(5)
    check_codes(S, 0, 1, values, TRIED, SOUND)
    find_terms(S, 0, WEIGHT, 1, values, TERM)
    settle(S, 1, TRIED, TERM, SOUND, pending, grid)


@pytest.mark.parametrize("qtype", [QType.IQ2_XXS, QType.IQ2_XS, QType.IQ2_S, QType.IQ1_S], ids=lambda qtype: qtype.name)
@pytest.mark.parametrize("rounded", [True, False])
def test_short_lists_decide_as_all_neighbours_do(qtype: QType, rounded: bool) -> None:
    """Whatever the importances are, some of them zero; codes that were not rounded right are searched in full."""
    rng = np.random.default_rng(0)
    places = 4 ** np.arange(GROUP)
    searched = short = 0
    for _ in range(12):
        scale = F(10.0 ** rng.uniform(-9, 3))
        S = np.zeros((ROWS, WIDTH), dtype=F)
        x = rng.uniform(-0.5, 6.5, size=(GROUP, WIDTH)).astype(F) * scale
        weight = rng.choice([0.0, 1.0], size=x.shape, p=[0.1, 0.9]) * 10.0 ** rng.uniform(-6, 3, size=x.shape)
        rounding = np.clip(np.rint((x / scale - 1) / 2), 0, 2).astype(int)
        cells = rounding if rounded else rng.integers(0, 3, size=x.shape)
        S[:GROUP], S[WEIGHT : WEIGHT + GROUP] = x, weight
        S[TRIED] = (places @ cells).astype(np.uint32).view(F)
        settle_group(S, scale, ternary.tables(qtype.name))
        for lane in range(WIDTH):
            own = tuple(cells[:, lane].tolist())
            found = int(S[TRIED, lane].view(np.uint32))
            w = list(S[WEIGHT : WEIGHT + GROUP, lane])
            expected = oracle_iq12.nearest_point(list(x[:, lane]), w, own, [F(1), F(3), F(5)], scale, qtype)
            assert tuple(found >> 2 * i & 3 for i in range(GROUP)) == expected
            assert found >> ternary.MOVED_BIT == (own != expected)
            searched += own != expected
            short += own != expected and S[SOUND, lane] == 1
    assert searched > 60
    assert short == searched if rounded else short < searched / 10


def test_lists_of_neighbours() -> None:
    grid, table = lattice("IQ2_XS"), ternary.tables("IQ2_XS")
    point_codes = grid.points @ 4 ** np.arange(GROUP)
    assert np.array_equal(table.place[point_codes], np.arange(512))
    off_grid = np.flatnonzero(grid.index < 0)
    for number in (0, 17, 3000, len(off_grid) - 1):
        cell = off_grid[number]
        neighbours = point_codes[grid.neighbour[grid.start[cell] : grid.start[cell + 1]]].tolist()
        every = table.neighbours[table.every[number] : table.every[number + 1]].reshape(-1).tolist()
        likely = table.neighbours[table.likely[number] : table.likely[number + 1]].reshape(-1).tolist()
        assert every[: len(neighbours)] == neighbours
        assert set(every[len(neighbours) :]) <= {neighbours[0]}
        assert likely[0] == neighbours[0]
        assert set(likely) <= set(neighbours)


@compiled
def ranks(S: np.ndarray) -> None:
    find_ranks(S, 0, 32, 32)


def test_equal_weights_keep_their_order() -> None:
    S = np.zeros((64, WIDTH), dtype=F)
    S[:32] = np.random.default_rng(0).choice([-1.0, -0.0, 0.0, 0.5, 2.0], size=(32, WIDTH))
    ranks(S)
    assert np.array_equal(S[32:], S[:32].argsort(axis=0, kind="stable").argsort(axis=0))


# Codes in kernels -----------------------------------------------------------------------------------------------------


def every_function_of_codes(S: np.ndarray, source: np.ndarray, found: np.ndarray) -> None:
    code = codes.load_codes(source, 1)
    store(S, 4, code)
    store(S, 5, codes.as_code(load(S, 0)))
    for i in range(8):
        store(S, 6 + i, codes.digit(code, i))
    for i in range(16):
        store(S, 14 + i, vectors.where(codes.has_bit(code, i), np.float32(1.0), np.float32(0.0)))
    codes.store_terms(S, 30, load(S, 1), load(S, 2), load(S, 3))
    for lane in range(16):
        store(S, 34 + lane, codes.pick_term(S, 30, lane, code, lane % 8))
    for row in range(4):
        found[row] = codes.first_smallest(load(S, row))


@pytest.mark.parametrize("general", [False, True])
def test_functions_of_codes_do_what_their_definitions_say(general: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the CPU is not one of x86."""
    if general:
        monkeypatch.setattr(codes, "PERMUTATIONS", {})
    rng = np.random.default_rng(0)
    source = (rng.integers(0, 3, size=(3 * WIDTH, 8)) @ 4 ** np.arange(8)).astype(np.uint16)
    by_llvm = np.zeros((50, WIDTH), dtype=F)
    by_llvm[:4] = rng.integers(0, 40, size=(4, WIDTH))
    by_llvm[1, 3] = np.inf
    by_numpy = by_llvm.copy()
    found_by_llvm, found_by_numpy = np.zeros((2, 4), dtype=np.uint64)
    compiled(every_function_of_codes)(by_llvm, source, found_by_llvm)
    every_function_of_codes(by_numpy, source, found_by_numpy)
    # store_terms leaves every fourth number open
    by_llvm[30:34, 3::4] = by_numpy[30:34, 3::4]
    assert by_llvm.tobytes() == by_numpy.tobytes()
    assert np.array_equal(found_by_llvm, found_by_numpy)
    assert by_llvm[6:14].max() == 2
