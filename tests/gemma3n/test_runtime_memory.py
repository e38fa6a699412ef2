"""What llama.cpp takes beside a file: by its own log."""

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
from gguf3n.gemma3n.config import Config
from gguf3n.gemma3n.part import Part, PartKind
from gguf3n.gemma3n.published import PUBLISHED, outline
from gguf3n.gemma3n.runtime_memory import PROCESS_BYTES, runtime_of
from gguf3n.gemma3n.source import Source, open_checkpoint
from gguf3n.gemma3n.text import model_keys

MIB = 1 << 20


def part_of(config: Config) -> Part:
    """What the keys of its file say."""
    source = Source(origin="x", path=Path("x"), name="x", tensors={})
    return Part(PartKind.TEXT, source, tuple(model_keys(config)), outline(config))


@pytest.mark.parametrize(
    ("n_ctx", "cache", "compute"),
    [(512, 20, 533.03), (600, 30, 533.53), (1100, 42, 534.28), (4096, 64, 537.03), (32768, 288, 565.03)],
)
@pytest.mark.parametrize("size", ["E2B", "E4B"])
def test_published_sizes_take_what_llama_cpp_says(size: str, n_ctx: int, cache: int, compute: float) -> None:
    """Recorded from its log with files of these shapes, swa_full off; MiB. The recording had 262,144 tokens."""
    config = replace(PUBLISHED[size], vocab_size=262_144)
    found = runtime_of(config, n_ctx)
    assert runtime_of(part_of(config), n_ctx) == found
    assert found.cache_bytes == cache * MIB
    assert found.compute_bytes == pytest.approx(compute * MIB, abs=0.05 * MIB)
    assert found.total_bytes == found.cache_bytes + found.compute_bytes + PROCESS_BYTES


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
    config = open_checkpoint(gguf3n.read_source(tiny_checkpoint)).config
    assert sum(sizes) * MIB == runtime_of(config, 300).cache_bytes


@pytest.mark.parametrize("n_ctx", [0, -1, 32_769])
def test_a_context_that_the_model_does_not_have(n_ctx: int) -> None:
    with pytest.raises(UsageError, match="not a context of this model"):
        runtime_of(PUBLISHED["E4B"], n_ctx)
