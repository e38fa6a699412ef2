"""The K types against plain loops, full groups of lanes against ggml, and one block of each byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.engines import ggml
from gguf3n.quants import QUANTIZERS
from gguf3n.quants.vectors import WIDTH
from tests.quants import inputs, oracle_k

TYPES = [QType.Q2_K, QType.Q3_K, QType.Q4_K, QType.Q5_K, QType.Q6_K]

every_type = pytest.mark.parametrize("qtype", TYPES, ids=lambda qtype: qtype.name)


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


@every_type
@pytest.mark.parametrize("family", inputs.ROWS)
@pytest.mark.parametrize("weights", [None, "with_zeros"])
def test_kernel_agrees_with_plain_loops(qtype: QType, family: str, weights: str | None) -> None:
    rows = inputs.rows(family, 1, 256, seed=7)
    quant_weights = None if weights is None else inputs.quant_weights(weights, 256)
    expected = oracle_k.quantize(rows[0], qtype, quant_weights)
    assert quantize(rows, qtype, quant_weights)[0].tobytes().hex(" ") == expected.hex(" ")


@every_type
@pytest.mark.parametrize("weights", [None, *inputs.WEIGHTS])
def test_full_groups_of_lanes_give_the_bytes_of_ggml(qtype: QType, weights: str | None) -> None:
    """Two groups and a row; each family is a few lanes of a group."""
    per_family = -(-(2 * WIDTH + 1) // len(inputs.ROWS))
    rows = np.concatenate([inputs.rows(family, per_family, 512, seed=11) for family in inputs.ROWS])
    rows = np.ascontiguousarray(np.random.default_rng(0).permutation(rows)[: 2 * WIDTH + 1])
    quant_weights = None if weights is None else inputs.quant_weights(weights, 512, seed=11)
    assert np.array_equal(quantize(rows, qtype, quant_weights), ggml.quantize(rows, qtype, quant_weights))


@every_type
def test_a_negative_scale_gives_the_byte_of_ggml(qtype: QType) -> None:
    """Rows of one sign with one column that counts: rounding makes fitted scales slightly negative."""
    rows = np.concatenate([inputs.rows(family, 24, 512, seed=13) for family in ("negative_only", "shifted")])
    quant_weights = np.full(512, 1e-12, dtype=np.float32)
    quant_weights[::16] = 1
    assert np.array_equal(quantize(rows, qtype, quant_weights), ggml.quantize(rows, qtype, quant_weights))


def hex_of(x: np.ndarray, qtype: QType) -> str:
    return quantize(x[None], qtype)[0].tobytes().hex(" ")


def test_a_block_of_q2_k() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[0:16] = 15 * np.tile([0, 1, 2, 3], 4)
    x[16:32] = 7 * np.tile([3, 2, 1, 0], 4) - 15
    assert hex_of(x, QType.Q2_K) == (
        "0f f7" + " 00" * 14  # sub-block 0: scale 15, minimum 0; sub-block 1: scale 7, minimum 15
        + " 00 01 02 03" * 4  # weights 0-15 in the lowest two bits; 32-47, 64-79, 96-111 are level 0
        + " 03 02 01 00" * 4  # weights 16-31
        + " 00" * 32  # weights 128-255
        + " 00 3c"  # d = 1
        " 00 3c"  # dmin = 1
    )  # fmt: skip


def test_a_block_of_q3_k() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[0:4] = -4, 3, 1, -1
    x[144:147] = 2, -1.5, 0.5
    assert hex_of(x, QType.Q3_K) == (
        # bit 0: weights 0-31: levels 0, 7, 5, 3, then 4 for zero; but a sub-block of zeros has level 0
        "00 01 01 00" + " 01" * 12
        # bit 4: weights 128-159: sub-block 9 has levels 0, 7, 3, then 4
        + " 00 10 00" + " 10" * 13
        + " 00 03 01 03" + " 00" * 28  # low two bits of weights 0-31
        + " 00" * 17 + " 03 03" + " 00" * 13  # of weights 128-159
        # low halves of scale[j] + 32, j = 0-7: scale[0] is -32 (0), the others 0 (32); high halves: scale[9] is 16 (48)
        + " 00" * 8
        + " a8 ba aa aa"  # high two bits of scales j, j + 4, j + 8, j + 12: 0 2 2 2, 2 2 3 2, 2 2 2 2, 2 2 2 2
        " 00 a8"  # d = -1/32
    )  # fmt: skip


def test_a_block_of_q4_k() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[0:32] = 63 * np.tile(np.arange(16), 2)
    x[32:64] = 2 * np.tile(np.arange(16), 2) - 10
    x[192:224] = 21 * np.tile(np.arange(16), 2) - 63
    assert hex_of(x, QType.Q4_K) == (
        "00 3c"  # d = 1
        " 00 3c"  # dmin = 1
        " 3f 02 40 00"  # scales 63, 2, 0, 0; the top bits of byte 2 are bits 4 and 5 of scale 6 = 21 = 0b01_0101
        " 00 0a c0 00"  # minima 0, 10, 0, 0; the top bits of byte 6 are bits 4 and 5 of minimum 6 = 63
        " 00 00 f5 00"  # low four bits of scale 6 (5) and of minimum 6 (15)
        + " 00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff" * 2  # weights 0-31 (low), 32-63 (high)
        + " 00" * 64
        + " 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f" * 2  # weights 192-223 (low)
    )  # fmt: skip


def test_a_block_of_q5_k() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[0:32] = 63 * np.arange(32)
    x[32:64] = 2 * np.arange(32) - 10
    x[192:224] = 21 * np.arange(32) - 63
    assert hex_of(x, QType.Q5_K) == (
        "00 3c"  # d = 1
        " 00 3c"  # dmin = 1
        " 3f 02 40 00 00 0a c0 00 00 00 f5 00"  # as for Q4_K
        + " 00" * 16 + " 43" * 16  # levels 16-31 of sub-blocks 0, 1 and 6 have bit 4
        + " 00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff" * 2  # weights 0-31 (low), 32-63 (high)
        + " 00" * 64
        + " 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f" * 2  # weights 192-223 (low)
    )  # fmt: skip


def test_a_block_of_q6_k() -> None:
    x = np.zeros(256, dtype=np.float32)
    x[0:3] = -32, 31, 1
    x[64:67] = 16, -15.5, 0.5
    assert hex_of(x, QType.Q6_K) == (
        "00 ff f1" + " 00" * 13  # levels of weights 0, 1, 2: 0, 63, 33; of 64, 65, 66: 0, 63, 31; low four bits
        + " 00" * 112
        # high two bits of weights 0 and 64 (0, 0), 1 and 65 (3, 3), 2 and 66 (2, 1), then 2 and 2 for zero;
        # but a sub-block of zeros has level 0
        + " 00 33 12" + " 22" * 13 + " 00" * 48
        + " 80 00 00 00 40" + " 00" * 11  # scales: -128 for sub-block 0, 64 for sub-block 4
        + " 00 a0"  # d = -1/128
    )  # fmt: skip
