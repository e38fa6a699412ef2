"""Refined codes: blocks taken apart and put together, the plain loops' bytes, never worse, row by row."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.quants.api import dequantize, quantize
from gguf3n.quants.refinement import refine_rows
from gguf3n.quants.unpacked import PARTS, pack, unpack
from tests import refining
from tests.quants import inputs
from tests.quants.oracle_refinement import refine_row

every_type = pytest.mark.parametrize("qtype", PARTS, ids=lambda qtype: qtype.name)
N_PER_ROW = 512
FAMILIES = [family for family in inputs.ROWS if np.abs(inputs.rows(family, 20, N_PER_ROW)).max() < 65504]
"""Of rows that every type holds."""


def correlations(n: int, width: int = 256, seed: int = 0) -> np.ndarray:
    """Damped, as a file gives them."""
    sums = refining.sums_of(refining.inputs(n, seed), width)
    return refining.of_arrays({"x": sums}).matrix("x")


def refined(rows: np.ndarray, qtype: QType, H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks before and after."""
    before = quantize(rows, qtype, H[np.arange(len(H)), np.arange(len(H)) % H.shape[1]])
    after = before.copy()
    refine_rows(rows, qtype, H, after)
    return before, after


def test_the_types_whose_codes_can_be_refined() -> None:
    assert set(PARTS) == {qtype for qtype, row in GGML_TYPES.items() if row.refinable}


@every_type
def test_blocks_are_taken_apart_and_put_together(qtype: QType) -> None:
    """Any bytes but scales that are not finite: each bit is somebody's."""
    row = GGML_TYPES[qtype]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (24, row.block_bytes), np.uint8)
    fields = blocks.reshape(-1).view(row.block)
    for name in row.scales:
        fields[name] = rng.standard_normal(24)
    blocks = blocks.reshape(3, -1)
    numbers = unpack(blocks, qtype)
    assert np.array_equal(numbers.values, dequantize(blocks, qtype))
    empty = np.full_like(blocks, 0xA5)
    for name in row.scales:
        empty.reshape(-1).view(row.block)[name] = fields[name]
    pack(numbers, qtype, empty)
    assert np.array_equal(empty, blocks)


@every_type
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_bytes_are_those_of_plain_loops(qtype: QType) -> None:
    n = max(GGML_TYPES[qtype].weights, 64)
    rows = np.concatenate([inputs.rows(family, 1, n) for family in FAMILIES])
    H = correlations(n, n)
    before, after = refined(rows, qtype, H)
    parts, numbers = PARTS[qtype], unpack(before, qtype)
    for i, x in enumerate(rows):
        found = refine_row(
            x,
            H,
            numbers.points[i],
            numbers.scales[i],
            numbers.minima[i],
            numbers.units[i],
            bool(parts.minima),
            parts.points,
            parts.scale_range,
        )
        for target, values in zip((numbers.points, numbers.scales, numbers.minima), found, strict=True):
            target[i] = values
    expected = before.copy()
    pack(numbers, qtype, expected)
    assert np.array_equal(after, expected)
    assert not np.array_equal(after, before)


@every_type
@pytest.mark.parametrize("width", [256, N_PER_ROW])
def test_no_block_gets_worse_and_most_get_better(qtype: QType, width: int) -> None:
    H = correlations(N_PER_ROW, width)
    for family in FAMILIES:
        rows = inputs.rows(family, 20, N_PER_ROW)
        before, after = (refining.errors(rows - dequantize(b, qtype), H) for b in refined(rows, qtype, H))
        assert (after <= before).all(), family
        if family in ("gaussian", "laplace"):
            assert after.sum() < 0.8 * before.sum()


@every_type
def test_rows_do_not_depend_on_each_other(qtype: QType) -> None:
    rows = np.concatenate([inputs.rows(family, 2, N_PER_ROW) for family in FAMILIES])
    H = correlations(N_PER_ROW)
    _, together = refined(rows, qtype, H)
    apart = np.concatenate([refined(rows[i : i + 3], qtype, H)[1] for i in range(0, len(rows), 3)])
    assert np.array_equal(together, apart)


@pytest.mark.parametrize("qtype", [QType.Q4_0, QType.Q5_1, QType.IQ4_NL], ids=lambda qtype: qtype.name)
def test_what_is_left_of_a_row_is_a_block_of_its_own(qtype: QType) -> None:
    rows, H = inputs.rows("gaussian", 5, 320), correlations(320)
    _, whole = refined(rows, qtype, H)
    start = 256 // 32 * GGML_TYPES[qtype].block_bytes
    end = quantize(rows, qtype, H[np.arange(320), np.arange(320) % 256])[:, start:].copy()
    refine_rows(np.ascontiguousarray(rows[:, 256:]), qtype, np.ascontiguousarray(H[256:, :64]), end)
    assert np.array_equal(whole[:, start:], end)


@every_type
def test_inputs_that_are_always_zero_change_nothing(qtype: QType) -> None:
    rows = inputs.rows("gaussian", 3, N_PER_ROW)
    before = quantize(rows, qtype)
    after = before.copy()
    refine_rows(rows, qtype, np.zeros((N_PER_ROW, 256), np.float32), after)
    assert np.array_equal(before, after)


def test_the_output_is_nearer() -> None:
    """What it is for, on inputs that the correlations have not seen."""
    x = refining.inputs(N_PER_ROW)
    half = len(x) // 2
    sums = refining.sums_of(x[:half])
    H = refining.of_arrays({"x": sums}).matrix("x")
    rows = inputs.rows("gaussian", 32, N_PER_ROW)
    before, after = (
        float((((rows - dequantize(blocks, QType.Q4_K)) @ x[half:].T) ** 2).sum())
        for blocks in refined(rows, QType.Q4_K, H)
    )
    assert after < 0.8 * before
