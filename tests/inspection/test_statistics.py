"""Statistics of weights, against a slow oracle, numpy's own float16, and convolutions carried out."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import gguf.quants
import numpy as np
import pytest

import gguf3n
import gguf3n.cli
from gguf3n.errors import CheckpointError, GGUFError, SourceError, UsageError
from gguf3n.formats import checkpoint, training_folder
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.formats.rows import SourceTensor, View, Zeros
from gguf3n.gemma3n.source import open_source
from gguf3n.inspection import statistics
from gguf3n.inspection.network import Kind, Section, kind, place, short_name
from gguf3n.inspection.statistics import (
    F16_MAX,
    Moments,
    Part,
    Statistics,
    TensorStatistics,
    f16_risks,
    measure_statistics,
)
from gguf3n.progress import Progress
from tests import micro
from tests.command_line import Run, plain
from workshop import checkpoints

# the oracle


def moments(values: list[float]) -> tuple[float, float, float | None]:
    """Mean, standard deviation and excess kurtosis in exact arithmetic."""
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    second = sum((value - mean) ** 2 for value in exact) / len(exact)
    fourth = sum((value - mean) ** 4 for value in exact) / len(exact)
    return float(mean), math.sqrt(second), float(fourth / second**2 - 3) if second else None


def f16_losses(values: list[float]) -> tuple[int, int, int]:
    """How many overflow, become zero, become subnormal, one value at a time."""
    overflow = zero = subnormal = 0
    for value in values:
        with np.errstate(over="ignore"):
            half = float(np.float16(value))
        overflow += abs(value) > 65504
        zero += half == 0 and value != 0
        subnormal += half != 0 and abs(value) < 2.0**-14
    return overflow, zero, subnormal


def check(found: TensorStatistics, array: np.ndarray) -> None:
    """All that is said of a tensor against the oracle."""
    everything = [float(value) for value in array.reshape(-1)]
    values = [value for value in everything if math.isfinite(value)]
    mean, std, kurtosis = moments(values)
    assert found.n_weights == len(everything)
    assert found.part.n_nan == sum(math.isnan(value) for value in everything)
    assert found.part.n_infinite == sum(math.isinf(value) for value in everything)
    assert found.largest == max(map(abs, values))
    assert found.part.n_zero == sum(value == 0 for value in values)
    assert found.mean == pytest.approx(mean, rel=1e-9, abs=1e-12 * std)
    assert found.std == pytest.approx(std, rel=1e-9) and (found.std == 0) == (std == 0)
    assert found.kurtosis == (None if kurtosis is None else pytest.approx(kurtosis, rel=1e-8, abs=1e-9))
    assert (found.part.f16_overflow, found.part.f16_zero, found.part.f16_subnormal) == f16_losses(values)


# what is measured


def arrays() -> dict[str, np.ndarray]:
    """Tensors that are hard on sums: by name, values."""
    rng = np.random.default_rng(5)
    normal = rng.standard_normal((7, 111)).astype(np.float32)
    specials = normal.copy()
    specials[0, :4] = np.nan, np.inf, -np.inf, -0.0
    denormal = np.full((2, 40), 1e-45, np.float32)
    denormal[1] *= 3
    return {
        "normal": normal,
        "heavy": (normal**5).astype(np.float32),
        "far": normal * np.float32(1e-3) + np.float32(1000),
        "huge": normal * np.float32(1e37),
        "denormal": denormal,
        "small": normal * np.float32(1e-6),
        "sparse": np.where(np.abs(normal) < 1, np.float32(0), normal),
        "outlier": np.where(np.arange(777).reshape(7, 111) == 400, np.float32(1e9), normal),
        "f16-ends": np.array(
            [65504, 65505, 65519.9, 65520, -65536, 2**-14, 2**-14 * 0.9999, 2**-24, 2**-25, -(2**-25) * 1.0001, 1e-9],
            np.float32,
        ),
        "constant": np.full((3, 1001), 0.1, np.float32),
        "zeros": np.zeros((4, 4), np.float32),
        "one": np.array([-2.5], np.float32),
        "specials": specials,
    }


DTYPES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "F32": (lambda a: a, lambda a: a),
    "F16": (lambda a: a.astype(np.float16), lambda a: a.astype(np.float32)),
    "BF16": (micro.bf16_bits, lambda a: (a.astype(np.uint32) << 16).view(np.float32)),
}
"""How an array is stored, and what that stands for."""


def stored(directory: Path, stored_arrays: dict[str, np.ndarray]) -> Path:
    directory.mkdir()
    micro.write_safetensors(directory / "model.safetensors", stored_arrays)
    return directory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_against_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, threads: int) -> None:
    """With chunks of 64 weights, so that everything is merged."""
    monkeypatch.setattr(statistics, "FLOAT_WEIGHTS", 64)
    monkeypatch.setattr(statistics, "HISTOGRAM_WEIGHTS", 64)
    narrow, wide = DTYPES[dtype]
    with np.errstate(all="ignore"):
        narrowed = {name: narrow(array) for name, array in arrays().items() if (name, dtype) != ("huge", "F16")}
    result = measure_statistics(stored(tmp_path / "x", narrowed), threads=threads)
    assert {tensor.name for tensor in result.tensors} == set(narrowed)
    for tensor in result.tensors:
        assert tensor.dtype == dtype
        check(tensor, wide(narrowed[tensor.name]))


def test_neither_threads_nor_chunks_change_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path / "x", {"a": np.random.default_rng(0).standard_normal((300, 100)).astype(np.float32)})
    monkeypatch.setattr(statistics, "FLOAT_WEIGHTS", 128)
    assert measure_statistics(path, threads=1) == measure_statistics(path, threads=4)
    monkeypatch.setattr(statistics, "HISTOGRAM_WEIGHTS", 128)
    path = stored(tmp_path / "y", {"a": np.random.default_rng(0).standard_normal((300, 100)).astype(np.float16)})
    in_pieces = measure_statistics(path, threads=4)
    monkeypatch.setattr(statistics, "HISTOGRAM_WEIGHTS", 1 << 18)
    assert measure_statistics(path, threads=1) == in_pieces


def test_moments_of_parts_make_those_of_the_whole() -> None:
    rng = random.Random(3)
    values = [1e6 + rng.gauss(0, 1) ** 3 for _ in range(500)]
    merged = Moments.of(np.array(values[:1]))
    first = 1
    while first < len(values):
        last = first + rng.choice((1, 2, 50))
        merged = merged.merged(Moments.of(np.array(values[first:last])))
        first = last
    whole = Moments.of(np.array(values))
    mean, std, kurtosis = moments(values)
    for found in (merged, whole, Moments.of(np.array([])).merged(whole), whole.merged(Moments.of(np.array([])))):
        assert found.n == 500
        assert found.mean == pytest.approx(mean, rel=1e-12)
        assert math.sqrt(found.m2 / found.n) == pytest.approx(std, rel=1e-9)
        assert found.n * found.m4 / found.m2**2 - 3 == pytest.approx(kurtosis, rel=1e-8)


def test_counts_stand_for_repeated_values() -> None:
    values, counts = np.array([-1.0, 0.0, 1e-9, 7e4, np.nan], np.float32), np.array([3, 2, 5, 1, 4])
    by_count, repeated = Part.of(values, counts), Part.of(np.repeat(values, counts))
    assert vars(by_count) | {"moments": None} == vars(repeated) | {"moments": None}
    for name, value in vars(by_count.moments).items():
        assert value == pytest.approx(getattr(repeated.moments, name), rel=1e-12)


def test_tensors_without_weights_or_without_finite_ones(tmp_path: Path) -> None:
    made = {
        "empty": np.zeros((0, 3), np.float32),
        "empty-half": np.zeros((0,), np.float16),
        "nan": np.full((2, 3), np.nan, np.float32),
        "scalar": np.array(2.0, np.float32),
    }
    found = {tensor.name: tensor for tensor in measure_statistics(stored(tmp_path / "x", made)).tensors}
    for name in ("empty", "empty-half", "nan"):
        tensor = found[name]
        assert (tensor.largest, tensor.mean, tensor.std, tensor.kurtosis) == (None, None, None, None)
        assert tensor.share(tensor.part.n_zero) == 0
    assert found["nan"].part.n_nan == 6
    assert (found["scalar"].mean, found["scalar"].shape) == (2.0, ())


def test_integers_are_left_out_with_a_reason(tmp_path: Path) -> None:
    made = {"a.qweight": np.ones((4, 4), np.int8), "a.bias": np.ones(4, np.float32)}
    result = measure_statistics(stored(tmp_path / "x", made))
    assert [tensor.name for tensor in result.tensors] == ["a.bias"]
    assert [(tensor.name, tensor.dtype) for tensor in result.skipped] == [("a.qweight", "I8")]
    assert "integers" in result.skipped[0].reason


# GGUF


def write_gguf(path: Path, tensors: dict[str, tuple[QType, np.ndarray]]) -> Path:
    """A file without keys. `tensors`: type, and values, or the bytes of a quantized tensor's rows."""
    shapes = {
        name: (*array.shape[:-1], array.shape[-1] // gguf.GGML_QUANT_SIZES[qtype][1] * gguf.GGML_QUANT_SIZES[qtype][0])
        if array.dtype == np.uint8
        else array.shape
        for name, (qtype, array) in tensors.items()
    }
    layout = lay_out([], [(name, shapes[name], qtype) for name, (qtype, _) in tensors.items()])
    data = bytearray(layout.total_bytes)
    data[: len(layout.header)] = layout.header
    for slot in layout.slots:
        raw = tensors[slot.name][1].tobytes()
        data[slot.offset : slot.offset + len(raw)] = raw
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("qtype", [QType.Q8_0, QType.Q4_K, QType.IQ4_XS, QType.Q5_1])
def test_quantized_tensors_are_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qtype: QType) -> None:
    monkeypatch.setattr(statistics, "FLOAT_WEIGHTS", 512)
    rows = np.random.default_rng(1).standard_normal((5, 768), np.float32) * np.float32(0.02)
    blocks = gguf3n.quantize(rows, qtype)
    (found,) = measure_statistics(write_gguf(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": (qtype, blocks)})).tensors
    assert (found.dtype, found.shape) == (qtype.name, (5, 768))
    check(found, gguf.quants.dequantize(blocks, qtype))


def test_a_gguf_file_and_its_checkpoint_say_the_same(tmp_path: Path) -> None:
    source = micro.make(tmp_path / "source")
    gguf3n.convert(source, "BF16", tmp_path / "x.gguf")
    by_source = {short_name(tensor.name): tensor for tensor in measure_statistics(source).tensors}
    by_gguf = {tensor.name: tensor for tensor in measure_statistics(tmp_path / "x.gguf").tensors}
    assert [place(name).label for name in by_gguf] == sorted(
        (place(name).label for name in by_gguf), key=lambda label: (label != "embedding", label == "output", label)
    )
    a, b = by_source["layers.1.mlp.gate_proj"], by_gguf["blk.1.ffn_gate.weight"]
    assert (a.part, a.place, a.kind) == (b.part, b.place, b.kind)


def test_types_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    tensors = {
        "a": (QType.F64, np.ones(4)),
        "b": (QType.I32, np.ones(4, np.int32)),
        "c": (QType.F32, np.ones(4, np.float32)),
    }
    result = measure_statistics(write_gguf(tmp_path / "x.gguf", tensors))
    assert [tensor.name for tensor in result.tensors] == ["c"]
    assert {tensor.name: tensor.reason for tensor in result.skipped} == {
        "a": "neither BF16, F16 nor F32",
        "b": "integers: packed weights, or indices",
    }


def test_scales_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    blocks = gguf3n.quantize(np.ones((2, 64), np.float32), "Q8_0")
    blocks[1, :2] = 0x00, 0x7E  # a float16 NaN
    (found,) = measure_statistics(write_gguf(tmp_path / "x.gguf", {"a": (QType.Q8_0, blocks)})).tensors
    assert found.part.n_nan == 32
    assert found.mean == pytest.approx(1, abs=1e-3)


# sources


def test_sources_that_cannot_be_measured(tmp_path: Path) -> None:
    for source in ("https://example.org/x.gguf", "someone/some-model:Q4_K_M"):
        with pytest.raises(UsageError, match="every weight"):
            measure_statistics(source)
    with pytest.raises(UsageError, match="--revision"):
        measure_statistics(tmp_path, revision="main")
    with pytest.raises(SourceError):
        measure_statistics(tmp_path)
    with pytest.raises(GGUFError, match=r"missing\.gguf: no such file"):
        measure_statistics(tmp_path / "missing.gguf")
    big = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(big, "gemma3n", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match="big-endian"):
        measure_statistics(big)


def test_a_file_that_shrinks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = stored(tmp_path / "x", {"a": np.ones((1000, 10), np.float32)})
    table = checkpoint.read_tensor_table(directory)

    def late(_: Path) -> Any:
        (directory / "model.safetensors").write_bytes(b"")
        return table

    monkeypatch.setattr(training_folder, "read_tensor_table", late)
    with pytest.raises(SourceError, match="became shorter") as raised:
        measure_statistics(directory)
    assert not isinstance(raised.value, CheckpointError) or raised.value.exit_code == 5


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[Progress] = []
    directory = stored(tmp_path / "x", {"a": np.ones((300, 10), np.float32), "b": np.ones(7, np.float16)})
    measure_statistics(directory, progress=seen.append)
    assert (seen[-1].done, seen[-1].total) == (12_014, 12_014)
    assert {(state.stage, state.unit, state.total) for state in seen} == {("reading tensors", "bytes", 12_014)}


def test_a_source_that_is_open(tmp_path: Path) -> None:
    directory = stored(tmp_path / "x", {"a": np.ones((300, 10), np.float32)})
    assert measure_statistics(open_source(directory)) == measure_statistics(directory)


def test_rows_of_other_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice, and rows that no file has, of which nothing is read: as the same values in a file."""
    monkeypatch.setattr(statistics, "FLOAT_WEIGHTS", 64)
    monkeypatch.setattr(statistics, "HISTOGRAM_WEIGHTS", 64)
    rng = np.random.default_rng(0)
    matrix, conv = rng.standard_normal((30, 20), np.float32), rng.standard_normal((6, 4, 3, 5), np.float32)
    opened = open_source(stored(tmp_path / "x", {"a": matrix, CONV: conv}))
    (rows,), (filters,) = (opened.tensors[name].rows for name in ("a", CONV))
    tensors = {
        "a": SourceTensor("a", (12, 12), (View(rows, range(3, 13), (range(15, 20), range(7))), Zeros(2, 12))),
        CONV: SourceTensor(CONV, (4, 4, 3, 5), (View(filters, range(24, 72), (range(5),)),)),
    }
    found = measure_statistics(dataclasses.replace(opened, tensors=tensors))
    cut = np.zeros((12, 12), np.float32)
    cut[:10] = np.hstack([matrix[3:13, 15:], matrix[3:13, :7]])
    expected = measure_statistics(stored(tmp_path / "y", {"a": cut, CONV: conv[2:]}))
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in expected.tensors]
    for one, two in zip(found.tensors, expected.tensors, strict=True):
        assert (one.shape, one.dtype, one.kind) == (two.shape, two.dtype, two.kind)
        assert one.part.largest_sum == pytest.approx(two.part.largest_sum)
        for name in ("minimum", "maximum", "n_zero", "f16_zero", "f16_subnormal", "f16_overflow"):
            assert getattr(one.part, name) == getattr(two.part, name), name
        assert one.part.moments.n == two.part.moments.n
        assert one.part.moments.mean == pytest.approx(two.part.moments.mean)


def test_tensors_of_no_weights(tmp_path: Path) -> None:
    made = {"a": np.empty((0, 4), np.float32), CONV: np.empty((0, 4, 3, 3), np.float32), "b": np.empty(0, np.float16)}
    assert len(measure_statistics(stored(tmp_path / "x", made)).tensors) == 3


# the network


def inventory(size: str) -> dict[str, tuple[int, ...]]:
    return checkpoints.read_inventory(checkpoints.INVENTORIES / f"gemma-3n-{size}.json")


@pytest.mark.parametrize("size", ["e2b", "e4b"])
@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_every_tensor_has_its_place(size: str, layout: str) -> None:
    """The same in all layouts; the section that the name says."""
    for name in inventory(size):
        found = place(checkpoints.rename(name, layout))
        assert found == place(name)
        wanted = Section.VISION if "vision" in name else Section.AUDIO if "audio" in name else Section.TEXT
        assert found.section is wanted
        assert found.stage not in ("tower", "output") or wanted is Section.TEXT, name
        assert found.numbers == tuple(int(part) for part in name.split(".") if part.isdecimal())[: len(found.numbers)]
        assert bool(found.numbers) == any(mark in name for mark in (".layers.", ".blocks.", ".conformer."))


def test_the_order_of_the_network() -> None:
    places = sorted({place(name).rank: place(name).label for name in inventory("e2b")}.items())
    labels = [label for _, label in places]
    assert labels[:3] == ["stem", "block 0.0", "block 0.1"]
    assert labels.index("block 2.9") + 1 == labels.index("block 2.10")
    assert labels.index("block 3.38") + 1 == labels.index("fusion")
    assert labels.index("subsampling") + 1 == labels.index("conformer 0")
    assert labels[-3:] == ["layer 28", "layer 29", "output"]
    assert labels.index("embedding") + 1 == labels.index("layer 0")


MMPROJ = {
    "v.conv_stem.conv.weight": ("stem", (64, 3, 3, 3), Kind.CONVOLUTION),
    "v.conv_stem.conv.bias": ("stem", (1, 64, 1, 1), Kind.VECTOR),
    "v.blk.2.21.attn.key.down_conv.weight": ("block 2.21", (640, 1, 3, 3), Kind.CONVOLUTION),
    "v.blk.2.21.layer_scale.gamma": ("block 2.21", (1, 640, 1, 1), Kind.VECTOR),
    "v.msfa.ffn.pw_proj.conv.weight": ("fusion", (2048, 3840, 1, 1), Kind.CONVOLUTION),
    "mm.input_projection.weight": ("embedder", (2048, 2048), Kind.MATRIX),
    "a.conv1d.0.weight": ("subsampling", (128, 1, 3, 3), Kind.CONVOLUTION),
    "a.blk.3.conv_dw.weight": ("conformer 3", (1536, 1, 5), Kind.CONVOLUTION),
    "a.blk.3.ffn_up.weight": ("conformer 3", (6144, 1536), Kind.MATRIX),
    "mm.a.input_projection.weight": ("embedder", (2048, 1536), Kind.MATRIX),
    "blk.7.attn_q.weight": ("layer 7", (2048, 2048), Kind.MATRIX),
    "altup_proj.weight": ("embedding", (3, 2048, 2048), Kind.MATRIX),
    "per_layer_token_embd.weight": ("embedding", (262144, 7680), Kind.MATRIX),
    "output_norm.weight": ("output", (2048,), Kind.VECTOR),
}


@pytest.mark.parametrize("name", MMPROJ)
def test_names_of_gguf_files(name: str) -> None:
    label, shape, wanted = MMPROJ[name]
    assert (place(name).label, kind(name, shape)) == (label, wanted)
    section = {"v": Section.VISION, "a": Section.AUDIO}.get(name.split(".")[0], Section.TEXT)
    if name.startswith("mm."):
        section = Section.AUDIO if name.startswith("mm.a.") else Section.VISION
    assert place(name).section is section


def test_convolutions_are_those_of_the_towers() -> None:
    shapes = inventory("e2b")
    found = {name for name, shape in shapes.items() if kind(name, shape) is Kind.CONVOLUTION}
    assert found == {name for name, shape in shapes.items() if len(shape) >= 3}
    assert len(found) == 296
    assert not any("language_model" in name for name in found)


# float16


def convolution(out: int = 6, within: int = 4, size: int = 3) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((out, within, size, size)).astype(np.float32)


CONV = "model.vision_tower.timm_model.blocks.0.0.conv_exp.weight"


def test_a_sum_can_overflow_from_the_activation_on_that_is_said(tmp_path: Path) -> None:
    weights = convolution()
    (risk,) = f16_risks(measure_statistics(stored(tmp_path / "x", {CONV: weights})))
    exact = weights.astype(np.float64)
    worst_channel = exact[np.abs(exact).sum(axis=(1, 2, 3)).argmax()]
    worst_input = np.sign(worst_channel) * risk.activation
    assert (worst_channel * worst_input).sum() == pytest.approx(F16_MAX)
    rng = np.random.default_rng(0)
    for _ in range(50):
        activations = rng.uniform(-1, 1, worst_channel.shape) * risk.activation
        assert np.abs((exact * activations).sum(axis=(1, 2, 3))).max() < F16_MAX


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_sum_is_of_whole_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Chunks of one channel, and of several that do not divide the tensor; NaN left out."""
    narrow, wide = DTYPES[dtype]
    array = narrow(convolution(out=7))
    specials = array.copy()
    specials[2, 0, 0, 0] = narrow(np.array([np.nan], np.float32))[0]
    for n_weights in (1, 100, 1 << 16):
        monkeypatch.setattr(statistics, "FLOAT_WEIGHTS", n_weights)
        monkeypatch.setattr(statistics, "HISTOGRAM_WEIGHTS", n_weights)
        path = stored(tmp_path / f"x{n_weights}", {CONV: array, CONV.replace("0.0", "0.1"): specials})
        found = {tensor.name: tensor.part.largest_sum for tensor in measure_statistics(path).tensors}
        sums = [sum(abs(float(w)) for w in channel.reshape(-1)) for channel in wide(array)]
        assert found[CONV] == pytest.approx(max(sums), rel=1e-12)
        sums[2] -= abs(float(wide(array)[2, 0, 0, 0]))
        assert found[CONV.replace("0.0", "0.1")] == pytest.approx(max(sums), rel=1e-12)


def test_the_first_to_overflow_comes_first(tmp_path: Path) -> None:
    names = [CONV.replace("0.0", f"0.{i}") for i in range(3)]
    made = dict(zip(names, (convolution(), convolution() * 9, convolution() * 0), strict=True))
    matrix = {"model.vision_tower.timm_model.blocks.0.0.x.weight": np.ones((3, 3), np.float32)}
    risks = f16_risks(measure_statistics(stored(tmp_path / "x", made | matrix)))
    assert [risk.tensor.name for risk in risks] == [names[1], names[0], names[2]]
    assert risks[2].activation == math.inf


def test_the_default_is_above_what_ordinary_convolutions_need() -> None:
    """Weights that keep the size of their input are not listed, at the longest sums of the vision tower."""
    longest = max(math.prod(shape[1:]) for name, shape in inventory("e4b").items() if "vision_tower" in name)
    weights = np.random.default_rng(0).standard_normal((2048, longest)) / math.sqrt(longest)
    assert np.abs(weights).sum(axis=1).max() * statistics.ACTIVATION_MAX < F16_MAX


# the command


@pytest.fixture(scope="module")
def multimodal(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(multimodal=True)


@pytest.fixture(scope="module")
def measured(multimodal: Path) -> Iterator[Statistics]:
    return measure_statistics(multimodal)


@pytest.fixture
def stats(run: Run) -> Run:
    """`stats(path, "--json")`: what `gguf3n stats` says."""
    return partial(run, "stats", "--quiet")


TENSOR_KEYS = {
    "name", "section", "place", "kind", "type", "shape", "n_weights", "max_magnitude", "mean", "std",
    "excess_kurtosis", "zeros", "nan", "infinite", "f16_overflow", "f16_zero", "f16_subnormal",
}  # fmt: skip


def test_json(stats: Run, multimodal: Path, measured: Statistics) -> None:
    code, out, _ = stats(multimodal, "--json")
    result = json.loads(out)
    assert code == 0 and result["schema"] == "gguf3n.stats/1"
    assert [tensor["name"] for tensor in result["tensors"]] == [tensor.name for tensor in measured.tensors]
    assert set(result["tensors"][0]) == TENSOR_KEYS
    assert {tensor["section"] for tensor in result["tensors"]} == {"vision", "audio", "text"}
    assert len(result["f16_risk"]) == sum(tensor["kind"] == "convolution" for tensor in result["tensors"]) > 20
    thresholds = [risk["overflows_at"] for risk in result["f16_risk"]]
    assert thresholds == sorted(thresholds) and not any(risk["listed"] for risk in result["f16_risk"])


@pytest.mark.parametrize("sort", ["max", "std", "kurtosis", "zeros", "name"])
def test_the_table_is_sorted(stats: Run, multimodal: Path, measured: Statistics, sort: str) -> None:
    code, out, _ = stats(multimodal, "--sort", sort)
    assert code == 0 and plain(out)
    keys: dict[str, Callable[[TensorStatistics], float]] = {
        "max": lambda tensor: tensor.largest or 0,
        "std": lambda tensor: tensor.std or 0,
        "kurtosis": lambda tensor: -math.inf if tensor.kurtosis is None else tensor.kurtosis,
        "zeros": lambda tensor: tensor.part.n_zero / tensor.n_weights,
    }
    wanted = measured.tensors if sort == "name" else sorted(measured.tensors, key=keys[sort], reverse=True)
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("tensor "))
    shown = [line.split()[0] for line in lines[first + 1 : first + 21]]
    for name, tensor in zip(shown, wanted, strict=False):
        head, _, tail = name.partition("…")
        assert short_name(tensor.name).startswith(head) and short_name(tensor.name).endswith(tail)


def test_all_tensors_and_a_wide_line(stats: Run, multimodal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out, _ = stats(multimodal, "--all", "--sort", "name")
    assert plain(out) and len(out.splitlines()) > 659
    monkeypatch.setattr("gguf3n.cli.stats.line_width", lambda: 150)
    _, out, _ = stats(multimodal, "--all")
    assert "64 x 16 x 3 x 3" in out and "BF16" in out and "…" not in out


def test_f16_risk(stats: Run, multimodal: Path, measured: Statistics, tmp_path: Path) -> None:
    risks = f16_risks(measured)
    code, out, _ = stats(multimodal, "--f16-risk")
    assert code == 0 and plain(out) and f"0 of {len(risks)} convolutions" in out and "overflows at" not in out
    code, out, _ = stats(multimodal, "--f16-risk", "--activation-max", risks[3].activation)
    assert code == 0 and plain(out) and f"3 of {len(risks)} convolutions" in out
    assert short_name(risks[0].tensor.name) in out and f"{risks[0].activation:,.0f}" in out
    code, out, _ = stats(multimodal, "--f16-risk", "--activation-max", 1e30)
    assert code == 0 and plain(out) and f"20 of {len(risks)}; --all" in out
    text = stored(tmp_path / "text", {"model.layers.0.mlp.up_proj.weight": np.ones((2, 2), np.float32)})
    assert "no convolutions: text has none" in stats(text, "--f16-risk")[1]
    assert stats(multimodal, "--f16-risk", "--activation-max", "-1")[0] == 2


def test_what_is_broken_is_said(stats: Run, tmp_path: Path) -> None:
    made = {"a.weight": np.array([np.nan, np.inf, 1, 7e4], np.float32), "a.qweight": np.ones(3, np.int8)}
    code, out, _ = stats(stored(tmp_path / "x", made))
    assert code == 0 and plain(out)
    assert "1 NaN, 1 infinite" in out and "1 weights overflow" in out and "1 inf" in out
    assert "1 tensors were not read" in out and "a.qweight (I8): integers" in out
    (tensor,) = json.loads(stats(tmp_path / "x", "--json")[1])["tensors"]
    assert (tensor["nan"], tensor["infinite"], tensor["f16_overflow"], tensor["max_magnitude"]) == (1, 1, 1, 7e4)


def test_options_that_cannot_be_used(stats: Run, multimodal: Path, tmp_path: Path) -> None:
    assert stats(multimodal, "--against", multimodal)[0] == 2
    assert stats(multimodal, "--plot", tmp_path / "x.pdf")[0] == 2
    (tmp_path / "x.svg").write_text("")
    assert stats(multimodal, "--plot", tmp_path / "x.svg")[0] == 10
    assert stats("someone/some-model:Q4_K_M")[0] == 2


def test_no_type_is_cut_off(stats: Run, tmp_path: Path) -> None:
    gguf3n.convert(micro.make(tmp_path / "source"), "Q4_K_M", tmp_path / "x.gguf")
    code, out, _ = stats(tmp_path / "x.gguf")
    types = Counter(tensor.qtype.name for tensor in open_gguf(tmp_path / "x.gguf").tensors.values())
    shown = " ".join(out.split("in float16")[0].split())
    assert code == 0 and plain(out) and all(f"{n} {name}" in shown for name, n in types.items())


def test_plot(stats: Run, multimodal: Path, measured: Statistics, tmp_path: Path) -> None:
    code, *_ = stats(multimodal, "--plot", tmp_path / "x.svg")
    svg = (tmp_path / "x.svg").read_text("utf-8")
    n = sum(tensor.kind is Kind.CONVOLUTION for tensor in measured.tensors)
    assert code == 0 and f"convolutions ({n})" in svg


def test_against_the_source(stats: Run, tmp_path: Path) -> None:
    source = micro.make(tmp_path / "source")
    gguf3n.convert(source, "Q8_0", tmp_path / "x.gguf")
    code, out, _ = stats(tmp_path / "x.gguf", "--against", source, "--plot", tmp_path / "x.svg", "--json")
    tensors = {tensor["name"]: tensor for tensor in json.loads(out)["tensors"]}
    assert code == 0 and set(tensors) == set(open_gguf(tmp_path / "x.gguf").tensors)
    assert tensors["blk.0.attn_q.weight"]["rms_error"] == pytest.approx(0.005, rel=0.2)
    assert tensors["blk.0.attn_norm.weight"]["rms_error"] == 0
    assert "relative RMS error" in (tmp_path / "x.svg").read_text("utf-8")
    code, out, _ = stats(tmp_path / "x.gguf", "--against", source)
    assert code == 0 and plain(out) and "tensor, worst first" in out
