"""llama.cpp with a base and an adapter, with the merged model, and transformers with what PEFT has merged."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf3n
from gguf3n.engines.llama_cpp import Engine
from gguf3n.engines.llama_library import LlamaLibrary
from gguf3n.engines.reference import Reference
from gguf3n.formats.gguf_reader import open_gguf
from gguf3n.gemma3n.lora import EFFECTS, Effect
from gguf3n.gemma3n.source import open_checkpoint
from tests.gemma3n import trained
from tests.lora_files import pair, write_lora

pytest.importorskip("xllamacpp")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = ["prediction_coefs", "correction_coefs", "linear_left", "linear_right"]
KINDS: Mapping[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR},
    "rsLoRA": {"r": 5, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [*LINEAR, *SMALL, "per_layer_input_gate", "per_layer_projection"],
        "use_rslora": True,
        "rank_pattern": {"down_proj": 7, "linear_left": 2},
        "alpha_pattern": {"gate_proj": 9, r"layers\.1?[12]\..*": 3},
    },
}
IDS = [2, *np.random.default_rng(1).integers(494, 1016, 31).tolist()]

SAME = 1e-7
"""Mean KL divergence, nats, between two ways to the same weights in float32.
# measured: at most 4.1e-9 between base with adapter and merged file in llama.cpp, 2026-11-22."""
AS_TRANSFORMERS = 1e-5
"""The same between engines, as in tests/test_end_to_end.py. # measured: at most 1.2e-6, 2026-11-22."""
APART = 1e-2
"""Of what an adapter changes; a wrong scale is as far."""


class Adapted(LlamaLibrary):
    """A model in llama.cpp with one adapter at a time. Why not by its server: that loads model and adapter together."""

    def use(self, adapter: Path) -> None:
        lib = self._lib
        lib.llama_adapter_lora_init.restype = ctypes.c_void_p
        lib.llama_adapter_lora_init.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        lib.llama_set_adapters_lora.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        loaded = lib.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        assert loaded, f"llama.cpp does not load {adapter}"
        one, scale = (ctypes.c_void_p * 1)(loaded), (ctypes.c_float * 1)(1.0)
        assert lib.llama_set_adapters_lora(self._context, one, 1, scale) == 0


def adapted(base: Path, adapter: Path) -> Adapted:
    model = Adapted(base, n_ctx=64, n_threads=2)
    model.use(adapter)
    return model


def rows(engine: Engine, ids: Sequence[int] = IDS) -> np.ndarray:
    with closing(engine):
        return np.array(list(engine.logprobs(ids)), np.float64)


def divergence(one: np.ndarray, two: np.ndarray) -> float:
    return float((np.exp(one) * (one - two)).sum(axis=-1).mean())


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint as a file that llama.cpp loads."""
    (written,) = gguf3n.convert(tiny_checkpoint, "F32", tmp_path_factory.mktemp("lora") / "base.gguf")
    return written.path


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_merged_model(kind: str, tiny_checkpoint: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = trained.train(tiny_checkpoint, tmp_path / "adapter", **KINDS[kind])
    lora = gguf3n.convert_adapter(made.directory, output=tmp_path, base=tiny_checkpoint).path
    (merged,) = gguf3n.convert(tiny_checkpoint, "F32", tmp_path / "merged.gguf", adapters=[made.directory])
    by_peft = trained.write_merged(open_checkpoint(tiny_checkpoint), tmp_path / "peft", made.exact)
    ours, expected = rows(adapted(base, lora)), rows(Reference(by_peft))
    assert divergence(rows(LlamaLibrary(merged.path, n_ctx=64, n_threads=2)), ours) < SAME
    assert divergence(expected, ours) < AS_TRANSFORMERS
    assert divergence(expected, rows(LlamaLibrary(base, n_ctx=64, n_threads=2))) > APART


def lora_of(base: Path, name: str, folder: Path) -> Path:
    """An adapter for one tensor; of a table the halves are transposed, as llama.cpp wants them."""
    *_, n_outputs, n_inputs = open_gguf(base).tensors[name].shape
    halves = pair(name, n_outputs, n_inputs)
    if name.endswith("token_embd.weight"):
        halves = {f"{name}.lora_a": halves[f"{name}.lora_b"], f"{name}.lora_b": halves[f"{name}.lora_a"].T}
    return write_lora(folder / f"{name}.gguf", halves)


def test_where_llama_cpp_applies_an_adapter(base: Path, tmp_path: Path) -> None:
    """Of one for each kind of matrix, those that change what the model says."""
    ids = IDS[:3]
    without = rows(LlamaLibrary(base, n_ctx=64, n_threads=2), ids)
    found = {}
    with closing(Adapted(base, n_ctx=64, n_threads=2)) as model:
        for target, effect in EFFECTS.items():
            if effect is not Effect.ABORTS:
                model.use(lora_of(base, target.format(bid=3), tmp_path))
                same = np.array_equal(without, np.array(list(model.logprobs(ids))))
                found[target] = Effect.IGNORED if same else Effect.APPLIED
    assert found == {target: effect for target, effect in EFFECTS.items() if effect is not Effect.ABORTS}


ABORTS = """
import sys
from tests.gemma3n.test_lora_llama_cpp import adapted, rows
rows(adapted(*sys.argv[1:]), [2, 600])
print("no abort")
"""


def test_where_llama_cpp_aborts(base: Path, tmp_path: Path) -> None:
    for target, effect in EFFECTS.items():
        if effect is Effect.ABORTS:
            adapter = lora_of(base, target, tmp_path)
            command = [sys.executable, "-c", ABORTS, str(base), str(adapter)]
            found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            ended = subprocess.run(command, capture_output=True, text=True, env=found)
            assert ended.returncode == -signal.SIGABRT, ended.stderr[-500:]


def test_keys_and_values_of_shared_layers_change_nothing(base: Path, tmp_path: Path) -> None:
    ids = IDS[:3]
    lora = lora_of(base, "blk.20.attn_k.weight", tmp_path)
    assert (rows(adapted(base, lora), ids) == rows(LlamaLibrary(base, n_ctx=64, n_threads=2), ids)).all()
    assert [finding.check.id for finding in gguf3n.lint(lora).findings] == ["adapter-idle"]
