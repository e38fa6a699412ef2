"""The table of types against gguf's, against what quantizes and judges them, and against itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
from gguf.constants import GGMLQuantizationType as QType

from gguf3n.formats.ggml_types import GGML_TYPES, TYPE_OF_FTYPE, Importances
from gguf3n.quants import QUANTIZERS
from gguf3n.recipes import PLE_TYPES
from gguf3n.recipes.toml import WRITABLE, parse_ftype, parse_type
from gguf3n.validation.bands import BANDS
from gguf3n.validation.logits import LIMITS
from gguf3n.validation.yardsticks import ROUNDING

every_type = pytest.mark.parametrize("qtype", GGML_TYPES, ids=lambda qtype: qtype.name)


def test_every_type_is_in_every_table() -> None:
    for table in (QUANTIZERS, BANDS, LIMITS):
        assert set(table) == set(GGML_TYPES)
    assert list(WRITABLE.values()) == list(GGML_TYPES)
    assert set(ROUNDING) == {q for q in GGML_TYPES if GGML_TYPES[q].weights > 1} - {QType.IQ1_S, QType.IQ1_M}


@every_type
def test_blocks_are_those_of_gguf(qtype: QType) -> None:
    row = GGML_TYPES[qtype]
    assert (row.weights, row.block_bytes) == GGML_QUANT_SIZES[qtype]
    assert row.block.hasobject is False and row.block.alignment == 1


@every_type
def test_blocks_are_those_of_the_quantizer(qtype: QType) -> None:
    """Modules of types with blocks say how many bytes one has."""
    if GGML_TYPES[qtype].weights == 1:
        return
    module = __import__(f"gguf3n.quants.{qtype.name.lower()}", fromlist=["_"])
    sizes = [vars(module)[name] for name in ("BLOCK_BYTES", "SUPER_BYTES") if name in vars(module)]
    assert sizes[-1:] in ([], [GGML_TYPES[qtype].block_bytes])


@every_type
def test_scales_are_where_gguf_reads_them(qtype: QType) -> None:
    """A block whose scales are infinite has no finite weight but zeros, for gguf's own reader."""
    from gguf.quants import dequantize

    row = GGML_TYPES[qtype]
    if not row.scales:
        assert row.weights == 1 or qtype is QType.IQ1_M
        return
    block = np.frombuffer(bytes([0x55]) * row.block_bytes, row.block).copy()
    assert np.isfinite(dequantize(block.view(np.uint8), qtype)).all()
    for name in row.scales:
        broken = block.copy()
        broken[name] = np.inf
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(dequantize(broken.view(np.uint8), qtype)).any()


@every_type
def test_fallbacks_hold_shorter_rows(qtype: QType) -> None:
    row = GGML_TYPES[qtype]
    assert (row.fallback is None) == (row.weights < 256)
    if row.fallback is not None:
        assert GGML_TYPES[row.fallback].weights == 32


@every_type
def test_importances_are_what_the_quantizer_takes(qtype: QType) -> None:
    row, quantizer = GGML_TYPES[qtype], QUANTIZERS[qtype]
    assert (row.importances is Importances.IGNORED) == (quantizer.weighted is None)
    assert (row.importances is Importances.REQUIRED) == (quantizer.plain is None)
    assert row.needs_importances >= (quantizer.plain is None)


@every_type
def test_file_types_round_trip(qtype: QType) -> None:
    row = GGML_TYPES[qtype]
    assert TYPE_OF_FTYPE[row.ftype] is qtype
    assert parse_type(qtype.name) is qtype
    for ftype in row.ftypes:
        assert TYPE_OF_FTYPE[ftype] is qtype
        assert parse_ftype(ftype.name.partition("_")[2]) is ftype


def test_every_file_type_has_one_type() -> None:
    counts = Counter(ftype for row in GGML_TYPES.values() for ftype in row.ftypes)
    assert set(counts.values()) == {1}
    unwritable = {"MOSTLY_MXFP4_MOE", "MOSTLY_NVFP4", "MOSTLY_Q1_0", "GUESSED"}
    assert {ftype.name for ftype in LlamaFileType} - {ftype.name for ftype in counts} <= unwritable


def test_types_of_per_layer_embeddings_begin_with_the_smallest() -> None:
    assert [qtype.name for qtype in PLE_TYPES] == ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"]
