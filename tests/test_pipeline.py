"""Running plans: the same bytes however the work is cut and dealt out, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf.quants
import numpy as np
import pytest

import gguf3n
from gguf3n import pipeline
from gguf3n.conversion import plan_all
from gguf3n.errors import CheckpointError, Gguf3nError, Interrupted, OutputError, QuantizationError, UsageError
from gguf3n.formats.gguf_layout import QType
from gguf3n.formats.imatrix import Entry, ImportanceMatrix
from gguf3n.formats.offset_files import OffsetFiles
from gguf3n.formats.rows import Chunk, LowRank, RowReader, Rows, Stored, View, Zeros, chunks
from gguf3n.gemma3n.part import Part, text_part
from gguf3n.pipeline import run
from gguf3n.planning import Plan
from gguf3n.progress import Progress
from gguf3n.recipes import find_recipe
from gguf3n.workers import default_threads
from tests import micro

QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
ROOT = "model.language_model."
SHARED = re.compile(r"layers\.2\.self_attn\.(k_proj|v_proj|k_norm)")


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """The checkpoint's tensors without the keys and values of its shared layer."""
    return {name: array for name, array in micro.tensors(micro.config()).items() if not SHARED.search(name)}


@pytest.fixture(scope="module")
def source(arrays: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro.make(tmp_path_factory.mktemp("pipeline") / "micro", arrays=arrays)


@pytest.fixture(scope="module")
def plans(source: Path) -> dict[str, Plan]:
    return {quant: gguf3n.plan(source, quant) for quant in QUANTS}


@pytest.fixture(scope="module")
def expected(plans: dict[str, Plan], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of each file, written alone by one worker in one way of cutting."""
    directory = tmp_path_factory.mktemp("expected")
    for quant, plan in plans.items():
        run([(plan, directory / quant)], threads=1, chunk_weights=1 << 16)
    return {quant: (directory / quant).read_bytes() for quant in plans}


# bytes


def widened(array: np.ndarray) -> np.ndarray:
    """BF16 bits to float32."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def tensor_values(name: str, shape: tuple[int, ...], arrays: dict[str, np.ndarray]) -> np.ndarray:
    """What a tensor of the file must hold, found without the mapping: a few names are spelled out."""
    names = {
        "token_embd": ["embed_tokens"],
        "per_layer_token_embd": ["embed_tokens_per_layer"],
        "altup_proj": [f"altup_projections.{k}" for k in range(3)],
        "blk.0.attn_norm": ["layers.0.input_layernorm"],
        "blk.1.ffn_down": ["layers.1.mlp.down_proj"],
        "blk.2.attn_k": [],
        "blk.2.attn_k_norm": [],
    }[name.removesuffix(".weight")]
    found = [widened(arrays[f"{ROOT}{source}.weight"]).reshape(-1, shape[-1]) for source in names]
    rows = np.concatenate([np.empty((0, shape[-1]), np.float32), *found])
    out = np.zeros((int(np.prod(shape[:-1])), shape[-1]), np.float32)
    out[: len(rows)] = rows
    return out


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(
    "name",
    [
        "token_embd",
        "per_layer_token_embd",
        "altup_proj",
        "blk.0.attn_norm",
        "blk.1.ffn_down",
        "blk.2.attn_k",
        "blk.2.attn_k_norm",
    ],
)
def test_the_bytes_are_those_of_the_gguf_package(
    plans: dict[str, Plan], expected: dict[str, bytes], arrays: dict[str, np.ndarray], quant: str, name: str
) -> None:
    (slot,) = [slot for slot in plans[quant].layout.slots if slot.name == f"{name}.weight"]
    values = tensor_values(slot.name, slot.shape, arrays)
    written = expected[quant][slot.offset : slot.offset + slot.n_bytes]
    assert written == gguf.quants.quantize(values, slot.qtype).tobytes()


@pytest.mark.parametrize("quant", QUANTS)
def test_the_file_is_what_was_planned(
    plans: dict[str, Plan], expected: dict[str, bytes], tmp_path: Path, quant: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(expected[quant])
    file = gguf3n.open_gguf(tmp_path / "x.gguf")
    assert len(expected[quant]) == plans[quant].total_bytes
    assert expected[quant].startswith(plans[quant].layout.header)
    assert [(t.name, t.shape, t.qtype, t.offset) for t in file.tensors.values()] == [
        (slot.name, slot.shape, slot.qtype, slot.offset) for slot in plans[quant].layout.slots
    ]
    assert file.bits_per_weight == pytest.approx(plans[quant].bits_per_weight)


@pytest.mark.parametrize("chunk_weights", [1, 1000, 4097, 1 << 30], ids=["row-by-row", "1000", "4097", "whole-tensors"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_neither_threads_nor_chunks_nor_company_change_a_byte(
    plans: dict[str, Plan], expected: dict[str, bytes], tmp_path: Path, threads: int, chunk_weights: int
) -> None:
    largest = max(tensor.source.n_weights for tensor in plans["F32"].tensors)
    run(
        [(plan, tmp_path / quant) for quant, plan in plans.items()],
        threads=threads,
        chunk_weights=min(chunk_weights, largest),
    )
    for quant in QUANTS:
        assert (tmp_path / quant).read_bytes() == expected[quant], quant


@pytest.mark.parametrize("chunk_weights", [1, 64, 1000, 1 << 14, 1 << 30])
def test_chunks_are_every_row_once_in_order(
    plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_weights: int
) -> None:
    plan = plans["F32"]
    wanted = list(dict.fromkeys(rows for planned in plan.tensors for rows in planned.source.rows))
    taken: list[Chunk] = []
    convert = pipeline._Work.convert

    def note(self: Any, chunk: Chunk, *buffers: np.ndarray) -> None:
        taken.append(chunk)
        convert(self, chunk, *buffers)

    monkeypatch.setattr(pipeline._Work, "convert", note)
    largest = max(tensor.source.n_weights for tensor in plan.tensors)
    run([(plan, tmp_path / "x")], threads=1, chunk_weights=min(chunk_weights, largest))
    assert list(dict.fromkeys(chunk.rows for chunk in taken)) == wanted
    found: dict[Rows, list[Chunk]] = {rows: [] for rows in wanted}
    for chunk in taken:
        found[chunk.rows].append(chunk)
    for rows, cut in found.items():
        assert cut == list(chunks(rows, min(chunk_weights, largest)))
        assert [chunk.first for chunk in cut] == np.cumsum([0, *(chunk.n_rows for chunk in cut)])[:-1].tolist()
        assert sum(chunk.n_rows for chunk in cut) == rows.n_rows
        assert sum(chunk.stored_bytes for chunk in cut) == rows.stored_bytes
        for chunk in cut:
            assert chunk.n_rows == 1 or chunk.n_weights <= chunk_weights
    for planned in plan.tensors:
        assert sum(rows.n_rows for rows in planned.source.rows) == planned.source.n_rows


def test_a_slow_reader_holds_up_itself_only(
    plans: dict[str, Plan], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that take different times come back in another order; the first of all comes last."""
    read_into, first, others = OffsetFiles.read_into, threading.Event(), threading.Event()
    n_reads = 0

    def slow(self: OffsetFiles, path: Path, offset: int, buffer: np.ndarray) -> int:
        nonlocal n_reads
        n_reads += 1
        if not first.is_set():
            first.set()
            assert others.wait(30), "the other workers wait for the slow one"
        elif n_reads > 60:
            others.set()
        return read_into(self, path, offset, buffer)

    monkeypatch.setattr(OffsetFiles, "read_into", slow)
    run([(plans["Q8_0"], tmp_path / "Q8_0")], threads=3, chunk_weights=1 << 12)
    assert (tmp_path / "Q8_0").read_bytes() == expected["Q8_0"]


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0"])
def test_every_dtype_of_the_source(arrays: dict[str, np.ndarray], tmp_path: Path, dtype: str, quant: str) -> None:
    """Values that all three dtypes hold become the same values in every file."""
    few_bits = {name: micro.bf16_bits(np.round(widened(array) * 16) / 16) for name, array in arrays.items()}
    other = {name: widened(array).astype(f"float{dtype[1:]}") for name, array in few_bits.items()}
    paths = []
    for name, tensors in (("bf16", few_bits), (dtype, other)):
        micro.make(tmp_path / name / "model", arrays=tensors)
        paths.append(gguf3n.convert(tmp_path / name / "model", quant, tmp_path / f"{name}.gguf")[0].path)
    one, two = (gguf3n.open_gguf(path) for path in paths)
    for name in one.tensors:
        values = []
        for file in (one, two):
            data = np.frombuffer(file.read(file.tensors[name]), np.uint8)
            values.append(
                gguf.quants.dequantize(data.reshape(-1, file.tensors[name].n_bytes), file.tensors[name].qtype)
            )
        assert np.array_equal(values[0], values[1]), name


# outputs meet at rows


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: other weights, another size."""
    raw = micro.config(intermediate_size=[192] * 3)
    directory = tmp_path_factory.mktemp("pipeline") / "other"
    return micro.make(directory, raw=raw, arrays=micro.tensors(raw, seed=1))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Tensor, first byte and number of bytes of each read of weights."""
    copy_stored, seen = RowReader.copy_stored, list[tuple[str, int, int]]()

    def note(self: RowReader, stored: Stored, first: int, out: np.ndarray) -> None:
        seen.append((f"{stored.file_name}: {stored.name}", stored.offset + first * stored.row_bytes, out.nbytes))
        copy_stored(self, stored, first, out)

    monkeypatch.setattr(RowReader, "copy_stored", note)
    return seen


def stored_bytes(*parts: Part) -> int:
    """Of all rows that these want, each once."""
    return sum(rows.stored_bytes for rows in {rows for part in parts for t in part.tensors for rows in t.rows})


def check_read_once(reads: list[tuple[str, int, int]], n_bytes: int) -> None:
    assert len(set(reads)) == len(reads)
    assert sum(n for _, _, n in reads) == n_bytes
    ends = sorted((offset, offset + n) for _, offset, n in reads)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


def alone(plan: Plan, directory: Path) -> bytes:
    """What a plan becomes by itself."""
    run([(plan, directory / "alone")], threads=1)
    data = (directory / "alone").read_bytes()
    (directory / "alone").unlink()
    return data


@pytest.mark.parametrize("chunk_weights", [1000, 1 << 18])
def test_plans_of_several_sources_in_one_run(
    source: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_weights: int
) -> None:
    made = [gguf3n.plan(source, "Q8_0"), gguf3n.plan(other, "Q4_0"), gguf3n.plan(other, "F32")]
    names = ["micro-Q8_0.gguf", "other-Q4_0.gguf", "other-F32.gguf"]
    expected = [alone(plan, tmp_path) for plan in made]
    run([(plan, tmp_path / name) for plan, name in zip(made, names, strict=True)], chunk_weights=chunk_weights)
    assert [(tmp_path / name).read_bytes() for name in names] == expected
    seen: list[Progress] = []
    written = gguf3n.write(made, tmp_path / "out", progress=seen.append)
    assert [each.path.name for each in written] == names
    assert [each.plan for each in written] == made
    assert [each.path.read_bytes() for each in written] == expected
    assert seen[-1].done == seen[-1].total == stored_bytes(made[0].part, made[1].part)


def test_several_plans_read_each_byte_once(
    plans: dict[str, Plan], expected: dict[str, bytes], tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    run([(plan, tmp_path / quant) for quant, plan in plans.items()], chunk_weights=1000)
    check_read_once(reads, stored_bytes(plans["F32"].part))
    assert {quant: (tmp_path / quant).read_bytes() for quant in plans} == expected


def test_a_part_that_shares_some_rows_only(
    source: Path, plans: dict[str, Plan], expected: dict[str, bytes], tmp_path: Path, reads: list[tuple[str, int, int]]
) -> None:
    """In another order, some of them twice, and of a source that was opened for itself."""
    whole = text_part(gguf3n.read_source(source))
    tensors = (*whole.tensors[4:9], *whole.tensors[:3], replace(whole.tensors[5], name="again.weight"))
    (some,) = plan_all(replace(whole, tensors=tensors), [find_recipe("Q8_0")])
    wanted = alone(some, tmp_path)
    reads.clear()
    run([(some, tmp_path / "some"), (plans["Q8_0"], tmp_path / "whole")], chunk_weights=1000)
    check_read_once(reads, stored_bytes(plans["Q8_0"].part))
    assert (tmp_path / "some").read_bytes() == wanted
    assert (tmp_path / "whole").read_bytes() == expected["Q8_0"]
    slots = {slot.name: wanted[slot.offset : slot.offset + slot.n_bytes] for slot in some.layout.slots}
    assert slots["again.weight"] == slots[whole.tensors[5].name]
    for slot in plans["Q8_0"].layout.slots:
        if slot.name in slots:
            assert slots[slot.name] == expected["Q8_0"][slot.offset : slot.offset + slot.n_bytes], slot.name


def test_what_is_wanted_twice_in_one_type_is_quantized_once(
    source: Path, plans: dict[str, Plan], expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q8_0, and Q8_0 with one tensor in another type: only that one is more work."""
    quantize, calls = pipeline._Work.quantize, list[tuple[str, QType]]()

    def note(self: Any, rows: np.ndarray, largest: float, planned: Any, out: np.ndarray) -> None:
        calls.append((planned.slot.name, planned.slot.qtype))
        quantize(self, rows, largest, planned, out)

    monkeypatch.setattr(pipeline._Work, "quantize", note)
    largest = max(tensor.source.n_weights for tensor in plans["F32"].tensors)
    one = plans["Q8_0"]
    two = gguf3n.plan(source, "Q8_0", tensor_types=["blk.1.ffn_up.weight=Q4_0"])
    run([(one, tmp_path / "one")], chunk_weights=largest)
    by_itself = sorted(calls)
    wanted = alone(two, tmp_path)
    calls.clear()
    run([(one, tmp_path / "a"), (two, tmp_path / "b"), (one, tmp_path / "c")], chunk_weights=largest)
    assert sorted(calls) == sorted([*by_itself, ("blk.1.ffn_up.weight", QType.Q4_0)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes() == expected["Q8_0"]
    assert (tmp_path / "b").read_bytes() == wanted


def test_other_importances_are_other_work(source: Path, tmp_path: Path) -> None:
    """The same rows in the same type, with an importance matrix, with another, and without."""

    def imatrix(seed: int) -> ImportanceMatrix:
        rng = np.random.default_rng(seed)
        entry = Entry(rng.random((1, 128), np.float32) + 0.01, np.ones(1, np.float32))
        return ImportanceMatrix(Path(f"{seed}.gguf"), {"blk.1.ffn_down.weight": entry})

    made = [gguf3n.plan(source, "Q4_0@llama.cpp", imatrix=given) for given in (imatrix(0), None, imatrix(1))]
    wanted = [alone(plan, tmp_path) for plan in made]
    run([(plan, tmp_path / str(i)) for i, plan in enumerate(made)])
    assert [(tmp_path / str(i)).read_bytes() for i in range(3)] == wanted
    written = [gguf3n.open_gguf(tmp_path / str(i)) for i in range(3)]
    assert len({file.read(file.tensors["blk.1.ffn_down.weight"]) for file in written}) == 3


def store(path: Path, name: str, values: np.ndarray) -> Stored:
    """A matrix in a file of its own, as float32."""
    path.write_bytes(np.ascontiguousarray(values, "<f4").tobytes())
    return Stored(name, "F32", values.shape, path, 0)


def with_rows(part: Part, name: str, *rows: Rows) -> Part:
    """The part with other rows in one tensor."""
    return replace(part, tensors=tuple(replace(t, rows=rows) if t.name == name else t for t in part.tensors))


def other_forms(kind: str, arrays: dict[str, np.ndarray], source: Path, directory: Path) -> tuple[Rows, np.ndarray]:
    """Rows for blk.1.ffn_down.weight, and the array [64, 128] that they stand for."""
    part = text_part(gguf3n.read_source(source))
    (down,) = next(tensor.rows for tensor in part.tensors if tensor.name == "blk.1.ffn_down.weight")
    (up,) = next(tensor.rows for tensor in part.tensors if tensor.name == "blk.1.ffn_up.weight")
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((3, 128), np.float32), rng.standard_normal((64, 3), np.float32)
    values = widened(arrays[f"{ROOT}layers.1.mlp.down_proj.weight"])
    if kind == "low rank":
        merged = (values + 0.25 * (b.astype(np.float64) @ a)).astype(np.float32)
        return LowRank(down, store(directory / "a", "a", a), store(directory / "b", "b", b), 0.25), merged
    upper = widened(arrays[f"{ROOT}layers.1.mlp.up_proj.weight"])
    view = View(up, range(40, 104), (range(32, 64), range(32), range(64)))
    return view, np.hstack([upper[40:104, 32:64], upper[40:104, :32], upper[40:104]])


@pytest.mark.parametrize("chunk_weights", [1000, 1 << 18])
@pytest.mark.parametrize("kind", ["view", "low rank"])
def test_tensors_of_other_rows(
    arrays: dict[str, np.ndarray], source: Path, tmp_path: Path, kind: str, chunk_weights: int
) -> None:
    """As a checkpoint in which the array stands as it is; its neighbours keep their bytes, and the view's base is read
    for itself."""
    name = "blk.1.ffn_down.weight"
    rows, values = other_forms(kind, arrays, source, tmp_path)
    tensors = {each: widened(array) for each, array in arrays.items()}
    merged = micro.make(tmp_path / "merged", arrays=tensors | {f"{ROOT}layers.1.mlp.down_proj.weight": values})
    part = with_rows(text_part(gguf3n.read_source(source)), name, rows)
    quants = ("F32", "Q8_0", "Q4_0")
    made = plan_all(part, [find_recipe(quant) for quant in quants])
    run([(plan, tmp_path / quant) for quant, plan in zip(quants, made, strict=True)], chunk_weights=chunk_weights)
    for quant in quants:
        (expected,) = gguf3n.convert(merged, quant, tmp_path / "expected.gguf", force=True)
        one, two = gguf3n.open_gguf(tmp_path / quant), gguf3n.open_gguf(expected.path)
        for each in ("blk.1.ffn_up.weight", name, "blk.2.ffn_down.weight", "token_embd.weight"):
            assert one.read(one.tensors[each]) == two.read(two.tensors[each]), (quant, each)


def test_a_tensor_of_rows_of_every_form(arrays: dict[str, np.ndarray], source: Path, tmp_path: Path) -> None:
    name = "blk.1.ffn_down.weight"
    low_rank, merged = other_forms("low rank", arrays, source, tmp_path)
    view, cut = other_forms("view", arrays, source, tmp_path)
    rows = (View(low_rank, range(5, 25), (range(128),)), Zeros(4, 128), View(view, range(24, 64), (range(128),)))
    (plan,) = plan_all(with_rows(text_part(gguf3n.read_source(source)), name, *rows), [find_recipe("F32")])
    run([(plan, tmp_path / "x")], chunk_weights=1000)
    file = gguf3n.open_gguf(tmp_path / "x")
    found = np.frombuffer(file.read(file.tensors[name]), np.float32).reshape(64, 128)
    assert np.array_equal(found, np.vstack([merged[5:25], np.zeros((4, 128), np.float32), cut[24:]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_weight_of_other_rows_that_is_not_finite_is_named(
    arrays: dict[str, np.ndarray], source: Path, tmp_path: Path, value: float
) -> None:
    """In a slice that takes it; not in one that leaves it out."""
    tensors = damaged(arrays, "layers.1.mlp.up_proj.weight", 50 * 64 + 40, value, "BF16")
    spoiled = text_part(gguf3n.read_source(micro.make(tmp_path / "source", arrays=tensors)))
    (up,) = next(tensor.rows for tensor in spoiled.tensors if tensor.name == "blk.1.ffn_up.weight")
    sound = text_part(gguf3n.read_source(source))
    (tmp_path / "out").mkdir()
    taken, left_out = ((range(16, 64), range(64), range(16)), (range(40), range(41, 64), range(40), range(25)))
    view = View(up, range(45, 109), taken)
    rank_1 = [store(tmp_path / at, at, np.ones(shape, np.float32)) for at, shape in (("a", (1, 128)), ("b", (64, 1)))]
    for rows in (view, LowRank(view, rank_1[0], rank_1[1], 1.0)):
        (plan,) = plan_all(with_rows(sound, "blk.1.ffn_down.weight", rows), [find_recipe("BF16")])
        with pytest.raises(QuantizationError) as caught:
            run([(plan, tmp_path / "out" / "x")], threads=2, chunk_weights=1000)
        assert caught.value.what == f"{rows.origin} has a weight that is not finite"
        assert f"tensor '{ROOT}layers.1.mlp.up_proj.weight'" in caught.value.what
        assert caught.value.found is not None
        assert caught.value.found.endswith("in row 5, column 24")
        assert nothing_left(tmp_path / "out")
    rows = View(up, range(45, 109), left_out)
    (plan,) = plan_all(with_rows(sound, "blk.1.ffn_down.weight", rows), [find_recipe("BF16")])
    run([(plan, tmp_path / "out" / "x")], threads=2, chunk_weights=1000)


# progress


def test_progress_grows_to_the_end_and_is_told_by_the_calling_thread(plans: dict[str, Plan], tmp_path: Path) -> None:
    states: list[tuple[Progress, threading.Thread]] = []
    run([(plans["F32"], tmp_path / "x")], progress=lambda state: states.append((state, threading.current_thread())))
    assert {thread for _, thread in states} == {threading.current_thread()}
    assert {(state.stage, state.unit) for state, _ in states} == {("writing", "bytes")}
    done = [state.done for state, _ in states]
    assert done == sorted(done)
    total = sum(
        rows.stored_bytes for tensor in plans["F32"].tensors for rows in tensor.source.rows if isinstance(rows, Stored)
    )
    assert states[-1][0].done == states[-1][0].total == total
    assert {state.total for state, _ in states} == {total}
    seconds = [state.seconds for state, _ in states]
    assert seconds == sorted(seconds)


def test_a_run_is_over_before_its_file_is_there(plans: dict[str, Plan], tmp_path: Path) -> None:
    seen = []
    run([(plans["F32"], tmp_path / "x")], progress=lambda _: seen.append((tmp_path / "x").exists()))
    assert seen
    assert not any(seen)
    assert (tmp_path / "x").exists()


def test_default_threads() -> None:
    assert 1 + 2 <= default_threads() <= (os.cpu_count() or 1) + 2


# failures


def nothing_left(directory: Path) -> bool:
    """No file under any name, and no worker still at work."""
    return not list(directory.iterdir()) and not [t for t in threading.enumerate() if t.name.startswith("gguf3n")]


def failing(error: BaseException, after: int) -> Callable[..., Any]:
    """A function that fails at the n-th call, from whatever thread."""
    lock, calls = threading.Lock(), 0

    def call(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            if calls == after:
                raise error
        return call.original(self, *arguments)  # type: ignore[attr-defined]

    return call


def make_fail(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: BaseException, after: int = 20) -> None:
    function = failing(error, after)
    function.original = getattr(owner, name)  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, name, function)


FAILURES: dict[str, tuple[str, BaseException, type[BaseException], str]] = {
    # method of OffsetFiles, what it raises, what the caller gets, what the message says
    "unreadable": ("read_into", OSError(errno.EIO, "Input/output error"), CheckpointError, "cannot be read"),
    "no permission to read": (
        "read_into",
        OSError(errno.EACCES, "Permission denied"),
        CheckpointError,
        "cannot be read",
    ),
    "disk full": ("write_at", OSError(errno.ENOSPC, "No space left"), OutputError, "the disk is full"),
    "quota": ("write_at", OSError(errno.EDQUOT, "Quota exceeded"), OutputError, "the disk is full"),
    "no permission": ("write_at", OSError(errno.EACCES, "Permission denied"), OutputError, "no permission"),
    "disk gone": ("write_at", OSError(errno.EIO, "Input/output error"), OutputError, "cannot be written"),
    "anything": ("read_into", RuntimeError("a bug"), RuntimeError, "a bug"),
    "memory": ("read_into", MemoryError("none"), MemoryError, "none"),
}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize(("method", "error", "raised", "said"), FAILURES.values(), ids=FAILURES)
def test_a_failing_worker_ends_the_run_and_leaves_nothing(
    plans: dict[str, Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    method: str,
    error: BaseException,
    raised: type[BaseException],
    said: str,
) -> None:
    make_fail(monkeypatch, OffsetFiles, method, error)
    outputs = [(plans[quant], tmp_path / quant) for quant in ("F32", "Q8_0")]
    with pytest.raises(raised, match=said):
        run(outputs, threads=threads, chunk_weights=1 << 12)
    assert nothing_left(tmp_path)


def test_the_other_workers_stop_when_one_fails(
    plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, n_chunks = pipeline._Work.convert, 0

    def counting(self: Any, *arguments: Any) -> None:
        nonlocal n_chunks
        n_chunks += 1
        if n_chunks == 3:
            raise RuntimeError("stop")
        time.sleep(0.02)
        convert(self, *arguments)

    monkeypatch.setattr(pipeline._Work, "convert", counting)
    with pytest.raises(RuntimeError, match="stop"):
        run([(plans["F32"], tmp_path / "x")], threads=2, chunk_weights=64)
    assert n_chunks < 100  # of thousands
    assert nothing_left(tmp_path)


def interrupt(_: Progress) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_while_workers_run(plans: dict[str, Plan], tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        run([(plan, tmp_path / quant) for quant, plan in plans.items()], progress=interrupt, chunk_weights=64)
    assert caught.value.exit_code == 130
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["__init__", "loop"])
def test_an_interrupt_at_any_other_time(
    plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """While the quantizers are loaded, or in a worker."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline._Work, name, stop)
    with pytest.raises(Interrupted):
        run([(plans["F32"], tmp_path / "x")])
    assert nothing_left(tmp_path)


def test_an_interrupt_keeps_the_file_that_was_to_be_replaced(plans: dict[str, Plan], tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(Interrupted):
        run([(plans["F32"], tmp_path / "x")], force=True, progress=interrupt)
    assert (tmp_path / "x").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_second_file_that_exists_is_told_before_any_work(plans: dict[str, Plan], tmp_path: Path) -> None:
    (tmp_path / "Q8_0").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run([(plans[quant], tmp_path / quant) for quant in ("F32", "Q8_0")])
    assert list(tmp_path.iterdir()) == [tmp_path / "Q8_0"]


# conversion


def test_several_files_must_fit_the_disk_together(
    source: Path, plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = plans["F32"].total_bytes + plans["F16"].total_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=together - 1))
    with pytest.raises(OutputError, match="not enough space") as caught:
        gguf3n.convert(source, ["F32", "F16"], tmp_path)
    assert f"{together:,} bytes" in str(caught.value)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("quants", "output", "said"),
    [
        ([], None, "no quantization named"),
        ("Q9_9", None, "unknown quantization 'Q9_9'"),
        (["Q8_0", "q8_0"], None, "the same quantization twice"),
        (["Q8_0", "F16"], "x.gguf", "one file name for 2 quantizations"),
        (5, None, "not a quantization"),
        ([None], None, "not a quantization"),
        (b"Q8_0", None, "not a quantization"),
    ],
    ids=["none", "unknown", "twice", "one-file-for-two", "number", "nothing", "bytes"],
)
def test_a_request_that_cannot_be_met(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quants: str | Sequence[str],
    output: str | None,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said) as caught:
        gguf3n.convert(source, quants, output)
    assert caught.value.exit_code == 2
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("threads", [0, -3, 1.5])
def test_a_number_of_workers_that_there_can_not_be(source: Path, threads: Any) -> None:
    with pytest.raises(UsageError, match="not a number of workers"):
        gguf3n.convert(source, "F16", threads=threads)


def test_where_files_go(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = gguf3n.read_source(source)
    (tmp_path / "taken.gguf").mkdir()
    for output, names in (
        (None, ["micro-BF16.gguf", "micro-F32.gguf"]),
        ("new/directory", ["new/directory/micro-BF16.gguf", "new/directory/micro-F32.gguf"]),
        ("taken.gguf", ["taken.gguf/micro-BF16.gguf", "taken.gguf/micro-F32.gguf"]),
    ):
        written = gguf3n.convert(model, ["bf16", "F32"], output)
        assert [str(each.path) for each in written] == names
        assert [each.path.stat().st_size for each in written] == [each.plan.total_bytes for each in written]
    (one,) = gguf3n.convert(model, "BF16", "some/where/my.gguf")
    with pytest.raises(UsageError, match="nothing to write"):
        gguf3n.write([])
    assert one.path == Path("some/where/my.gguf")


# values


def damaged(arrays: dict[str, np.ndarray], name: str, at: int, value: float, dtype: str) -> dict[str, np.ndarray]:
    """All tensors in a dtype, one of them with another value."""
    out = {}
    for each, array in arrays.items():
        values = widened(array).copy()
        if each == ROOT + name:
            values.reshape(-1)[at] = value
        out[each] = micro.bf16_bits(values) if dtype == "BF16" else values.astype({"F16": "f2", "F32": "f4"}[dtype])
    return out


NAN, INF = float("nan"), float("inf")
every_dtype = pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])


@every_dtype
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("name", "row", "column", "n_per_row"),
    [
        ("embed_tokens.weight", 0, 0, 64),
        ("embed_tokens.weight", 1087, 63, 64),
        ("layers.1.mlp.down_proj.weight", 37, 101, 128),
        ("altup_projections.1.weight", 5, 6, 64),
        ("layers.0.input_layernorm.weight", 0, 63, 64),
    ],
    ids=["first", "last", "matrix", "stack", "norm"],
)
def test_a_weight_that_is_not_finite_is_named(
    arrays: dict[str, np.ndarray],
    tmp_path: Path,
    dtype: str,
    value: float,
    name: str,
    row: int,
    column: int,
    n_per_row: int,
) -> None:
    tensors = damaged(arrays, name, row * n_per_row + column, value, dtype)
    source = micro.make(tmp_path / "source", arrays=tensors)
    (tmp_path / "out").mkdir()
    plan = gguf3n.plan(source, "BF16")
    with pytest.raises(QuantizationError) as caught:
        run([(plan, tmp_path / "out" / "x.gguf")], threads=2, chunk_weights=1000)
    assert caught.value.exit_code == 9
    assert caught.value.what == (
        f"{source / 'model.safetensors'}: tensor {ROOT + name!r} has a weight that is not finite"
    )
    assert caught.value.found == f"{value} in row {row}, column {column}"
    assert nothing_left(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_weight_too_large_for_f16_is_named(arrays: dict[str, np.ndarray], tmp_path: Path, dtype: str) -> None:
    tensors = damaged(arrays, "layers.1.mlp.down_proj.weight", 4000, -70144.0, dtype)
    source = micro.make(tmp_path / "source", arrays=tensors)
    (tmp_path / "out").mkdir()
    with pytest.raises(QuantizationError, match=r"'blk\.1\.ffn_down\.weight' does not fit F16") as caught:
        gguf3n.convert(source, "F16", tmp_path / "out")
    assert "70144" in str(caught.value)
    assert "BF16" in str(caught.value.fix)
    assert nothing_left(tmp_path / "out")
    gguf3n.convert(source, "BF16", tmp_path / "out")


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.0, True), (65520.0, False)])
def test_the_largest_weight_that_f16_holds(
    arrays: dict[str, np.ndarray], tmp_path: Path, value: float, fits: bool
) -> None:
    """Up to half a step above the largest value is rounded to it."""
    tensors = damaged(arrays, "layers.1.mlp.down_proj.weight", 4000, value, "F32")
    source = micro.make(tmp_path / "source", arrays=tensors)
    if fits:
        (written,) = gguf3n.convert(source, "F16", tmp_path)
        file = gguf3n.open_gguf(written.path)
        data = np.frombuffer(file.read(file.tensors["blk.1.ffn_down.weight"]), np.float16)
        assert data[4000] == 65504
    else:
        with pytest.raises(QuantizationError):
            gguf3n.convert(source, "F16", tmp_path)


def test_a_block_type_whose_scale_overflows(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Q8_0's scale is a half-precision number: 127 times 65504 is the largest weight."""
    tensors = damaged(arrays, "layers.1.mlp.down_proj.weight", 4000, 1e7, "F32")
    with pytest.raises(QuantizationError, match=r"'blk\.1\.ffn_down\.weight' does not fit Q8_0"):
        gguf3n.convert(micro.make(tmp_path / "source", arrays=tensors), "Q8_0", tmp_path / "out")


def test_a_scale_of_a_gguf_source_that_is_not_finite(source: Path, tmp_path: Path) -> None:
    (written,) = gguf3n.convert(source, "Q8_0", tmp_path / "x.gguf")
    tensor = gguf3n.open_gguf(written.path).tensors["blk.1.ffn_down.weight"]
    with open(written.path, "r+b") as file:
        file.seek(
            tensor.offset + 37 * tensor.n_bytes // tensor.shape[0] + 34
        )  # row 37, second block: an infinite scale
        file.write(b"\x00\x7c")
    (tmp_path / "out").mkdir()
    with pytest.raises(
        QuantizationError, match=r"'blk\.1\.ffn_down\.weight' has a weight that is not finite"
    ) as caught:
        gguf3n.convert(gguf3n.read_gguf(written.path, allow_requantize=True), "Q4_0", tmp_path / "out")
    assert str(written.path) in caught.value.what
    assert caught.value.found is not None
    assert "in row 37, column 32" in caught.value.found
    assert nothing_left(tmp_path / "out")


# the source changes meanwhile


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "became shorter"),
        (lambda path: os.truncate(path, 0), "became shorter"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
    ids=["a-byte-less", "emptied", "gone", "a-directory"],
)
def test_a_source_that_changes_after_planning(
    arrays: dict[str, np.ndarray], tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    source = micro.make(tmp_path / "source", arrays=arrays)
    plan = gguf3n.plan(source, "BF16")
    change(source / "model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=said) as caught:
        run([(plan, tmp_path / "out" / "x.gguf")], threads=2, chunk_weights=1000)
    assert str(source / "model.safetensors") in caught.value.what
    assert ROOT in caught.value.what
    assert isinstance(caught.value, Gguf3nError)
    assert nothing_left(tmp_path / "out")
