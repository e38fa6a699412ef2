"""The bytes are ggml's, whatever processor numba compiles for: SSE2 only, or AVX2 and FMA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as QType
from llvmlite.binding import get_host_cpu_features, get_process_triple

from bench_quants import CPUS
from gguf3n.engines import ggml
from gguf3n.quants.unpacked import PARTS
from tests.quants.quantize_mix import mixed_rows, mixed_weights, refined_mix
from tests.quants.test_contract import assert_same_bytes, every_mode, mode_name

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,  # every kernel is compiled for each processor
    pytest.mark.skipif(
        not get_process_triple().startswith("x86_64"), reason="the processors to compile for are x86-64"
    ),
]
every_cpu = pytest.mark.parametrize("cpu", CPUS)


def host_can_run(cpu: str) -> bool:
    asked = CPUS[cpu]["NUMBA_CPU_FEATURES"].replace("+", "").split(",")
    return all(get_host_cpu_features().get(feature, False) for feature in asked if feature)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """What quantize_mix makes for each processor that this one can stand in for; at the same time, in new caches."""
    directory = tmp_path_factory.mktemp("cpu-targets")
    running = {}
    for cpu in filter(host_can_run, CPUS):
        environment = {**os.environ, **CPUS[cpu], "NUMBA_CACHE_DIR": str(directory / cpu)}
        command = [sys.executable, "-m", "tests.quants.quantize_mix", str(directory / f"{cpu}.npz")]
        running[cpu] = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    for process in running.values():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return {cpu: dict(np.load(directory / f"{cpu}.npz")) for cpu in running}


def bytes_for(made: dict[str, dict[str, np.ndarray]], cpu: str) -> dict[str, np.ndarray]:
    if cpu not in made:
        pytest.skip(f"this processor cannot run code for {cpu}")
    return made[cpu]


@every_cpu
def test_vectors_are_as_wide_as_the_processor_has_them(made: dict[str, dict[str, np.ndarray]], cpu: str) -> None:
    """numba compiles for the processor that it was told, not for the one it runs on."""
    expected = {"generic": ["%xm"], "haswell": ["%xm", "%ym"]}[cpu]
    assert bytes_for(made, cpu)["registers"].tolist() == expected


@every_cpu
@every_mode
def test_bytes_are_those_of_ggml(
    made: dict[str, dict[str, np.ndarray]], cpu: str, qtype: QType, weighted: bool
) -> None:
    ours = bytes_for(made, cpu)[mode_name(qtype, weighted)]
    for found, quant_weights in zip(ours, mixed_weights(weighted), strict=True):
        assert_same_bytes(found, ggml.quantize(mixed_rows(qtype), qtype, quant_weights), qtype)


@every_cpu
@pytest.mark.parametrize("qtype", PARTS, ids=lambda qtype: qtype.name)
def test_refined_bytes_are_those_of_this_processor(
    made: dict[str, dict[str, np.ndarray]], cpu: str, qtype: QType
) -> None:
    assert np.array_equal(bytes_for(made, cpu)[f"refined {qtype.name}"], refined_mix(qtype))
