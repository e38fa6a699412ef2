"""What the models need: the estimate against what they took, and what is said when it is not there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import gguf3n
from gguf3n.engines import memory
from gguf3n.engines.memory import (
    Alternative,
    ModelNeed,
    available_bytes,
    check_memory,
    gigabytes,
    llama_cpp_need,
    models_needs,
    reference_need,
    source_need,
)
from gguf3n.errors import UsageError
from gguf3n.gemma3n.part import text_part
from gguf3n.gemma3n.source import open_checkpoint, open_source
from gguf3n.inspection.subject import Subject

PEAK = """
import sys
from gguf3n.engines.{module} import {name}
with {name}(sys.argv[1], {options}) as model:
    for row in model.logprobs([2] + list(range(500, 627)), first=64):
        pass
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_bytes(path: Path, module: str, name: str, options: str) -> int:
    """The largest resident size of a process that runs the model."""
    if not sys.platform.startswith("linux"):
        pytest.skip("/proc is Linux's")
    code = PEAK.format(module=module, name=name, options=options)
    process = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return int(process.stdout) * 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference(dtype: str, tiny_checkpoint: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    need = reference_need(open_checkpoint(tiny_checkpoint), dtype, 512)
    assert need.what == f"the reference in {dtype}"
    peak = peak_bytes(tiny_checkpoint, "reference", "Reference", f"dtype={dtype!r}")
    assert need.n_bytes / 2 < peak < need.n_bytes


def test_llama_cpp(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    path = tmp_path / "tiny-F16.gguf"
    gguf3n.convert(tiny_checkpoint, "F16", path)
    need = llama_cpp_need(Subject(gguf3n.open_gguf(path)), 512)
    assert need.what == "llama.cpp with tiny-F16.gguf"
    peak = peak_bytes(path, "llama_library", "LlamaLibrary", "n_threads=1")
    assert need.n_bytes / 2 < peak < need.n_bytes


def test_the_reference_needs_what_its_weights_need(tiny_checkpoint: Path, make_checkpoint: Callable[..., Path]) -> None:
    """In bfloat16 half of it, but for some rows of the output matrix; a table in a mapped file is not read."""
    n_weights = text_part(gguf3n.read_source(tiny_checkpoint)).n_weights
    half, widened, table = 2 * n_weights, 4 * memory.HEAD_ROWS * 256, 2 * 1088 * 22 * 256
    source = open_checkpoint(tiny_checkpoint)
    in_float32, in_bfloat16 = (reference_need(source, dtype, 512).n_bytes for dtype in ("float32", "bfloat16"))
    assert in_float32 - in_bfloat16 == half - widened + table
    to_be_converted = open_checkpoint(make_checkpoint(layout="text-only", dtype="f32"))
    assert in_float32 - reference_need(to_be_converted, "bfloat16", 512).n_bytes == half - widened


def test_what_is_run_one_after_the_other(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A source's own model in the engine that it is run in, then the file that is held against it."""
    path = tmp_path / "tiny-F16.gguf"
    gguf3n.convert(tiny_checkpoint, "F16", path)
    checkpoint, gguf, subject = open_checkpoint(tiny_checkpoint), open_source(path), Subject(gguf3n.open_gguf(path))
    of_checkpoint, of_file = reference_need(checkpoint, "float32", 64), llama_cpp_need(subject, 64)

    def told(needs: tuple[ModelNeed, ...]) -> list[tuple[str, int, list[str]]]:
        return [(need.what, need.n_bytes, list(map(str, need.others))) for need in needs]

    saved, server = "--use-reference FILE", "--server URL"
    smaller = str(memory.SMALLER_STAGES)
    first = (of_checkpoint.what, of_checkpoint.n_bytes)
    second = (of_file.what, of_file.n_bytes)
    other = reference_need(checkpoint, "float32", 64, Alternative(saved), memory.SMALLER_STAGES)
    assert source_need(checkpoint, "float32", 64, Alternative(saved), memory.SMALLER_STAGES) == other
    (one, two) = models_needs(checkpoint, subject, 64, "float32", None)
    assert (one.what, one.n_bytes, one.others) == (*first, other.others)
    assert (two.what, two.n_bytes, list(map(str, two.others))) == (*second, [server, smaller])
    (one, two) = models_needs(gguf, subject, 64, "float32", None)
    assert (one.what, one.n_bytes, list(map(str, one.others))) == (*second, [saved, smaller])
    assert told(models_needs(None, subject, 64, "float32", None)) == [(*second, [server, smaller])]
    assert models_needs(None, subject, 64, "float32", "http://elsewhere") == ()


def test_available(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = psutil.virtual_memory().available
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert available_bytes() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 200000\n")
    assert available_bytes() == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("1000000\n")
    assert available_bytes() == 500_000


def test_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(UsageError, match=r"gguf3n\[validate\]"):
        available_bytes()


def test_what_does_not_fit_is_refused_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    others = Alternative("--dtype bfloat16", 9_600_000_000), Alternative("--use-reference FILE")
    need = ModelNeed("the reference in float32", 18_600_000_000, others)
    available = [18_600_000_000]
    monkeypatch.setattr(memory, "available_bytes", lambda: available[0])
    notices: list[str] = []
    check_memory([need], disk="537 MB on the disk in /tmp", notice=notices.append)
    assert notices == [
        "memory: the reference in float32 18.6 GB; 537 MB on the disk in /tmp; 18.6 GB available",
    ]
    available[0] = 12_000_000_000
    with pytest.raises(UsageError) as error:
        check_memory([ModelNeed("what is smaller", 1, ()), need])
    assert str(error.value).splitlines() == [
        "not enough memory for the reference in float32",
        "  expected: about 18.6 GB",
        "  found:    12.0 GB available",
        "  to do:    --dtype bfloat16 (9.6 GB), or --use-reference FILE",
    ]
    available[0] = 8_000_000_000
    with pytest.raises(UsageError) as error:
        check_memory([need])
    assert error.value.fix == "--use-reference FILE"
    with pytest.raises(UsageError) as error:
        check_memory([ModelNeed("all", 9_000_000_000, ())])
    assert error.value.fix == "a machine with more"


def test_sizes_are_told_in_fitting_units() -> None:
    assert [gigabytes(n) for n in (537_000_000, 999_400_000, 18_600_000_000)] == ["537 MB", "999 MB", "18.6 GB"]
