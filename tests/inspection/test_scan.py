"""What the bytes of a tensor say, in every type that can be written."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType
from gguf.quants import dequantize

from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.inspection.scan import TensorFacts, _look

N_BLOCKS = 8
BROKEN = 3


def facts(qtype: QType, blocks: np.ndarray) -> TensorFacts:
    found = TensorFacts()
    _look(qtype, blocks.view(np.uint8), found)
    return found


@pytest.mark.parametrize("qtype", GGML_TYPES, ids=lambda qtype: qtype.name)
def test_a_block_that_is_not_finite_is_seen(qtype: QType) -> None:
    """By its scales alone, and just where gguf's reader gives no finite weights."""
    row = GGML_TYPES[qtype]
    sound = np.frombuffer(bytes([0x15]) * (N_BLOCKS * row.block_bytes), row.block)
    assert facts(qtype, sound) == TensorFacts(any_set=True)
    for place in row.scales or row.block.names or ():
        blocks = sound.copy()
        if qtype is QType.IQ1_M:
            if place != "scales":
                continue
            blocks[place][BROKEN] = [0x0123, 0x0456, 0xC789, 0x7ABC]
        else:
            blocks[place][BROKEN] = 0x7F80 if qtype is QType.BF16 else np.inf
        assert facts(qtype, blocks) == TensorFacts(n_bad=1, any_set=True)
        with np.errstate(invalid="ignore"):
            weights = dequantize(blocks.view(np.uint8), qtype).reshape(N_BLOCKS, -1)
        assert (~np.isfinite(weights)).any(axis=1).tolist() == [i == BROKEN for i in range(N_BLOCKS)]


def test_nothing_is_set() -> None:
    assert facts(QType.Q8_0, np.zeros(34, np.uint8)) == TensorFacts()
