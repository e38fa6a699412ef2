"""Running plans: the same bytes however the work is cut and dealt out, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf.quants
import numpy as np
import pytest

import gguf3n
from gguf3n import pipeline
from gguf3n.errors import CheckpointError, Gguf3nError, Interrupted, OutputError, QuantizationError, UsageError
from gguf3n.formats.offset_files import OffsetFiles
from gguf3n.pipeline import Chunk, Progress, chunks, default_threads, run
from gguf3n.planning import Plan
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
def test_chunks_are_every_row_once_in_order(plans: dict[str, Plan], chunk_weights: int) -> None:
    plan = plans["F32"]
    found: dict[int, list[Chunk]] = {}
    for chunk in chunks(plan, chunk_weights):
        found.setdefault(chunk.tensor, []).append(chunk)
    assert sorted(found) == list(range(len(plan.tensors)))
    for index, cut in found.items():
        tensor = plan.tensors[index].source
        assert [chunk.first_row for chunk in cut] == np.cumsum([0, *(chunk.n_rows for chunk in cut)])[:-1].tolist()
        assert sum(chunk.n_rows for chunk in cut) == tensor.n_rows
        for chunk in cut:
            assert chunk.n_rows == 1 or chunk.n_rows * tensor.n_per_row <= chunk_weights
            assert chunk.source in {rows.source for rows in tensor.rows}
    for planned in plan.tensors:
        for rows in planned.source.rows:
            cut = [chunk for chunk in found[plan.tensors.index(planned)] if chunk.source is rows.source]
            assert [chunk.source_row for chunk in cut][:1] == [0]
            assert sum(chunk.n_rows for chunk in cut) == rows.n_rows


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


# progress


def test_progress_grows_to_the_end_and_is_told_by_the_calling_thread(plans: dict[str, Plan], tmp_path: Path) -> None:
    states: list[tuple[Progress, threading.Thread]] = []
    run([(plans["F32"], tmp_path / "x")], progress=lambda state: states.append((state, threading.current_thread())))
    assert {thread for _, thread in states} == {threading.current_thread()}
    done = [state.done_bytes for state, _ in states]
    assert done == sorted(done)
    total = sum(
        rows.source.n_bytes for tensor in plans["F32"].tensors for rows in tensor.source.rows if rows.source is not None
    )
    assert states[-1][0].done_bytes == states[-1][0].total_bytes == total
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

    def counting(self: Any, *arguments: Any) -> int:
        nonlocal n_chunks
        n_chunks += 1
        if n_chunks == 3:
            raise RuntimeError("stop")
        time.sleep(0.02)
        return convert(self, *arguments)

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
    ],
    ids=["none", "unknown", "twice", "one-file-for-two"],
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
