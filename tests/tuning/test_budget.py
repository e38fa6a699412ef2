"""Sizes as people write them, and what llama.cpp takes beside a file: by its own log."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path

import pytest

import gguf3n
from gguf3n.engines import llama_library
from gguf3n.engines.llama_library import CONTEXT_FIELDS, MODEL_FIELDS
from gguf3n.errors import UsageError
from gguf3n.formats.gguf_layout import KeyValue
from gguf3n.gemma3n.part import Part, PartKind, text_part
from gguf3n.gemma3n.published import PUBLISHED, outline
from gguf3n.gemma3n.source import Source
from gguf3n.gemma3n.text import model_keys
from gguf3n.tuning.budget import bits_budget, parse_size, runtime_of, size_budget

MIB = 1 << 20


def published(size: str) -> Part:
    """A part of this size, without a checkpoint."""
    source = Source(origin=size, path=Path(size), name=size, tensors={})
    return Part(PartKind.TEXT, source, tuple(model_keys(PUBLISHED[size])), outline(PUBLISHED[size]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4.2GB", (False, 4_200_000_000)),
        ("4.2 gb", (False, 4_200_000_000)),
        (" .5GiB ", (False, 1 << 29)),
        ("3900MiB", (False, 3900 << 20)),
        ("17b", (False, 17)),
        ("1.5KB", (False, 1500)),
        ("0.0000015MB", (False, 1)),
        ("fits:8GB", (True, 8_000_000_000)),
        ("Fits: 7.5 GiB", (True, 15 << 29)),
    ],
)
def test_sizes(text: str, expected: tuple[bool, int]) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "4.2", "GB", "-1GB", "4,2GB", "4.2.1GB", "1e9B", "4G", "4Gb/s", "nanGB", "fits:", "fits:4", "٤GB"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0GB", "0.4B", "fits:0MB"])
def test_no_room(text: str) -> None:
    with pytest.raises(UsageError, match="nothing fits"):
        parse_size(text)


def test_bits() -> None:
    assert bits_budget(4.5, 1000, 77).n_bytes == 562 + 77
    for bits in (0, -1.0, 33, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="not bits a weight"):
            bits_budget(bits, 1000, 0)


@pytest.mark.parametrize(
    ("n_ctx", "cache", "compute"),
    [(512, 20, 533.03), (600, 30, 533.53), (1100, 42, 534.28), (4096, 64, 537.03), (32768, 288, 565.03)],
)
@pytest.mark.parametrize("size", ["E2B", "E4B"])
def test_published_sizes_take_what_llama_cpp_says(size: str, n_ctx: int, cache: int, compute: float) -> None:
    """Recorded from its log with files of these shapes, swa_full off; MiB. The recording had 262,144 tokens."""
    part = published(size)
    n_tokens = 262_144
    (table,) = (tensor for tensor in part.tensors if tensor.name == "token_embd.weight")
    smaller = replace(table, shape=(n_tokens, table.n_per_row))
    found = runtime_of(replace(part, tensors=(smaller,)), n_ctx)
    assert found.cache_bytes == cache * MIB
    assert found.compute_bytes == pytest.approx(compute * MIB, abs=0.05 * MIB)


def test_a_small_model_takes_what_llama_cpp_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Here, of the llama.cpp that is installed: its caches as it logs them when they are of full size."""
    pytest.importorskip("xllamacpp")
    (done,) = gguf3n.convert(tiny_checkpoint, "Q8_0", tmp_path / "model.gguf")
    lib = llama_library.bindings()
    lines: list[str] = []
    callback = llama_library._LOG_CALLBACK(lambda _level, text, _: lines.append(text.decode(errors="replace")))
    lib.llama_log_set(ctypes.cast(callback, ctypes.c_void_p), None)
    try:
        model = lib.llama_model_load_from_file(
            str(done.path).encode(),
            llama_library._changed(lib.llama_model_default_params(), MODEL_FIELDS, n_gpu_layers=0),
        )
        parameters = llama_library._changed(lib.llama_context_default_params(), CONTEXT_FIELDS, n_ctx=300, n_ubatch=512)
        lib.llama_free(lib.llama_init_from_model(model, parameters))
        lib.llama_model_free(model)
    finally:
        lib.llama_log_set(None, None)
    sizes = [float(size) for size in re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(lines))]
    assert sum(sizes) * MIB == runtime_of(text_part(gguf3n.read_source(tiny_checkpoint)), 300).cache_bytes


def test_what_fits() -> None:
    part = published("E2B")
    beside = runtime_of(part, 4096).total_bytes
    budget = size_budget("fits:8GB", part, 4096)
    assert budget.n_bytes == 8_000_000_000 - beside and "4,096 tokens" in budget.said
    assert size_budget("8GB", part, 4096).n_bytes == 8_000_000_000
    with pytest.raises(UsageError, match="nothing is left"):
        size_budget("fits:500MB", part, 4096)
    for n_ctx in (0, 32_769):
        with pytest.raises(UsageError, match="not a context of this model"):
            size_budget("fits:8GB", part, n_ctx)


def test_a_source_that_does_not_say_its_sizes() -> None:
    part = published("E2B")
    keys: tuple[KeyValue, ...] = tuple(key for key in part.keys if "head_count_kv" not in key.name)
    with pytest.raises(UsageError, match="is not known"):
        size_budget("fits:8GB", replace(part, keys=keys), 4096)
