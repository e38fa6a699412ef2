"""Rows of every form against plain NumPy: values, whatever is read together; what is said where they can't be read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from numpy.typing import NDArray

from gguf3n.errors import CheckpointError, GGUFError
from gguf3n.formats import rows as module
from gguf3n.formats.byte_source import ByteSource
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.rows import (
    CHUNK_WEIGHTS,
    DTYPE_BYTES,
    FLOAT_DTYPES,
    ROW_GROUP,
    WITH_NUMPY,
    Chunk,
    LowRank,
    OfLength,
    Padded,
    Repeated,
    RowReader,
    Rows,
    Scaled,
    SideBySide,
    SourceTensor,
    Stored,
    Transposed,
    Values,
    View,
    Zeros,
    chunks,
    cut,
    dequantize_into,
    largest_magnitude,
    some_columns,
    some_rows,
    stored_tensors,
    widen_with_numpy,
)
from gguf3n.pipeline import compiled_arithmetic

N_ROWS, N_PER_ROW = 40, 64


@dataclass(frozen=True)
class Memory:
    """A file in memory, which counts what is read of it."""

    data: bytes
    name: str = "memory.safetensors"
    reads: list[tuple[int, int]] = field(default_factory=list, compare=False)

    @property
    def n_bytes(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, n: int) -> bytes:
        self.reads.append((offset, n))
        return self.data[offset : offset + n]

    def sibling(self, name: str) -> ByteSource:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is held."""


def raw_bytes(values: NDArray[np.float32], dtype: str) -> tuple[bytes, NDArray[np.float32]]:
    """Values in a dtype, and what they are then."""
    match dtype:
        case "F32":
            return values.tobytes(), values
        case "F16":
            return values.astype("<f2").tobytes(), values.astype("<f2").astype(np.float32)
        case "BF16":
            bits = (values.view(np.uint32) >> 16).astype("<u2")
            return bits.tobytes(), (bits.astype(np.uint32) << 16).view(np.float32)
        case _:
            blocks = gguf.quants.quantize(values, QType[dtype])
            return blocks.tobytes(), gguf.quants.dequantize(blocks, QType[dtype])


def store(
    directory: Path, dtype: str, shape: tuple[int, ...] = (N_ROWS, N_PER_ROW), seed: int = 0
) -> tuple[Stored, NDArray[np.float32]]:
    """A tensor somewhere in a file, and its values as rows."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32).reshape(-1, shape[-1])
    data, values = raw_bytes(values, dtype)
    path = directory / f"{dtype}-{seed}"
    path.write_bytes(b"head." + data + b"tail")
    return Stored(f"{dtype}.weight", dtype, shape, path, 5), values


@pytest.fixture(params=["numpy", "compiled"])
def reader(request: pytest.FixtureRequest) -> Iterator[RowReader]:
    with closing(RowReader(compiled_arithmetic() if request.param == "compiled" else None)) as reader:
        yield reader


def read(rows: Rows, reader: RowReader, n: int | None = None) -> tuple[NDArray[np.float32], float]:
    """All rows, some at a time, and the largest magnitude."""
    out = np.full((rows.n_rows, rows.n_per_row), 7, np.float32)
    largest = [
        reader.fill(rows, first, out[first : first + (n or rows.n_rows)]) for first in range(0, rows.n_rows, n or 10**9)
    ]
    return out, float(max(largest))


Made = tuple[Rows, NDArray[np.float32]]
FORMS: dict[str, Callable[[Path], Made]] = {}


def form(make: Callable[[Path], Made]) -> Callable[[Path], Made]:
    FORMS[make.__name__.replace("_", " ")] = make
    return make


for _dtype in (*FLOAT_DTYPES, "Q8_0", "Q4_0"):
    FORMS[f"stored {_dtype}"] = lambda directory, dtype=_dtype: store(directory, dtype)  # type: ignore[misc]


@form
def stored_in_three_dimensions(directory: Path) -> Made:
    return store(directory, "BF16", (2, 3, 5, 32))


@form
def a_vector(directory: Path) -> Made:
    return store(directory, "F16", (96,))


@form
def a_scalar(directory: Path) -> Made:
    (directory / "scalar").write_bytes(np.float32(2.5).tobytes())
    return Stored("scale", "F32", (), directory / "scalar", 0), np.full((1, 1), 2.5, np.float32)


@form
def rows_of_another_length(directory: Path) -> Made:
    stored, values = store(directory, "Q8_0")
    return stored.in_rows_of(32), values.reshape(-1, 32)


@form
def zeros(_: Path) -> Made:
    return Zeros(9, 33), np.zeros((9, 33), np.float32)


@form
def a_view_of_rows(directory: Path) -> Made:
    stored, values = store(directory, "BF16")
    return View(stored, range(7, 30), (range(N_PER_ROW),)), values[7:30]


@form
def a_view_of_runs_of_columns(directory: Path) -> Made:
    """In another order, and one of them twice."""
    stored, values = store(directory, "F16")
    runs = (range(40, 64), range(3, 4), range(10), range(3, 4))
    return View(stored, range(1, 40), runs), values[1:, [column for run in runs for column in run]]


@form
def a_view_of_a_quantized_tensor(directory: Path) -> Made:
    """Columns in the middle of a block."""
    stored, values = store(directory, "Q4_0")
    return View(stored, range(5, 9), (range(20, 50), range(1))), values[5:9, [*range(20, 50), 0]]


@form
def one_row_repeated(directory: Path) -> Made:
    stored, values = store(directory, "BF16")
    return Repeated(stored, 3, 21), np.repeat(values[3:4], 21, axis=0)


@form
def stored_rows_cut_out(directory: Path) -> Made:
    stored, values = store(directory, "Q8_0")
    return cut(stored, range(11, 16)), values[11:16]


@form
def rows_of_a_view_cut_out(directory: Path) -> Made:
    stored, values = store(directory, "F16")
    return cut(View(stored, range(4, 30), (range(8),)), range(6, 15)), values[10:19, :8]


@form
def a_view_of_a_view(directory: Path) -> Made:
    stored, values = store(directory, "F32")
    inner = View(stored, range(10, 30), (range(32, 64), range(32)))
    columns = [*range(30, 40), *range(4)]
    return View(inner, range(3, 20), (range(30, 40), range(4))), np.hstack([values[:, 32:], values[:, :32]])[
        10:30, columns
    ][3:20]


@form
def padded(directory: Path) -> Made:
    stored, values = store(directory, "BF16")
    return Padded(stored, 100), np.hstack([values, np.zeros((N_ROWS, 36), np.float32)])


@form
def a_padded_view(directory: Path) -> Made:
    rows, values = a_view_of_runs_of_columns(directory)
    return Padded(rows, 40), np.hstack([values, np.zeros((len(values), 4), np.float32)])


def low_rank(base: Rows, values: NDArray[np.float32], directory: Path, dtype: str, scale: float) -> Made:
    """The sum in float64, rank by rank, rounded once."""
    a, a_values = store(directory, dtype, (3, base.n_per_row), seed=1)
    b, b_values = store(directory, dtype, (base.n_rows, 3), seed=2)
    added = np.zeros(values.shape)
    for k in range(3):
        added += b_values[:, k, None].astype(np.float64) * a_values[k].astype(np.float64)
    return LowRank(base, a, b, scale), (values + scale * added).astype(np.float32)


for _dtype in FLOAT_DTYPES:

    def _low_rank(directory: Path, dtype: str = _dtype) -> Made:
        return low_rank(*store(directory, "BF16"), directory, dtype, 0.375)

    FORMS[f"low rank, factors in {_dtype}"] = _low_rank


@form
def low_rank_of_a_quantized_tensor(directory: Path) -> Made:
    return low_rank(*store(directory, "Q8_0"), directory, "F32", -2.0)


@form
def low_rank_of_a_view(directory: Path) -> Made:
    return low_rank(*a_view_of_runs_of_columns(directory), directory, "F16", 1.0)


@form
def a_view_of_low_rank(directory: Path) -> Made:
    rows, values = low_rank(*store(directory, "F32"), directory, "BF16", 0.5)
    return View(rows, range(11, 33), (range(60, 64), range(5))), values[11:33, [*range(60, 64), *range(5)]]


@form
def transposed(directory: Path) -> Made:
    stored, values = store(directory, "BF16")
    return Transposed(stored), np.ascontiguousarray(values.T)


@form
def low_rank_of_transposed_factors(directory: Path) -> Made:
    """As of an embedding."""
    base, values = store(directory, "BF16")
    a, a_values = store(directory, "F32", (64, 3), seed=1)
    b, b_values = store(directory, "F16", (3, 40), seed=2)
    added = np.zeros(values.shape)
    for k in range(3):
        added += b_values[k, :, None].astype(np.float64) * a_values[:, k].astype(np.float64)
    return LowRank(base, Transposed(a), Transposed(b), 0.3), (values + 0.3 * added).astype(np.float32)


def of_length(base: Rows, values: NDArray[np.float32], directory: Path) -> Made:
    """Squares added one by one."""
    lengths, length_values = store(directory, "F32", (base.n_rows,), seed=3)
    made = np.empty_like(values)
    for row, length, out in zip(values.astype(np.float64), length_values.astype(np.float64).flat, made, strict=True):
        total = 0.0
        for value in row:
            total += value * value
        out[:] = row * (length / np.sqrt(total))
    return OfLength(base, lengths), made


@form
def rows_of_a_length(directory: Path) -> Made:
    return of_length(*store(directory, "BF16"), directory)


@form
def low_rank_of_a_length(directory: Path) -> Made:
    """As of DoRA."""
    return of_length(*low_rank(*store(directory, "BF16"), directory, "F32", 1.5), directory)


@form
def scaled(directory: Path) -> Made:
    base, values = store(directory, "F32")
    return Scaled(base, np.sqrt(5)), (np.float64(values) * np.sqrt(5)).astype(np.float32)


@form
def low_rank_of_low_rank(directory: Path) -> Made:
    (directory / "more").mkdir()
    inner = low_rank(*store(directory, "F32"), directory, "BF16", 0.5)
    return low_rank(*inner, directory / "more", "F32", 0.25)


@form
def side_by_side(directory: Path) -> Made:
    """Columns of several files, in several dtypes, one of them a view."""
    left, left_values = store(directory, "BF16", (40, 32), seed=1)
    right, right_values = store(directory, "F32", (40, 3), seed=2)
    view, view_values = View(left, range(40), (range(2, 9),)), left_values[:, 2:9]
    return SideBySide((left, right, view)), np.hstack([left_values, right_values, view_values])


@form
def side_by_side_in_one_row(directory: Path) -> Made:
    parts = [store(directory, "F16", (n,), seed=n) for n in (1, 31, 7)]
    return SideBySide(tuple(rows for rows, _ in parts)), np.hstack([values.reshape(1, -1) for _, values in parts])


every_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


@every_form
@pytest.mark.parametrize("n", [None, 1, 7, 16])
def test_values_whatever_is_read_together(
    make: Callable[[Path], Made], n: int | None, tmp_path: Path, reader: RowReader
) -> None:
    rows, expected = make(tmp_path)
    assert (rows.n_rows, rows.n_per_row) == expected.shape
    found, largest = read(rows, reader, n)
    assert found.tobytes() == expected.tobytes() or np.array_equal(found, expected)
    assert largest == np.abs(expected).max(initial=0)


@every_form
def test_a_form_is_a_value(make: Callable[[Path], Made], tmp_path: Path) -> None:
    """Made again it is the same key; it holds no data, so the file needs not be there."""
    rows, _ = make(tmp_path)
    for path in tmp_path.glob("more"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    again, _ = make(tmp_path)
    assert again == rows and hash(again) == hash(rows)
    assert {rows: 1}[again] == 1


def test_forms_that_differ_are_other_keys(tmp_path: Path) -> None:
    stored, _ = store(tmp_path, "F32")
    a, b = store(tmp_path, "F32", (3, 64), seed=1)[0], store(tmp_path, "F32", (40, 3), seed=2)[0]
    view, merged = View(stored, range(4), (range(64),)), LowRank(stored, a, b, 1.0)
    forms: list[Rows] = [
        stored,
        replace(stored, offset=9),
        replace(stored, shape=(20, 128)),
        replace(stored, dtype="I32"),
        replace(stored, file=tmp_path / "other"),
        Zeros(40, 64),
        Zeros(64, 40),
        view,
        replace(view, rows=range(1, 5)),
        replace(view, columns=(range(32), range(32, 64))),
        replace(view, base=replace(stored, offset=9)),
        merged,
        replace(merged, scale=2.0),
        replace(merged, a=replace(a, offset=9)),
        Scaled(stored, 2.0),
        Scaled(stored, 3.0),
        View(merged, range(4), (range(64),)),
        replace(merged, base=View(stored, range(40), (range(64),))),
        SideBySide((stored,)),
        SideBySide((stored, Zeros(40, 64))),
        SideBySide((Zeros(40, 64), stored)),
        Padded(stored, 65),
        Padded(stored, 66),
        Padded(view, 65),
        cut(stored, range(1, 5)),
    ]
    assert len(set(forms)) == len(forms)


def test_what_is_known_of_the_forms(tmp_path: Path) -> None:
    stored, _ = store(tmp_path, "BF16")
    a, b = store(tmp_path, "F16", (3, 64), seed=1)[0], store(tmp_path, "F32", (40, 3), seed=2)[0]
    view, merged = View(stored, range(4, 14), (range(5),)), LowRank(stored, a, b, 1.0)
    where = f"{tmp_path / 'BF16-0'}: tensor 'BF16.weight'"
    assert [rows.stored_bytes for rows in (stored, Zeros(9, 9), view)] == [40 * 128, 0, 10 * 128]
    assert merged.stored_bytes == 40 * 128 + 3 * 128 + 40 * 12
    assert [rows.origin for rows in (stored, view)] == [where, where]
    assert merged.origin == f"{where} with {tmp_path / 'F16-1'}: tensor 'F16.weight'"
    assert [rows.dtypes for rows in (stored, Zeros(9, 9), view, merged)] == [{"BF16"}, set(), {"BF16"}, {"F32"}]
    beside = SideBySide((b, stored, Zeros(40, 2)))
    assert (beside.stored_bytes, beside.dtypes) == (40 * 12 + 40 * 128, {"F32", "BF16"})
    assert (beside.origin, beside.n_rows, beside.n_per_row) == (b.origin, 40, 3 + 64 + 2)
    scaled, padded, turned, long = Scaled(view, 2.0), Padded(view, 9), Transposed(a), OfLength(merged, b)
    assert (scaled.stored_bytes, scaled.origin, scaled.dtypes) == (10 * 128, where, {"F32"})
    assert (padded.stored_bytes, padded.origin, padded.dtypes) == (10 * 128, where, {"BF16"})
    assert [rows.stored for rows in (stored, view, padded, scaled, Repeated(view, 3, 9))] == [(stored,)] * 5
    assert (Zeros(9, 9).stored, turned.stored, beside.stored) == ((), (a,), (b, stored))
    assert (merged.stored, View(long, range(2), (range(9),)).stored) == ((stored, a, b), (stored, a, b, b))
    quantized, _ = store(tmp_path, "Q4_0")
    assert (quantized.row_bytes, quantized.stored_bytes) == (36, 40 * 36)
    assert (quantized.in_rows_of(32).row_bytes, quantized.in_rows_of(32).stored_bytes) == (18, 40 * 36)
    tensor = SourceTensor("x", (59, 64), (stored, Zeros(9, 64), view))
    assert (tensor.dtypes, tensor.origin, tensor.stored) == ({"BF16"}, where, (stored, stored))
    assert stored_tensors([stored, a]) == {
        "BF16.weight": SourceTensor("BF16.weight", (40, 64), (stored,)),
        "F16.weight": SourceTensor("F16.weight", (3, 64), (a,)),
    }
    assert set(FLOAT_DTYPES) <= set(DTYPE_BYTES)


def test_rows_that_are_cut_are_of_the_form_that_is_read_fastest(tmp_path: Path) -> None:
    stored, _ = store(tmp_path, "BF16")
    view = View(stored, range(4, 14), (range(5),))
    assert cut(stored, range(40)) is stored
    assert cut(stored, range(7, 9)) == replace(stored, shape=(2, 64), offset=5 + 7 * 128)
    assert cut(Zeros(9, 3), range(2, 4)) == Zeros(2, 3)
    assert cut(view, range(2, 4)) == View(view, range(2, 4), (range(5),))


def test_some_rows_and_columns_of_several_forms(tmp_path: Path, reader: RowReader) -> None:
    """Whatever range is taken of forms that stand one below the other; whole forms stay what they are."""
    forms = [store(tmp_path, "BF16"), zeros(tmp_path), low_rank(*store(tmp_path, "F32"), tmp_path, "F16", 1.0)]
    wide = (forms[0], (Zeros(9, N_PER_ROW), np.zeros((9, N_PER_ROW), np.float32)), forms[2])
    every, values = [form for form, _ in wide], np.vstack([value for _, value in wide])
    n = len(values)
    for wanted in (range(n), range(3, n - 3), range(39, 42), range(41, 47), range(50, 51), range(2)):
        taken = some_rows(every, wanted)
        found = np.vstack([read(form, reader)[0] for form in taken])
        assert np.array_equal(found, values[wanted.start : wanted.stop])
    assert some_rows(every, range(n)) == tuple(every)
    assert [type(form) for form in some_rows(every, range(39, 50))] == [Stored, Zeros, View]
    runs = (range(7, 9), range(60, 64))
    found = np.vstack([read(form, reader)[0] for form in some_columns(every, runs)])
    assert np.array_equal(found, values[:, [7, 8, 60, 61, 62, 63]])
    assert some_columns(every, (range(N_PER_ROW),)) == tuple(every)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_bytes_of_a_view_are_those_of_the_file(dtype: str, tmp_path: Path, reader: RowReader) -> None:
    stored, values = store(tmp_path, dtype)
    view = View(stored, range(5, 30), (range(3, 9), range(60, 64)))
    raw = reader.read_raw(view, 2, 4)
    assert raw is not None and raw.tobytes() == raw_bytes(np.hstack([values[7:11, 3:9], values[7:11, 60:64]]), dtype)[0]
    whole = reader.read_raw(stored, 0, N_ROWS)
    assert whole is not None and whole.tobytes() == raw_bytes(values, dtype)[0]
    for form in (
        Zeros(4, 4),
        Padded(stored, 70),
        View(view, range(2), (range(4),)),
        View(quantized(tmp_path), range(2), (range(4),)),
    ):
        assert reader.read_raw(form, 0, 2) is None


def quantized(directory: Path) -> Stored:
    return store(directory, "Q8_0")[0]


def test_the_compiled_values_are_those_of_numpy() -> None:
    """Every value of 16 bits."""
    widen = compiled_arithmetic().widen
    every = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    for dtype in ("BF16", "F16"):
        one, two = np.empty(1 << 16, np.float32), np.empty(1 << 16, np.float32)
        largest = widen_with_numpy(dtype, every, one), widen(dtype, every, two)
        assert np.array_equal(one, two, equal_nan=True)
        assert not np.isfinite(largest).any()


# largest magnitudes

SPECIAL = {
    "nothing": ([], 0.0),
    "zeros": ([0.0, -0.0], 0.0),
    "negative": ([1.0, -3.0, 2.0], 3.0),
    "infinite": ([1.0, float("inf")], float("inf")),
    "negative infinity": ([float("-inf"), 1.0], float("inf")),
    "nan": ([1.0, float("nan"), 2.0], float("nan")),
    "nan and infinite": ([float("inf"), float("nan")], float("nan")),
}


@pytest.mark.parametrize(("values", "expected"), SPECIAL.values(), ids=SPECIAL)
def test_the_largest_magnitude(values: list[float], expected: float) -> None:
    assert largest_magnitude(np.array(values, np.float32)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_not_finite_is_told_by_every_form(dtype: str, value: float, tmp_path: Path, reader: RowReader) -> None:
    """Only where it is taken."""
    values = np.ones((6, 32), np.float32)
    values[3, 7] = value
    (tmp_path / "x").write_bytes(raw_bytes(values, dtype)[0])
    (tmp_path / "a").write_bytes(np.ones((1, 32), np.float32).tobytes())
    stored, factor = Stored("x", dtype, (6, 32), tmp_path / "x", 0), Stored("a", "F32", (1, 32), tmp_path / "a", 0)
    column = Stored("b", "F32", (6, 1), tmp_path / "a", 0)
    forms = (
        stored,
        View(stored, range(6), (range(32),)),
        LowRank(stored, factor, column, 1.0),
        SideBySide((stored, Zeros(6, 2))),
        Scaled(stored, 0.5),
    )
    for rows in forms:
        assert np.isfinite(reader.fill(rows, 0, np.empty((3, rows.n_per_row), np.float32)))
        assert not np.isfinite(reader.fill(rows, 2, np.empty((2, rows.n_per_row), np.float32)))
    without = View(stored, range(6), (range(7), range(8, 32)))
    assert reader.fill(without, 0, np.empty((6, 31), np.float32)) == 1
    spoiled = LowRank(Zeros(6, 32), factor, replace(column, file=tmp_path / "x", dtype=dtype, shape=(6, 1)), value)
    assert not np.isfinite(reader.fill(spoiled, 0, np.empty((6, 32), np.float32)))


# errors


@pytest.mark.parametrize("error", [CheckpointError, GGUFError])
def test_what_cannot_be_read_is_named(error: type[CheckpointError] | type[GGUFError], tmp_path: Path) -> None:
    """File and tensor, in every form, with the error of its kind of file."""
    stored = replace(store(tmp_path, "F32")[0], error=error)
    a, b = store(tmp_path, "F32", (3, 64), seed=1)[0], store(tmp_path, "F32", (40, 3), seed=2)[0]
    with closing(RowReader()) as reader:
        for missing, said in ((stored, "F32-0"), (replace(stored, file=tmp_path / "gone"), "gone")):
            if missing is stored:
                (tmp_path / "F32-0").write_bytes(bytes(100))
            for rows in (
                missing,
                View(missing, range(9, 40), (range(1),)),
                LowRank(missing, a, b, 1.0),
                SideBySide((Zeros(40, 1), missing)),
            ):
                with pytest.raises(error) as caught:
                    reader.fill(rows, 5, np.empty((10, rows.n_per_row), np.float32))
                assert said in caught.value.what and "'F32.weight'" in caught.value.what
        whole = Zeros(40, 64)
        lost = replace(a, file=tmp_path / "gone", error=error)
        with pytest.raises(error, match=r"gone.*'F32\.weight'"):
            reader.fill(LowRank(whole, lost, b, 1.0), 0, np.empty((1, 64), np.float32))


def test_a_dtype_that_nobody_reads(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(64))
    with closing(RowReader()) as reader, pytest.raises(NotImplementedError, match="I64"):
        reader.fill(Stored("x", "I64", (2, 4), tmp_path / "x", 0), 0, np.empty((2, 4), np.float32))


# memory


def test_a_tensor_in_memory(reader: RowReader) -> None:
    """Only what is asked for is read, at its place."""
    values = np.random.default_rng(0).standard_normal((8, 32), np.float32)
    file: ByteSource = Memory(b"abc" + values.tobytes() + b"xyz")
    stored = Stored("x", "F32", (8, 32), file, 3)
    assert stored.file_name == "memory.safetensors"
    assert stored.origin == "memory.safetensors: tensor 'x'"
    found, largest = read(stored, reader)
    assert np.array_equal(found, values) and largest == np.abs(values).max()
    assert isinstance(file, Memory)
    file.reads.clear()
    view = View(stored, range(2, 7), (range(3),))
    out = np.empty((2, 3), np.float32)
    reader.fill(view, 1, out)
    assert np.array_equal(out, values[3:5, :3])
    assert file.reads == [(3 + 3 * 128, 2 * 128)]
    copied = np.empty((2, 128), np.uint8)
    reader.copy_stored(stored, 6, copied)
    assert copied.tobytes() == values[6:].tobytes()


def test_memory_that_is_too_short(reader: RowReader) -> None:
    stored = Stored("x", "F32", (8, 32), Memory(bytes(1000)), 0, GGUFError)
    with pytest.raises(GGUFError, match=r"memory\.safetensors: truncated in tensor 'x'"):
        read(stored, reader)


# chunks


@every_form
@pytest.mark.parametrize("chunk_weights", [1, 100, 1000, 1 << 20])
def test_chunks_make_up_the_whole(make: Callable[[Path], Made], chunk_weights: int, tmp_path: Path) -> None:
    rows, _ = make(tmp_path)
    cut = list(chunks(rows, chunk_weights))
    assert {chunk.rows for chunk in cut} == {rows}
    assert [chunk.first for chunk in cut] == np.cumsum([0, *(chunk.n_rows for chunk in cut)])[:-1].tolist()
    assert sum(chunk.n_rows for chunk in cut) == rows.n_rows
    assert sum(chunk.n_weights for chunk in cut) == rows.n_rows * rows.n_per_row
    assert sum(chunk.stored_bytes for chunk in cut) == rows.stored_bytes
    assert all(chunk.stored_bytes >= 0 for chunk in cut)
    for chunk in cut:
        assert chunk.n_rows == 1 or chunk.n_weights <= chunk_weights
    for chunk in cut[:-1]:
        assert chunk.n_rows < ROW_GROUP or not chunk.n_rows % ROW_GROUP


def test_no_rows_are_no_chunks() -> None:
    assert not list(chunks(Zeros(0, 8)))
    assert list(chunks(Zeros(2, 8))) == [Chunk(Zeros(2, 8), 0, 2)]


# threads


def test_one_reader_for_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a buffer of its own, and files and factors are shared, more factors than are kept too."""
    monkeypatch.setattr(module, "FACTORS_KEPT", 1)
    made = []
    for number, make in enumerate(FORMS.values()):
        (tmp_path / str(number)).mkdir()
        made.append(make(tmp_path / str(number)))
    start = threading.Barrier(6, timeout=60)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        start.wait()
        for _ in range(150):
            rows, expected = made[rng.integers(len(made))]
            first = int(rng.integers(rows.n_rows))
            out = np.empty((int(rng.integers(1, rows.n_rows - first + 1)), rows.n_per_row), np.float32)
            reader.fill(rows, first, out)
            assert np.array_equal(out, expected[first : first + len(out)])

    with closing(RowReader()) as reader, ThreadPoolExecutor(6) as pool:
        for worker in [pool.submit(work, seed) for seed in range(6)]:
            worker.result()


def test_a_buffer_is_the_threads_own(tmp_path: Path) -> None:
    stored, values = store(tmp_path, "F32")
    with closing(RowReader()) as reader, ThreadPoolExecutor(1) as pool:
        mine = reader.read_stored(stored, 0, 4)
        pool.submit(reader.read_stored, stored, 8, 4).result()
        assert mine.tobytes() == values[:4].tobytes()


def test_a_factor_is_read_once_for_all_chunks(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(40 * 64 * 4))
    base = Stored("x", "F32", (40, 64), tmp_path / "x", 0)
    a, b = Memory(np.ones((2, 64), np.float32).tobytes()), Memory(np.ones((40, 2), np.float32).tobytes())
    rows = LowRank(base, Stored("a", "F32", (2, 64), a, 0), Stored("b", "F32", (40, 2), b, 0), 1.0)
    with closing(RowReader()) as reader:
        found, _ = read(rows, reader, 8)
    assert (found == 2).all()
    assert a.reads == [(0, 512)]
    assert b.reads == [(first * 8, 64) for first in range(0, 40, 8)]


def test_another_arithmetic(tmp_path: Path) -> None:
    stored, _ = store(tmp_path, "BF16")

    def widen(dtype: str, raw: NDArray[np.uint8], out: Values) -> float:
        out[:] = len(raw)
        return 5.0

    with closing(RowReader(replace(WITH_NUMPY, widen=widen))) as reader:
        found, largest = read(stored, reader, 40)
    assert (found == 40 * 128).all() and largest == 5.0


@pytest.mark.parametrize("qtype", [QType.Q8_0, QType.Q4_K, QType.IQ2_XXS, QType.IQ4_NL])
def test_blocks_are_dequantized_some_at_a_time(qtype: QType) -> None:
    """Whatever their number, with the same values as all at once."""
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    for n_blocks in (1, CHUNK_WEIGHTS // block_weights, 2 * CHUNK_WEIGHTS // block_weights + 3):
        raw = np.random.default_rng(n_blocks).integers(0, 60, n_blocks * block_bytes, dtype=np.uint8)
        out = np.empty((1, n_blocks * block_weights), np.float32)
        dequantize_into(raw, qtype, out)
        assert out.tobytes() == gguf.quants.dequantize(raw, qtype).tobytes()
    with pytest.raises(NotImplementedError):
        dequantize_into(np.empty(0, np.uint8), QType.Q8_K, np.empty((0, 256), np.float32))
