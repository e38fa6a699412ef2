"""The scalar arithmetic that the kernels share, against NumPy and against its own plain Python."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gguf3n
from gguf3n.quants import lanes
from gguf3n.quants.lanes import kernel, weigh
from gguf3n.quants.vectors import load

EVERY_HALF = np.arange(65536, dtype=np.uint16)
ODD_FLOATS = np.array(
    [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, -0.49999997, 1e-45, -1e-45, 1e-38, 1e30, -1e30, 3.4e38,
     65504.0, 65519.99, 65520.0, -65520.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-14, np.inf, -np.inf],
    dtype=np.float32,
)  # fmt: skip


def random_bits(n: int, seed: int = 0) -> np.ndarray:
    """Floats of every exponent; infinities and NaN among them."""
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32).view(np.float32)


def test_bits_of_a_float() -> None:
    for x in ODD_FLOATS:
        assert lanes.f32_bits(x) == x.view(np.uint32)
        assert np.float32(lanes.f32_from_bits(x.view(np.uint32))).view(np.uint32) == x.view(np.uint32)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_half_precision_bits() -> None:
    values = np.concatenate([ODD_FLOATS, random_bits(5000)])
    values = values[~np.isnan(values)]
    assert [int(lanes.f16_bits(x)) for x in values] == values.astype(np.float16).view(np.uint16).tolist()


def test_half_precision_bits_between_neighbours() -> None:
    """Halfway between two neighbours, and one float32 to either side."""
    halves = EVERY_HALF[:0x7C00:37].view(np.float16).astype(np.float32)
    above = (EVERY_HALF[:0x7C00:37] + np.uint16(1)).view(np.float16).astype(np.float32)
    middle = ((halves + above) / 2)[:-1]
    for x in np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]):
        assert lanes.f16_bits(x) == np.float16(x).view(np.uint16), x


def test_half_precision_nan_is_quiet_and_keeps_its_sign() -> None:
    assert lanes.f16_bits(np.uint32(0x7F800001).view(np.float32)) == 0x7E00
    assert lanes.f16_bits(np.uint32(0xFFC12345).view(np.float32)) == 0xFE00


def test_half_precision_values() -> None:
    expected = EVERY_HALF.view(np.float16).astype(np.float32)
    for bits in EVERY_HALF[::7]:
        value = np.float32(lanes.f16_value(bits))
        if math.isnan(expected[bits]):
            assert math.isnan(value)
        else:
            assert value.view(np.uint32) == expected[bits].view(np.uint32)


def test_round_half_even() -> None:
    values = np.concatenate(
        [np.arange(-40, 40, dtype=np.float32) / 4, np.random.default_rng(0).uniform(-(2**22), 2**22, 500)]
    ).astype(np.float32)
    assert [int(lanes.round_half_even(x)) for x in values] == np.rint(values).astype(int).tolist()


def test_round_half_away() -> None:
    values = np.concatenate([np.arange(-40, 40) / 4, [0.49999997, -0.49999997, 8388607.5, 1e9, -1e30]])
    for x in values.astype(np.float32):
        assert lanes.round_half_away(x) == math.copysign(math.floor(abs(float(x)) + 0.5), x)


def test_truncated() -> None:
    cases = {0.99: 0, -0.99: 0, 127.9: 127, -127.9: -127, 128.0: 0, 1e10: 0, -1e10: 0}
    assert {x: int(lanes.truncated(np.float32(x))) for x in cases} == cases
    assert [int(lanes.truncated(np.float32(x))) for x in (np.nan, np.inf, -np.inf)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({3: 2.0, 9: -5.0, 20: 4.0}, -5.0),
        ({3: 2.0, 9: -5.0, 20: 5.0}, -5.0),
        ({3: 2.0, 9: 5.0, 20: -5.0}, 5.0),
        ({31: -1e-45}, -1e-45),
        ({}, 0.0),
    ],
)
def test_first_peak(places: dict[int, float], expected: float) -> None:
    x = np.zeros(32, dtype=np.float32)
    x[list(places)] = list(places.values())
    assert lanes.first_peak(x) == np.float32(expected)
    assert lanes.first_peak.py_func(x) == np.float32(expected)


def test_peak_of_negative_zeros_is_positive_zero() -> None:
    assert math.copysign(1, lanes.first_peak(np.full(32, -0.0, dtype=np.float32))) == 1


def test_scratch_begins_at_a_cache_line() -> None:
    for n_rows in (1, 3, 100):
        s = lanes.scratch(n_rows, 16)
        assert s.shape == (n_rows, 16)
        assert s.dtype == np.float32
        assert s.ctypes.data % 64 == 0


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_compiled_and_plain_functions_agree() -> None:
    for x in np.concatenate([ODD_FLOATS, random_bits(200, seed=1)]):
        assert lanes.f16_bits(x) == lanes.f16_bits.py_func(x)
        assert lanes.truncated(x) == lanes.truncated.py_func(x)


COUNT_HITS = """
import numpy as np
from gguf3n.quants import q8_0
q8_0.quantize(np.ones((1, 32), np.float32), np.empty((1, 34), np.uint8))
print(sum(q8_0.quantize.stats.cache_hits.values()))
"""


def test_compiled_kernels_are_kept_for_the_sources_of_the_whole_package(tmp_path: Path) -> None:
    """Parts are inlined from other files, so a kernel is not to be used again when one of those has changed."""
    package = tmp_path / "gguf3n"
    shutil.copytree(Path(gguf3n.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def hits() -> int:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", COUNT_HITS]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True, cwd=tmp_path).stdout)

    assert [hits(), hits()] == [0, 1]
    with open(package / "quants" / "q2_k.py", "a") as file:
        file.write("\n# changed\n")
    assert [hits(), hits()] == [0, 1]


def len_of(x: np.ndarray) -> int:
    return len(x)


def test_two_processes_that_compile_a_kernel_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find nothing, then both write, the first one last: neither signature may get the other's file."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    first, second = (dispatcher._cache._cache_file for dispatcher in (kernel(len_of), kernel(len_of)))
    first.flush()
    monkeypatch.setattr(second, "_load_index", dict)
    really = first._save_data

    def save_data(name: str, data: object) -> None:
        second.save("with importances", "other code")
        really(name, data)

    monkeypatch.setattr(first, "_save_data", save_data)
    first.save("without", "code")
    assert first.load("without") == "code"
    assert first.load("with importances") in (None, "other code")  # None: it is compiled again


def test_half_precision_is_written_low_byte_first() -> None:
    y = np.zeros(3, dtype=np.uint8)
    assert lanes.write_f16(np.float32(0.1), y) == np.float32(np.float16(0.1))
    assert y.tobytes() == np.float16(0.1).tobytes() + b"\0"


def test_gather_repeats_the_last_row() -> None:
    rows = np.arange(20 * 96, dtype=np.float32).reshape(20, 96)
    for first, expected in ((0, range(16)), (16, [16, 17, 18, *[19] * 13])):
        S = np.zeros((40, 16), dtype=np.float32)
        lanes.gather(rows, first, 32, 32, S)
        assert np.array_equal(S[:32], rows[list(expected), 32:64].T)
        assert not S[32:].any()


@kernel
def weigh_two(S: np.ndarray, quant_weights: np.ndarray | None) -> None:
    weigh(S, 1, 2, quant_weights, 3, load(S, 0), 4)


def test_importances_with_quant_weights_and_without() -> None:
    S = np.random.default_rng(0).standard_normal((6, 16), dtype=np.float32) ** 2
    quant_weights = np.arange(5, dtype=np.float32)
    weigh_two(S, quant_weights)
    assert np.array_equal(S[4:], quant_weights[3:, None] * np.sqrt(S[0] + S[1:3] * S[1:3]))
    weigh_two(S, None)
    assert np.array_equal(S[4:], S[1:3] * S[1:3])
