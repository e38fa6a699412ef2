"""Files that mean harm: whatever the bytes, an answer or an error of ours, at once and in little memory."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf3n.errors import GGUFError
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType, tensor_bytes
from gguf3n.formats.gguf_reader import MAX_KEYS, MAX_STRINGS, MAX_TENSORS, MAX_TEXT_BYTES, open_gguf
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.inspection.lint import lint
from workshop import fuzzing

FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
INTEGERS = {
    kind: st.integers(-(2 ** (8 * n - 1)) if signed else 0, 2 ** (8 * n - signed) - 1)
    for kind, n, signed in (
        (GGUFValueType.UINT8, 1, False), (GGUFValueType.INT8, 1, True), (GGUFValueType.UINT16, 2, False),
        (GGUFValueType.INT16, 2, True), (GGUFValueType.UINT32, 4, False), (GGUFValueType.INT32, 4, True),
        (GGUFValueType.UINT64, 8, False), (GGUFValueType.INT64, 8, True),
    )
}  # fmt: skip
SCALARS = {
    **INTEGERS,
    GGUFValueType.FLOAT32: st.floats(width=32),
    GGUFValueType.FLOAT64: st.floats(),
    GGUFValueType.BOOL: st.booleans(),
    GGUFValueType.STRING: st.text(st.characters(codec="utf-8"), max_size=40),
}


@st.composite
def key_values(draw: st.DrawFn, name: str) -> KeyValue:
    kind = draw(st.sampled_from(sorted(SCALARS)))
    if draw(st.booleans()):
        return KeyValue(name, GGUFValueType.ARRAY, draw(st.lists(SCALARS[kind], max_size=8)), kind)
    return KeyValue(name, kind, draw(SCALARS[kind]))


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, list[KeyValue], list[tuple[str, tuple[int, ...], QType]]]:
    """A valid file of any keys and tensors."""
    names = draw(st.lists(NAMES.filter(lambda name: name != "general.alignment"), max_size=6, unique=True))
    keys = [draw(key_values(name)) for name in names]
    tensors = []
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        qtype = draw(st.sampled_from([QType.F32, QType.F16, QType.Q8_0, QType.Q4_K, QType.IQ2_XXS]))
        rows = draw(st.lists(st.integers(0, 3), max_size=3))
        tensors.append((name, (*rows, 256 * draw(st.integers(0, 2))), qtype))
    layout = lay_out(keys, tensors)
    return layout.header + bytes(layout.total_bytes - len(layout.header)), keys, tensors


@FEW
@given(file=files())
def test_a_valid_file_is_read_as_written(
    file: tuple[bytes, list[KeyValue], list[tuple[str, tuple[int, ...], QType]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data, keys, tensors = file
    path = tmp_path_factory.getbasetemp() / "valid.gguf"
    path.write_bytes(data)
    gguf = open_gguf(path)
    assert [(key.name, key.type) for key in gguf.all_keys] == [(key.name, key.type) for key in keys]
    for key in keys:
        found = gguf.value(key.name)
        assert repr(found) == repr(list(key.value) if isinstance(key.value, list) else key.value)
    assert [(t.name, t.shape, t.qtype, t.n_bytes) for t in gguf.all_tensors] == [
        (name, shape, qtype, tensor_bytes(qtype, shape)) for name, shape, qtype in tensors
    ]
    assert lint(path).skipped is not None
    fuzzing.check(data)


@FEW
@given(file=files(), seed=st.integers(0, 2**32))
def test_a_mutated_file_is_refused_or_read(
    file: tuple[bytes, list[KeyValue], list[tuple[str, tuple[int, ...], QType]]], seed: int
) -> None:
    fuzzing.test_one_input(fuzzing.mutate(file[0], random.Random(seed)))


@pytest.mark.parametrize("number", range(len(fuzzing.seeds())))
def test_mutations_of_the_fuzzers_seeds(number: int) -> None:
    seed = fuzzing.seeds()[number]
    rng = random.Random(number)
    for _ in range(300):
        fuzzing.test_one_input(fuzzing.mutate(seed, rng))


@FEW
@given(data=st.binary(max_size=200), version=st.sampled_from([2, 3]))
def test_any_bytes_after_the_version(data: bytes, version: int) -> None:
    fuzzing.check(struct.pack("<4sI", b"GGUF", version) + data)


def text(words: bytes) -> bytes:
    return struct.pack("<Q", len(words)) + words


def header(n_tensors: int, n_keys: int, *parts: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys) + b"".join(parts)


HUGE = 1 << 40
"""The size that the file claims by being sparse: counts then fit the file, and only the named limits stand."""

LIMITS: dict[str, tuple[bytes, str]] = {
    "keys": (header(0, MAX_KEYS + 1), "too large"),
    "tensors": (header(MAX_TENSORS + 1, 0), "too large"),
    "strings": (header(0, 1, text(b"a"), struct.pack("<IIQ", 9, 8, MAX_STRINGS + 1)), "too large"),
    "a string": (header(0, 1, text(b"a"), struct.pack("<IQ", 8, MAX_TEXT_BYTES + 1)), "too much text"),
    "a string in an array": (header(0, 1, text(b"a"), struct.pack("<IIQQ", 9, 8, 2, 1 << 39)), "too long"),
    "numbers": (header(0, 1, text(b"a"), struct.pack("<IIQ", 9, 0, 1 << 39)), "too long"),
    "a name": (header(0, 1, struct.pack("<Q", 1 << 30)), "too long"),
    "dimensions": (header(1, 0, text(b"t"), struct.pack("<I", 5)), "dimensions"),
    "nesting": (header(0, 1, text(b"a"), struct.pack("<IIQI", 9, 9, 1, 9)), "array of arrays"),
    "a product": (header(1, 0, text(b"t"), struct.pack("<I4QIQ", 4, *[1 << 62] * 4, 0, 0)), "past the file"),
    "an offset": (header(1, 0, text(b"t"), struct.pack("<IQIQ", 1, 8, 0, 1 << 63)), "past the file"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit(tmp_path: Path, limit: str) -> None:
    """In a file that is as large as its header claims, so that nothing but the limit can stop the reader."""
    data, message = LIMITS[limit]
    path = tmp_path / "x.gguf"
    with open(path, "wb") as file:
        file.write(data)
        file.truncate(HUGE)
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(GGUFError, match=message):
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    assert time.monotonic() - started < 2
