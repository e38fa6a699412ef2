"""What every quantizer of the table must do: ggml's bytes, and no dependence on how the rows were dealt out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.engines import ggml
from gguf3n.quants import QUANTIZERS
from tests.quants import inputs

PLAIN = [qtype for qtype, quantizer in QUANTIZERS.items() if quantizer.plain is not None]
WEIGHTED = [qtype for qtype, quantizer in QUANTIZERS.items() if quantizer.weighted is not None]
MODES = [(qtype, False) for qtype in PLAIN] + [(qtype, True) for qtype in WEIGHTED]
ABORTING = {QType.IQ3_S, QType.IQ3_XXS, QType.IQ2_S, QType.IQ2_XS}
"""ggml ends the process (grid_index >= 0) where squares of weights overflow: the family `huge`."""

LENGTHS = [
    (qtype, weighted, n_per_row)
    for qtype, weighted in MODES
    for n_per_row in (32, 96, 256, 768, 2048, 8192, 16384)
    if n_per_row % GGML_QUANT_SIZES[qtype][0] == 0
]


def families_of(qtypes: list[QType]) -> pytest.MarkDecorator:
    """Every type with every family that ggml survives."""
    pairs = [
        (qtype, family) for qtype in qtypes for family in inputs.ROWS if not (family == "huge" and qtype in ABORTING)
    ]
    return pytest.mark.parametrize(("qtype", "family"), pairs, ids=[f"{q.name}-{family}" for q, family in pairs])


def mode_name(qtype: QType, weighted: bool) -> str:
    return f"{qtype.name}{'-weighted' * weighted}"


every_type = pytest.mark.parametrize("qtype", QUANTIZERS, ids=lambda qtype: qtype.name)
every_plain = families_of(PLAIN)
every_weighted = families_of(WEIGHTED)
every_mode = pytest.mark.parametrize(
    ("qtype", "weighted"), MODES, ids=[mode_name(qtype, weighted) for qtype, weighted in MODES]
)
every_weights = pytest.mark.parametrize("weights", inputs.WEIGHTS)

N_PER_ROW = 1024
N_ROWS = 5  # 20 super-blocks or 160 blocks: groups of lanes are full, partial, and cross rows


def quantize_into(rows: np.ndarray, qtype: QType, out: np.ndarray, quant_weights: np.ndarray | None) -> None:
    quantizer = QUANTIZERS[qtype]
    if quant_weights is None:
        assert quantizer.plain is not None
        quantizer.plain(rows, out)
    else:
        assert quantizer.weighted is not None
        quantizer.weighted(rows, quant_weights, out)


def quantize(rows: np.ndarray, qtype: QType, quant_weights: np.ndarray | None = None, fill: int = 0xAA) -> np.ndarray:
    """Our bytes, written over `fill`."""
    out = np.full((rows.shape[0], ggml.row_bytes(qtype, rows.shape[1])), fill, dtype=np.uint8)
    quantize_into(rows, qtype, out, quant_weights)
    return out


def weights_if(weighted: bool, n_per_row: int) -> np.ndarray | None:
    return inputs.quant_weights("random_weights", n_per_row) if weighted else None


def assert_same_bytes(ours: np.ndarray, theirs: np.ndarray, qtype: QType) -> None:
    """Equality, naming the first block that differs."""
    if np.array_equal(ours, theirs):
        return
    block_bytes = GGML_QUANT_SIZES[qtype][1]
    wrong = (ours != theirs).reshape(-1, block_bytes).any(axis=1)
    first = int(wrong.argmax())
    pytest.fail(
        f"{int(wrong.sum())} of {wrong.size} blocks differ; the first is block {first}:\n"
        f"  ours   {ours.reshape(-1, block_bytes)[first].tobytes().hex(' ')}\n"
        f"  theirs {theirs.reshape(-1, block_bytes)[first].tobytes().hex(' ')}"
    )


@every_plain
def test_bytes_are_those_of_ggml(qtype: QType, family: str) -> None:
    rows = inputs.rows(family, N_ROWS, N_PER_ROW)
    assert_same_bytes(quantize(rows, qtype), ggml.quantize(rows, qtype), qtype)


@every_weighted
@every_weights
def test_weighted_bytes_are_those_of_ggml(qtype: QType, family: str, weights: str) -> None:
    rows = inputs.rows(family, N_ROWS, N_PER_ROW)
    quant_weights = inputs.quant_weights(weights, N_PER_ROW)
    assert_same_bytes(quantize(rows, qtype, quant_weights), ggml.quantize(rows, qtype, quant_weights), qtype)


@pytest.mark.parametrize(
    ("qtype", "weighted", "n_per_row"), LENGTHS, ids=[f"{mode_name(q, w)}-{n}" for q, w, n in LENGTHS]
)
def test_bytes_are_those_of_ggml_for_every_row_length(qtype: QType, weighted: bool, n_per_row: int) -> None:
    rows = inputs.rows("student_t3", 1 if n_per_row > 8000 else 3, n_per_row)
    quant_weights = weights_if(weighted, n_per_row)
    assert_same_bytes(quantize(rows, qtype, quant_weights), ggml.quantize(rows, qtype, quant_weights), qtype)


@every_mode
def test_every_byte_is_written(qtype: QType, weighted: bool) -> None:
    families = ("gaussian", "zeros", "denormal", "large", "huge")
    rows = np.concatenate([inputs.rows(family, 1, 512) for family in families])
    quant_weights = weights_if(weighted, 512)
    over_zeros = quantize(rows, qtype, quant_weights, fill=0x00)
    over_ones = quantize(rows, qtype, quant_weights, fill=0xFF)
    assert np.array_equal(over_zeros, over_ones)


@every_mode
def test_inputs_are_left_alone(qtype: QType, weighted: bool) -> None:
    rows = inputs.rows("laplace", 3, 512)
    quant_weights = weights_if(weighted, 512)
    before = rows.copy(), None if quant_weights is None else quant_weights.copy()
    quantize(rows, qtype, quant_weights)
    assert np.array_equal(rows, before[0])
    assert quant_weights is None or np.array_equal(quant_weights, before[1])


@every_mode
def test_a_row_does_not_depend_on_other_rows(qtype: QType, weighted: bool) -> None:
    families = ("gaussian", "zeros", "huge", "large", "denormal", "outlier", "ties", "signed_zeros")
    rows = np.concatenate([inputs.rows(family, 1, 768) for family in families])
    quant_weights = weights_if(weighted, 768)
    together = quantize(rows, qtype, quant_weights)
    order = np.random.default_rng(1).permutation(len(rows))
    assert np.array_equal(quantize(rows[order], qtype, quant_weights), together[order])


@every_mode
def test_splitting_into_calls_changes_nothing(qtype: QType, weighted: bool) -> None:
    rows = inputs.rows("mixed_sizes", 11, 768)
    quant_weights = weights_if(weighted, 768)
    together = quantize(rows, qtype, quant_weights)
    for step in (1, 3, 7):
        out = np.full_like(together, 0xAA)
        for start in range(0, len(rows), step):
            quantize_into(rows[start : start + step], qtype, out[start : start + step], quant_weights)
        assert np.array_equal(out, together)


@every_mode
def test_no_rows(qtype: QType, weighted: bool) -> None:
    assert quantize(np.empty((0, 256), dtype=np.float32), qtype, weights_if(weighted, 256)).size == 0


@every_mode
def test_threads_change_nothing(qtype: QType, weighted: bool) -> None:
    rows = inputs.rows("gaussian", 24, 768)
    quant_weights = weights_if(weighted, 768)
    alone = quantize(rows, qtype, quant_weights)
    out = np.full_like(alone, 0xAA)
    with ThreadPoolExecutor(2) as pool:
        parts = [slice(start, start + 4) for start in range(0, len(rows), 4)]
        list(pool.map(lambda part: quantize_into(rows[part], qtype, out[part], quant_weights), parts))
    assert np.array_equal(out, alone)


@every_type
def test_table_agrees_with_ggml_on_quant_weights(qtype: QType) -> None:
    """`plain` is missing where ggml requires quant_weights, `weighted` where its bytes ignore them."""
    rows = inputs.rows("gaussian", 2, 512)
    one = ggml.quantize(rows, qtype, inputs.quant_weights("random_weights", 512, seed=1))
    if ggml.requires_quant_weights(qtype):
        other = ggml.quantize(rows, qtype, inputs.quant_weights("random_weights", 512, seed=2))
    else:
        other = ggml.quantize(rows, qtype)
    quantizer = QUANTIZERS[qtype]
    assert (quantizer.plain is None) == ggml.requires_quant_weights(qtype)
    assert (quantizer.weighted is None) == np.array_equal(one, other)


@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("family", ["bf16_valued", "student_t3", "mixed_sizes", "ties"])
def test_a_million_weights(qtype: QType, weighted: bool, family: str) -> None:
    """Four million a type: rare coincidences, such as candidates of equal error, happen here."""
    rows = inputs.rows(family, 512, 2048, seed=3)
    weights = "ten_orders" if family == "ties" else "random_weights"
    quant_weights = inputs.quant_weights(weights, 2048) if weighted else None
    assert_same_bytes(quantize(rows, qtype, quant_weights), ggml.quantize(rows, qtype, quant_weights), qtype)
