"""The block types of 32 weights and the ternary types against plain loops, and one block of each byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.engines import ggml
from gguf3n.quants import QUANTIZERS
from tests.quants import inputs, oracle_legacy

TYPES = [QType.Q4_0, QType.Q4_1, QType.Q5_0, QType.Q5_1, QType.Q8_0, QType.TQ1_0, QType.TQ2_0]
MODES = [
    (qtype, weighted) for qtype in TYPES for weighted in (False, True) if not weighted or QUANTIZERS[qtype].weighted
]


def quantize(rows: np.ndarray, qtype: QType, quant_weights: np.ndarray | None = None) -> np.ndarray:
    out = np.full((rows.shape[0], ggml.row_bytes(qtype, rows.shape[1])), 0xAA, dtype=np.uint8)
    kernel = QUANTIZERS[qtype]
    if quant_weights is None:
        assert kernel.plain is not None
        kernel.plain(rows, out)
    else:
        assert kernel.weighted is not None
        kernel.weighted(rows, quant_weights, out)
    return out


@pytest.mark.parametrize(
    ("qtype", "weighted"), MODES, ids=[f"{qtype.name}{'-weighted' * weighted}" for qtype, weighted in MODES]
)
@pytest.mark.parametrize("family", inputs.ROWS)
def test_kernel_agrees_with_plain_loops(qtype: QType, weighted: bool, family: str) -> None:
    rows = inputs.rows(family, 1, 256, seed=7)
    quant_weights = inputs.quant_weights("with_zeros", 256) if weighted else None
    expected = oracle_legacy.quantize(rows[0], qtype, quant_weights)
    assert quantize(rows, qtype, quant_weights)[0].tobytes().hex(" ") == expected.hex(" ")


def test_a_block_of_q4_0() -> None:
    x = np.zeros((1, 32), dtype=np.float32)
    x[0, :4] = -8, 7, 1, 0.5
    x[0, 16:18] = -7, 4
    assert quantize(x, QType.Q4_0).tobytes().hex(" ") == (
        "00 3c"  # d = -8 / -8 = 1
        " 10"  # weight 0: level 0 (-8); weight 16: level 1 (-7)
        " cf"  # weight 1: level 15 (7); weight 17: level 12 (4)
        " 89"  # weight 2: level 9 (1); weight 18: level 8 (0)
        " 89" + " 88" * 12  # weight 3: 0.5 rounds up to level 9
    )


def test_a_block_of_q4_1() -> None:
    x = np.full((1, 32), -1, dtype=np.float32)
    x[0, :3] = 2.75, 0, 0.5
    x[0, 16:18] = 1.5, 2.6
    assert quantize(x, QType.Q4_1).tobytes().hex(" ") == (
        "00 34"  # d = (2.75 - -1) / 15 = 0.25
        " 00 bc"  # m = -1
        " af"  # weight 0: level 15 (2.75); weight 16: level 10 (1.5)
        " e4"  # weight 1: level 4 (0); weight 17: level 14 (2.5, the nearest to 2.6)
        " 06" + " 00" * 13  # weight 2: level 6 (0.5); weight 18: level 0 (-1)
    )


def test_a_block_of_q5_0() -> None:
    x = np.zeros((1, 32), dtype=np.float32)
    x[0, :3] = 8, -7.5, 1
    x[0, 16:18] = 7, -2
    assert quantize(x, QType.Q5_0).tobytes().hex(" ") == (
        "00 b8"  # d = 8 / -16 = -0.5
        " fa ff fe ff"  # bit 4: weights 1, 3-15, 17-31; not weights 0 (level 0), 2 (14), 16 (2)
        " 20"  # weight 0: level 0 (8); weight 16: level 2 (7)
        " 4f"  # weight 1: level 31 (-7.5): 16 + 15; weight 17: level 20 (-2): 16 + 4
        " 0e" + " 00" * 13  # weight 2: level 14 (1); weight 18: level 16 (0): 16 + 0
    )


def test_a_block_of_q5_1() -> None:
    x = np.full((1, 32), 2, dtype=np.float32)
    x[0, :3] = 5.875, 4, 3.9
    x[0, 16:18] = 2.5, 4.25
    assert quantize(x, QType.Q5_1).tobytes().hex(" ") == (
        "00 30"  # d = (5.875 - 2) / 31 = 0.125
        " 00 40"  # m = 2
        " 03 00 02 00"  # bit 4: weights 0, 1, 17
        " 4f"  # weight 0: level 31 (5.875): 16 + 15; weight 16: level 4 (2.5)
        " 20"  # weight 1: level 16 (4): 16 + 0; weight 17: level 18 (4.25): 16 + 2
        " 0f" + " 00" * 13  # weight 2: level 15 (3.875, the nearest to 3.9); weight 18: level 0 (2)
    )


def test_a_block_of_q8_0() -> None:
    x = np.zeros((1, 32), dtype=np.float32)
    x[0, :5] = 63.5, -63.5, 0.25, -0.25, 1
    assert quantize(x, QType.Q8_0).tobytes().hex(" ") == (
        "00 38"  # d = 63.5 / 127 = 0.5
        " 7f 81"  # 127, -127
        " 01 ff"  # 0.5 and -0.5 round away from zero: 1, -1
        " 02" + " 00" * 27  # 2
    )


def test_a_block_of_tq1_0() -> None:
    x = np.zeros((1, 256), dtype=np.float32)
    x[0, [0, 32, 64, 96, 128]] = 2, -2, 2, -2, 2
    x[0, 240] = -1
    assert quantize(x, QType.TQ1_0).tobytes().hex(" ") == (
        "c0"  # weights 0, 32, 64, 96, 128: levels 2 0 2 0 2, in ternary 182; 182 * 256 / 243 = 191.7
        + " 80" * 31  # levels 1 1 1 1 1: 121 * 256 / 243 = 127.5
        + " 80" * 16  # weights 160-239
        + " 2a"  # weights 240, 244, 248, 252: levels 0 1 1 1, then 0
        + " 7f" * 3  # levels 1 1 1 1, then 0
        + " 00 40"  # d = 2
    )


def test_a_block_of_tq2_0() -> None:
    x = np.zeros((1, 256), dtype=np.float32)
    x[0, [0, 32, 64, 96]] = 3, -3, 1.4, 1.5
    assert quantize(x, QType.TQ2_0).tobytes().hex(" ") == (
        "92"  # weights 0, 32, 64, 96: levels 2 0 1 2, the first one lowest: 10 01 00 10
        + " 55" * 63  # zeros: level 1
        + " 00 42"  # d = 3
    )
