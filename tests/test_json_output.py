"""What --json prints: as Python's own encoder has it, in memory that does not grow with a file's arrays."""

from __future__ import annotations

import io
import json
import math
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf3n.cli.console import print_json
from gguf3n.cli.inspect import inspect
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import KeyValue
from gguf3n.formats.gguf_reader import PIECE_ITEMS, open_gguf
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.inspection.diff import diff
from gguf3n.outside import inert_json

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["##[error]x", "##vso[", "é"])
)
VALUES = st.recursive(
    SCALARS,
    lambda values: st.lists(values) | st.tuples(values) | st.dictionaries(st.text() | st.integers(0, 9), values),
    max_leaves=20,
)


def finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def printed(value: Any, capsys: pytest.CaptureFixture[str]) -> str:
    print_json(value)
    return capsys.readouterr().out


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES)
def test_as_json_has_it(value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(value, capsys) == inert_json(json.dumps(finite(value), indent=2, allow_nan=False)) + "\n"


def test_what_json_can_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError):
        print_json({"path": Path("x")})


ARRAYS: dict[str, tuple[VT, list[Any]]] = {
    "floats": (VT.FLOAT32, [0.1, 1.5, math.inf, -math.inf, math.nan, 1e30]),
    "integers": (VT.INT64, [-1, 0, 2**63 - 1]),
    "booleans": (VT.BOOL, [True, False]),
    "texts": (VT.STRING, ["", "a", "##[x]", "▁é\n"]),
    "none": (VT.UINT8, []),
    "several pieces": (VT.UINT8, [i % 251 for i in range(2 * PIECE_ITEMS + 3)]),
}


def write(path: Path, kind: VT, values: Any) -> Path:
    path.write_bytes(lay_out([KeyValue("x.array", VT.ARRAY, values, kind)], []).header)
    return path


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_a_file(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, values = ARRAYS[name]
    array = open_gguf(write(tmp_path / "x.gguf", kind, values)).keys["x.array"].value
    wanted = values if kind is not VT.FLOAT32 else np.array(values, np.float32).tolist()
    assert repr(list(array)) == repr(wanted) == repr(array.tolist())  # type: ignore[arg-type, union-attr]
    assert printed({"a": array}, capsys) == printed({"a": wanted}, capsys)


def test_memory_of_a_large_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """150,000 numbers, which are five megabytes as a list of objects, and as much as a text."""
    numbers = np.arange(150_000, dtype=np.float32)
    a, b = (write(tmp_path / name, VT.FLOAT32, numbers) for name in ("a.gguf", "b.gguf"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.FileIO(tmp_path / "out.json", "w")))
    tracemalloc.start()
    try:
        inspect(str(a), None, False, False, False, None, False, True)
        sys.stdout.flush()
        assert diff(a, b).equal
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()
        sys.stdout.close()
    found = json.loads((tmp_path / "out.json").read_text())["keys"]["x.array"]["value"]
    assert found == numbers.tolist()


@pytest.mark.parametrize(
    "x, y, n_different",
    [
        ((VT.FLOAT32, [1.0, math.nan, 2.0]), (VT.FLOAT32, [1.0, math.nan, 3.0]), 1),
        ((VT.FLOAT32, [1.0]), (VT.FLOAT32, [1.0, 2.0, 3.0]), 2),
        ((VT.UINT8, [1, 2] * PIECE_ITEMS), (VT.UINT8, [1, 3] * PIECE_ITEMS), PIECE_ITEMS),
        ((VT.INT64, [2**62 + 1]), (VT.FLOAT64, [2.0**62]), 1),
        ((VT.INT64, [5]), (VT.FLOAT64, [5.0]), 0),
        ((VT.STRING, ["a", "b"]), (VT.STRING, ["a", "c"]), 1),
        ((VT.UINT8, []), (VT.UINT8, []), None),
    ],
)
def test_items_that_differ(
    x: tuple[VT, list[Any]], y: tuple[VT, list[Any]], n_different: int | None, tmp_path: Path
) -> None:
    changes = diff(write(tmp_path / "a.gguf", *x), write(tmp_path / "b.gguf", *y)).keys
    assert [change.n_items for change in changes] == ([] if n_different is None else [n_different])
