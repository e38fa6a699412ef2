"""Weights that sound checkpoints have now and then, and matrices that count almost nothing but a few columns: no sound
file fails, and with its matrix at hand it passes. What is not sound is found: one block, one page, a scale."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.conversion import read_source
from gguf3n.formats.ggml_types import GGML_TYPES
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.imatrix import Entry, ImportanceMatrix
from gguf3n.gemma3n.importance import match_importance
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.quants import QUANTIZERS
from gguf3n.quants.api import dequantize, quantize
from gguf3n.validation import rules
from gguf3n.validation.bands import SHOWN, limits
from gguf3n.validation.evidence import examine
from gguf3n.validation.result import Verdict
from gguf3n.validation.tensor_errors import TensorsResult
from gguf3n.validation.tensors import check_tensors
from tests import micro
from workshop import bands

N_ROWS, N_COLUMNS = 16, 512
Rng = np.random.Generator


def heavy_tails(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_t(1.5, size=shape)


def some_huge(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    return np.where(rng.random(shape) < 1e-3, 1000, 1) * rng.standard_normal(shape)


def pruned(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    """A third of the rows is next to nothing, half of the weights are zero."""
    rows = np.where(rng.random((shape[0], 1)) < 1 / 3, 1e-7, 1)
    return rows * np.where(rng.random(shape) < 0.5, 0, rng.standard_normal(shape))


def rows_of_six_decades(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape) * 10 ** rng.uniform(-6, 0, (shape[0], 1))


def columns_of_three_decades(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape) * 10 ** rng.uniform(-3, 0, (1, shape[1]))


def on_a_grid(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    """Fifteen levels in every 32 weights, as training for a quantization leaves them."""
    runs = rng.standard_normal(shape).reshape(-1, 32)
    steps = np.abs(runs).max(axis=1, keepdims=True) / 7
    on_grid: np.ndarray = steps * np.round(runs / steps)
    return on_grid.reshape(shape)


def offset(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    return 3 + rng.standard_normal(shape)


def binary(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    return rng.choice([-1.0, 1.0], shape)


def alone(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    """One weight in a hundred, and next to nothing between them."""
    return np.where(rng.random(shape) < 0.01, 1, 1e-6) * rng.standard_normal(shape)


def waves(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    return np.sin(0.1 * np.arange(shape[1]) + rng.uniform(0, 6, (shape[0], 1)))


def constant(rng: Rng, shape: tuple[int, int]) -> np.ndarray:
    """Each row one value: most importances then give the same bytes as none."""
    return np.full(shape, 1.0) * rng.standard_normal((shape[0], 1))


Rows = Callable[[Rng, tuple[int, int]], np.ndarray]
ROWS: dict[str, Rows] = {
    make.__name__: make
    for make in (
        heavy_tails, some_huge, pruned, rows_of_six_decades, columns_of_three_decades, on_a_grid, offset, binary,
        alone, waves,
    )
}  # fmt: skip


def peaked(rng: Rng, n: int) -> np.ndarray:
    """One column in 64 counts 10,000 times as much as the rest."""
    weights = rng.chisquare(1, n)
    weights[rng.integers(n, size=n // 64)] *= 1e4
    return weights


WEIGHTS: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "ordinary": lambda rng, n: rng.chisquare(1, n),
    "peaked": peaked,
    "mostly idle": lambda rng, n: np.where(rng.random(n) < 0.9, 0, rng.chisquare(1, n)),
    "of many decades": lambda rng, n: 10.0 ** rng.uniform(-12, 6, n),
}
NEXT_TO_NONE: dict[str, Callable[[Rng, int], np.ndarray]] = {
    "one of 32": lambda rng, n: np.where(np.arange(n) % 32 < 31, 1e-10, 1.0),
    "tiny": lambda rng, n: 1e-35 * rng.chisquare(1, n),
}
"""Where float32 can't add them up: ggml then makes of rows with decades in them what no rule foresees."""
WEIGHTED = [qtype for qtype, quantizer in QUANTIZERS.items() if quantizer.weighted is not None]
every_type = pytest.mark.parametrize("qtype", WEIGHTED, ids=lambda qtype: qtype.name)


def rows_of(make: Rows, seed: int = 0) -> np.ndarray:
    return bands.in_bf16((0.02 * make(np.random.default_rng(seed), (N_ROWS, N_COLUMNS))).astype(np.float32))


# what no importances explain, by types


def test_every_type_that_importances_change_has_its_rules() -> None:
    assert set(rules.RULES) == set(SHOWN) == set(WEIGHTED)
    assert set(rules.REACH) == set(QUANTIZERS)


@every_type
def test_the_reach_is_the_largest_multiple_of_a_scale(qtype: QType) -> None:
    """Of random blocks whose scale is 1."""
    fields = GGML_TYPES[qtype].block
    if "d" not in (fields.names or ()):  # IQ1_M spreads it
        return
    data = np.random.default_rng(0).integers(256, size=(4096, fields.itemsize), dtype=np.uint8)
    blocks = data.view(fields)
    blocks["d"] = 1
    for name in ("dmin", "m"):
        if name in (fields.names or ()):
            blocks[name] = 0
    largest = float(np.abs(dequantize(data, qtype)).max())
    assert largest <= rules.REACH[qtype] <= 1.2 * largest + 1


@every_type
def test_no_sound_rows_are_impossible(qtype: QType) -> None:
    for rows in ROWS.values():
        x = rows_of(rows)
        for weights, make in WEIGHTS.items():
            importance = make(np.random.default_rng(1), N_COLUMNS).astype(np.float32)
            blocks = quantize(x, qtype, importance)
            q = dequantize(blocks, qtype)
            found = examine(qtype, np.arange(N_ROWS), x, blocks, q, None, limits(qtype, weighted=True), weighted=True)
            assert found.is_possible, (rows.__name__, weights)
            known = examine(
                qtype, np.arange(N_ROWS), x, blocks, q, importance, limits(qtype, weighted=False), weighted=False
            )
            assert known.identical and not known.bad.any()


@pytest.mark.parametrize("qtype", [q for q in WEIGHTED if rules.RULES[q].rounding], ids=lambda qtype: qtype.name)
def test_rows_of_another_version_are_impossible(qtype: QType) -> None:
    """By 5 %, made with the same importances."""
    rng = np.random.default_rng(0)
    x = rows_of(lambda rng, shape: rng.standard_normal(shape))
    importance = rng.chisquare(1, N_COLUMNS).astype(np.float32)
    other = x + np.float32(0.05 * x.std()) * rng.standard_normal(x.shape, np.float32)
    blocks = quantize(other, qtype, importance)
    q = dequantize(blocks, qtype)
    found = examine(qtype, np.arange(N_ROWS), x, blocks, q, None, limits(qtype, weighted=True), weighted=True)
    assert not found.is_possible


# files


RAW = micro.config(
    hidden_size=256,
    hidden_size_per_layer_input=256,
    intermediate_size=[256] * 3,
    num_attention_heads=4,
    head_dim=64,
)
TENSOR = "blk.1.ffn_up.weight"
TABLE = "per_layer_token_embd.weight"


def source_of(make: Rows, directory: Path) -> Part:
    arrays = micro.tensors(RAW)
    rng = np.random.default_rng(0)
    for name, array in arrays.items():
        if array.ndim == 2 and array.shape[1] == 256:
            values = bands.in_bf16((0.02 * make(rng, array.shape)).astype(np.float32))
            arrays[name] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return text_part(read_source(micro.make(directory, raw=RAW, arrays=arrays)))


def importances(source: Part, kind: str) -> ImportanceMatrix:
    """Of every matrix of a layer: llama.cpp counts none for tables."""
    rng = np.random.default_rng(1)
    make = {**WEIGHTS, **NEXT_TO_NONE}[kind]
    entries = {
        tensor.name: Entry(make(rng, tensor.n_per_row)[None].astype(np.float32), np.ones(1, np.float32))
        for tensor in source.tensors
        if tensor.storage is Storage.QUANTIZABLE and tensor.evaluated and tensor.bid is not None
    }
    return ImportanceMatrix(Path("imatrix.gguf"), entries, ("text",), 1, 512)


def check(path: Path, source: Part, imatrix: ImportanceMatrix | None = None) -> TensorsResult:
    known = None if imatrix is None else match_importance(imatrix, source).quant_weights
    return check_tensors(open_gguf(path, strict=False), source, quant_weights=known)


@pytest.mark.parametrize("weights", ["ordinary", "peaked"])
@pytest.mark.parametrize("rows", [heavy_tails, rows_of_six_decades, columns_of_three_decades, on_a_grid])
def test_no_sound_file_fails(rows: Rows, weights: str, tmp_path: Path) -> None:
    source = source_of(rows, tmp_path / "source")
    imatrix = importances(source, weights)
    for each in gguf3n.convert(source.source, ["Q4_0", "Q4_K_M", "IQ3_XXS", "IQ2_XS"], tmp_path, imatrix=imatrix):
        unknown = check(each.path, source)
        assert unknown.verdict is not Verdict.FAIL, (each.path.name, unknown.problems)
        assert all("imatrix" in problem.what for problem in unknown.problems)
        known = check(each.path, source, imatrix)
        assert not known.problems
        assert known.n_identical == len(known.errors)


@pytest.mark.parametrize("weights", NEXT_TO_NONE)
def test_rows_of_one_value_do_not_fail(weights: str, tmp_path: Path) -> None:
    """Where most blocks have our bytes by chance, the others may have those of an unknown matrix."""
    source = source_of(constant, tmp_path / "source")
    imatrix = importances(source, weights)
    for each in gguf3n.convert(source.source, ["Q4_1", "Q6_K", "IQ4_NL", "IQ1_S"], tmp_path, imatrix=imatrix):
        unknown = check(each.path, source)
        assert unknown.verdict is not Verdict.FAIL, (each.path.name, unknown.problems)
        assert not check(each.path, source, imatrix).problems


def scale_bit(bit: int) -> Callable[[np.ndarray], None]:
    def damage(blocks: np.ndarray) -> None:
        blocks[77:78]["d"].view(np.uint16)[:] ^= 1 << bit

    return damage


def page_of_zeros(blocks: np.ndarray) -> None:
    """As a file system leaves one that was never written."""
    data = blocks.view(np.uint8).reshape(-1)
    data[8192 : 8192 + 4096] = 0


DAMAGES: dict[str, Callable[[np.ndarray], None]] = {
    "top bit": scale_bit(14),
    "bit of 4": scale_bit(11),
    "page of zeros": page_of_zeros,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Part, ImportanceMatrix, Path]]:
    """A source of ordinary weights, importances, and a file of a type made with them, not to be changed."""
    directory = tmp_path_factory.mktemp("sound")
    source = source_of(lambda rng, shape: rng.standard_normal(shape), directory / "source")
    imatrix = importances(source, "ordinary")
    quants = ["Q4_0", "Q4_K_M", "IQ2_XS", "IQ3_S"]
    made = gguf3n.convert(source.source, quants, directory, imatrix=imatrix)
    paths = {each.plan.recipe.name: each.path for each in made}
    return lambda quant: (source, imatrix, paths[quant])


@pytest.mark.parametrize("name", [TENSOR, TABLE])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", "IQ2_XS"])
def test_one_damaged_block_is_found(quant: str, damage: str, name: str, sound: Callable, tmp_path: Path) -> None:
    source, imatrix, path = sound(quant)
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    tensor = open_gguf(copy, strict=False).tensors[name]
    block = GGML_TYPES[tensor.qtype].block
    data = np.memmap(copy, np.uint8, "r+", tensor.offset, (tensor.n_bytes,))
    DAMAGES[damage](data.view(block))
    data.flush()
    for known in (None, imatrix):
        problems = check(copy, source, known).problems
        assert {problem.where for problem in problems} == {name}
        # an IQ2 block that is too short may be right, if only its small weights count
        is_possible = known is None and (quant, damage, name) == ("IQ2_XS", "bit of 4", TENSOR)
        assert problems[0].verdict is (Verdict.WARN if is_possible else Verdict.FAIL), problems
        assert re.match(r"rows? \d+|\d+ of 256 sampled rows", problems[0].what), problems


@pytest.mark.parametrize("field", ["scales", "qs"])
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K_M", "IQ2_XS", "IQ3_S"])
def test_a_single_bit_is_told_with_the_matrix(quant: str, field: str, sound: Callable, tmp_path: Path) -> None:
    """Of a small scale, or of a level, which no rule and no error tells."""
    source, imatrix, path = sound(quant)
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    tensor = open_gguf(copy, strict=False).tensors[TENSOR]
    block = GGML_TYPES[tensor.qtype].block
    field = field if field in (block.names or ()) else "qs"
    data = np.memmap(copy, np.uint8, "r+", tensor.offset, (tensor.n_bytes,))
    data.view(block)[77:78][field].view(np.uint8).reshape(-1)[-1] ^= 0x80
    data.flush()
    result = check(copy, source, imatrix)
    (problem,) = result.problems
    assert problem.where == TENSOR
    row = 77 * GGML_TYPES[tensor.qtype].weights // 256
    assert problem.what.startswith((f"row {row} of 256", f"1 of 256 sampled rows from {row} to {row}"))
    assert [error.name for error in result.errors if not error.identical] == [TENSOR]


def test_many_rows_of_other_bytes_are_another_compilation(sound: Callable, tmp_path: Path) -> None:
    """In most tensors of a type: a level of a row in each."""
    source, imatrix, path = sound("Q4_0")
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    tensors = [t for t in open_gguf(copy, strict=False).tensors.values() if t.qtype is QType.Q4_0]
    for tensor in tensors:
        data = np.memmap(copy, np.uint8, "r+", tensor.offset, (tensor.n_bytes,))
        data.view(GGML_TYPES[QType.Q4_0].block)[8:9]["qs"].reshape(-1)[0] ^= 1
        data.flush()
    result = check(copy, source, imatrix)
    assert result.verdict is Verdict.PASS
    assert not {error.name for error in result.errors if error.identical} & {tensor.name for tensor in tensors}


def test_another_scale_fails_with_the_matrix_and_is_not_hidden_without(sound: Callable, tmp_path: Path) -> None:
    """By 2 %, in IQ2_XS."""
    source, imatrix, path = sound("IQ2_XS")
    copy = Path(shutil.copy(path, tmp_path / "copy.gguf"))
    tensor = open_gguf(copy, strict=False).tensors[TENSOR]
    assert tensor.qtype is QType.IQ2_XS
    data = np.memmap(copy, np.uint8, "r+", tensor.offset, (tensor.n_bytes,))
    scales = data.view(GGML_TYPES[tensor.qtype].block)["d"]
    scales[:] = scales * np.float16(1.02)
    data.flush()
    (problem,) = check(copy, source, imatrix).problems
    assert (problem.verdict, problem.where) == (Verdict.FAIL, TENSOR)
    unknown = check(copy, source)
    assert not unknown.problems
    shown = SHOWN[QType.IQ2_XS].scale
    text = "never" if shown is None else f"from {shown:.0%}"
    assert any(f"another scale {text}: IQ2_XS" in line for line in unknown.lines())


def test_tables_are_proved_without_the_matrix(sound: Callable) -> None:
    source, _, path = sound("Q4_K_M")
    result = check(path, source)
    assert {error.name for error in result.errors if error.identical} >= {"token_embd.weight", TABLE}
    assert any("any other version or scale" in line for line in result.lines())
    assert result.details()["shows"] == result.shows
