"""The GGUF reader and writer, against annotated bytes, the gguf package, and files that break the format."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gguf3n.errors import GGUFError, OutputError
from gguf3n.formats import whole_file
from gguf3n.formats.byte_source import LocalFile
from gguf3n.formats.gguf_layout import SCALAR_CODES, GGUFValueType, KeyValue, QType, aligned, row_bytes, tensor_bytes
from gguf3n.formats.gguf_reader import FIRST_READ_BYTES, MAX_READ_BYTES, GGUFArray, open_gguf, read_header
from gguf3n.formats.gguf_writer import GGUFWriter, Layout, lay_out
from gguf3n.formats.offset_files import OffsetFiles
from gguf3n.formats.whole_file import check_space, make_directory, output_error
from tests.mutation import Edit, edits, every_run_alike, mutate

VT = GGUFValueType

MINIMAL = """
47 47 55 46                    # magic "GGUF"
03 00 00 00                    # version
01 00 00 00 00 00 00 00        # one tensor
03 00 00 00 00 00 00 00        # three keys
  01 00 00 00 00 00 00 00 61   # name: one byte, "a"
  04 00 00 00                  # uint32
  2a 00 00 00                  # 42
  01 00 00 00 00 00 00 00 62   # name: one byte, "b"
  09 00 00 00                  # array
  03 00 00 00                  # of int16
  02 00 00 00 00 00 00 00      # two of them
  01 00 ff ff                  # 1, -1
  01 00 00 00 00 00 00 00 63   # name: one byte, "c"
  08 00 00 00                  # string
  02 00 00 00 00 00 00 00      # of two bytes
  c3 a9                        # é
01 00 00 00 00 00 00 00 74     # tensor name: one byte, "t"
  02 00 00 00                  # two dimensions
  03 00 00 00 00 00 00 00      # row length
  02 00 00 00 00 00 00 00      # rows
  00 00 00 00                  # F32
  00 00 00 00 00 00 00 00      # offset in the data
00 00 00 00 00 00 00 00 00 00 00 00 00  # padding from byte 134
00 00 00 00 00 00 00 00 00 00 00 00 00  # to byte 160
00 00 00 00 00 00 80 3f 00 00 00 40     # 0 1 2
00 00 40 40 00 00 80 40 00 00 a0 40     # 3 4 5
00 00 00 00 00 00 00 00                 # padding of the data to 32 bytes
"""
MINIMAL_BYTES = bytes.fromhex(re.sub("#.*", "", MINIMAL))

MINIMAL_KEYS = [
    KeyValue("a", VT.UINT32, 42),
    KeyValue("b", VT.ARRAY, [1, -1], VT.INT16),
    KeyValue("c", VT.STRING, "é"),
]


def write(path: Path, keys: list[KeyValue], arrays: dict[str, np.ndarray]) -> Layout:
    """A file of float32 tensors."""
    layout = lay_out(keys, [(name, array.shape, QType.F32) for name, array in arrays.items()])
    with GGUFWriter(path, layout) as writer:
        for slot, array in zip(layout.slots, arrays.values(), strict=True):
            writer.write_at(slot.offset, array.reshape(-1).view(np.uint8))
        writer.commit()
    return layout


def test_the_writer_writes_the_annotated_bytes(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", MINIMAL_KEYS, {"t": np.arange(6, dtype=np.float32).reshape(2, 3)})
    assert (tmp_path / "x.gguf").read_bytes() == MINIMAL_BYTES


def test_the_reader_reads_the_annotated_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(MINIMAL_BYTES)
    file = open_gguf(path)
    assert (file.path, file.version, file.byte_order, file.alignment) == (path, 3, "little", 32)
    assert (file.header_bytes, file.file_bytes) == (160, 192)
    assert (file.n_weights, file.bits_per_weight) == (6, 32)
    assert {name: (key.type_name, file.value(name)) for name, key in file.keys.items()} == {
        "a": ("uint32", 42),
        "b": ("array of int16", [1, -1]),
        "c": ("string", "é"),
    }
    (tensor,) = file.tensors.values()
    assert (tensor.name, tensor.shape, tensor.qtype, tensor.offset, tensor.n_bytes) == ("t", (2, 3), QType.F32, 160, 24)
    with pytest.raises(KeyError):
        file.value("d")


# round trips

EXTREMES: dict[GGUFValueType, list[Any]] = {
    VT.UINT8: [0, 255],
    VT.INT8: [-128, 127],
    VT.UINT16: [0, 65535],
    VT.INT16: [-32768, 32767],
    VT.UINT32: [0, 2**32 - 1],
    VT.INT32: [-(2**31), 2**31 - 1],
    VT.UINT64: [0, 2**64 - 1],
    VT.INT64: [-(2**63), 2**63 - 1],
    VT.FLOAT32: [0.0, -1.5, 3.4028234663852886e38, float("inf"), float("-inf")],
    VT.FLOAT64: [0.1, -1e308, float("inf")],
    VT.BOOL: [False, True],
    VT.STRING: ["", "a", "▁naïve\n\t\0 🙂"],
}
ALL_KEYS = [
    KeyValue(f"{kind.name.lower()}.{i}", kind, value)
    for kind, values in EXTREMES.items()
    for i, value in enumerate(values)
] + [KeyValue(f"array.{kind.name.lower()}", VT.ARRAY, values, kind) for kind, values in EXTREMES.items()]


def test_the_table_of_value_types_is_complete() -> None:
    assert set(EXTREMES) == set(VT) - {VT.ARRAY}
    assert set(SCALAR_CODES) == set(VT) - {VT.ARRAY, VT.STRING}


def test_every_value_type_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", ALL_KEYS, {})
    file = open_gguf(tmp_path / "x.gguf")
    assert list(file.keys) == [key.name for key in ALL_KEYS]
    for key in ALL_KEYS:
        assert file.keys[key.name].type is key.type
        assert file.value(key.name) == key.value
        read = file.keys[key.name].value
        if key.element_type is not None:
            assert isinstance(read, GGUFArray)
            assert (read.element_type, len(read)) == (key.element_type, len(key.value))  # type: ignore[arg-type]
            assert read.head(1) == list(key.value)[:1]  # type: ignore[arg-type]
        else:
            assert type(read) is type(key.value)


def test_the_gguf_package_reads_every_value_type(tmp_path: Path) -> None:
    weights = {"a": np.arange(12, dtype=np.float32).reshape(2, 2, 3), "b": np.array([7], np.float32)}
    keys = [key for key in ALL_KEYS if not key.name.startswith("array.string") and "\0" not in str(key.value)]
    write(tmp_path / "x.gguf", [*keys, KeyValue("words", VT.ARRAY, ["a", "é"], VT.STRING)], weights)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for key in keys:
        field = reader.fields[key.name]
        assert field.types == [key.type] if key.element_type is None else [VT.ARRAY, key.element_type]
        assert field.contents() == key.value
    assert reader.fields["words"].contents() == ["a", "é"]
    for tensor, (name, array) in zip(reader.tensors, weights.items(), strict=True):
        assert tensor.name == name
        assert tensor.shape.tolist() == list(array.shape[::-1])
        assert np.array_equal(tensor.data, array)


def test_what_the_gguf_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma3n")
    writer.add_custom_alignment(64)
    writer.add_array("words", ["a", "", "é"])
    writer.add_float32("x.half", 0.5)
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_tensor("one", weights)
    writer.add_tensor("two", weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "x.gguf")
    assert file.alignment == 64
    assert file.value("general.architecture") == "gemma3n"
    assert file.value("words") == ["a", "", "é"]
    assert file.value("x.half") == 0.5
    data = (tmp_path / "x.gguf").read_bytes()
    one, two = file.tensors["one"], file.tensors["two"]
    assert one.offset % 64 == two.offset % 64 == 0
    assert (one.shape, one.qtype, two.shape, two.qtype) == ((2, 3), QType.F32, (2, 3), QType.F16)
    assert data[one.offset :][: one.n_bytes] == weights.tobytes()
    assert data[two.offset :][: two.n_bytes] == weights.astype(np.float16).tobytes()


def strings(size: int) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["Cs"]), max_size=size)


VALUES: dict[GGUFValueType, st.SearchStrategy[Any]] = {
    VT.UINT8: st.integers(0, 255),
    VT.INT8: st.integers(-128, 127),
    VT.UINT16: st.integers(0, 2**16 - 1),
    VT.INT16: st.integers(-(2**15), 2**15 - 1),
    VT.UINT32: st.integers(0, 2**32 - 1),
    VT.INT32: st.integers(-(2**31), 2**31 - 1),
    VT.UINT64: st.integers(0, 2**64 - 1),
    VT.INT64: st.integers(-(2**63), 2**63 - 1),
    VT.FLOAT32: st.floats(width=32, allow_nan=False),
    VT.FLOAT64: st.floats(allow_nan=False),
    VT.BOOL: st.booleans(),
    VT.STRING: strings(20),
}
scalar_keys = st.sampled_from(sorted(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), st.none(), VALUES[kind]))
array_keys = st.sampled_from(sorted(VALUES)).flatmap(
    lambda kind: st.tuples(st.just(VT.ARRAY), st.just(kind), st.lists(VALUES[kind], max_size=5))
)
tensors = st.dictionaries(strings(8), st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple), max_size=4)


@given(st.dictionaries(strings(8), scalar_keys | array_keys, max_size=6), tensors)
@settings(every_run_alike, max_examples=60)
def test_any_file_comes_back(
    tmp_path: Path, values: dict[str, tuple[VT, VT | None, Any]], shapes: dict[str, tuple[int, ...]]
) -> None:
    values.pop("general.alignment", None)
    path = tmp_path / "x.gguf"
    path.unlink(missing_ok=True)
    arrays = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(shapes.items())}
    layout = write(path, [KeyValue(name, kind, v, element) for name, (kind, element, v) in values.items()], arrays)
    file = open_gguf(path)
    assert {name: file.value(name) for name in file.keys} == {name: value for name, (_, _, value) in values.items()}
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == shapes
    assert [tensor.offset for tensor in file.tensors.values()] == [slot.offset for slot in layout.slots]
    data = path.read_bytes()
    assert len(data) == layout.total_bytes
    for name, tensor in file.tensors.items():
        assert data[tensor.offset : tensor.offset + tensor.n_bytes] == arrays[name].tobytes()


# what others write


class Packer:
    """GGUF pieces in either byte order, written down independently of the package."""

    def __init__(self, order: str = "<") -> None:
        self.order = order

    def u32(self, n: int) -> bytes:
        return struct.pack(self.order + "I", n)

    def u64(self, n: int) -> bytes:
        return struct.pack(self.order + "Q", n)

    def string(self, text: str | bytes) -> bytes:
        data = text.encode() if isinstance(text, str) else text
        return self.u64(len(data)) + data

    def key(self, name: str | bytes, kind: int, value: bytes) -> bytes:
        return self.string(name) + self.u32(kind) + value

    def array(self, kind: int, count: int, data: bytes) -> bytes:
        return self.u32(kind) + self.u64(count) + data

    def tensor(self, name: str | bytes, ne: list[int], qtype: int = 0, offset: int = 0) -> bytes:
        return self.string(name) + self.u32(len(ne)) + b"".join(map(self.u64, ne)) + self.u32(qtype) + self.u64(offset)

    def file(
        self,
        keys: list[bytes] | None = None,
        tensors: list[bytes] | None = None,
        data: bytes = b"",
        *,
        version: int = 3,
        counts: tuple[int, int] | None = None,
        alignment: int = 32,
    ) -> bytes:
        keys, tensors = keys or [], tensors or []
        n_tensors, n_keys = counts or (len(tensors), len(keys))
        header = b"GGUF" + self.u32(version) + self.u64(n_tensors) + self.u64(n_keys) + b"".join(keys + tensors)
        return header + bytes(-len(header) % alignment) + data


LITTLE, BIG = Packer("<"), Packer(">")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("packer", [LITTLE, BIG], ids=["little-endian", "big-endian"])
def test_both_byte_orders(tmp_path: Path, packer: Packer, version: int) -> None:
    path = tmp_path / "x.gguf"
    keys = [
        packer.key("n", VT.INT32, struct.pack(packer.order + "i", -7)),
        packer.key("words", VT.ARRAY, packer.array(VT.STRING, 2, packer.string("a") + packer.string("é"))),
        packer.key("floats", VT.ARRAY, packer.array(VT.FLOAT32, 2, struct.pack(packer.order + "2f", 1.5, -2))),
    ]
    path.write_bytes(packer.file(keys, [packer.tensor("t", [8, 2])], bytes(64), version=version))
    file = open_gguf(path)
    assert (file.version, file.byte_order) == (version, "little" if packer is LITTLE else "big")
    assert {name: file.value(name) for name in file.keys} == {"n": -7, "words": ["a", "é"], "floats": [1.5, -2.0]}
    assert file.tensors["t"].shape == (2, 8)


def test_an_alignment_of_the_files_own(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    keys = [LITTLE.key("general.alignment", VT.UINT32, LITTLE.u32(8))]
    tensors = [LITTLE.tensor("a", [2]), LITTLE.tensor("b", [2], offset=8)]
    path.write_bytes(LITTLE.file(keys, tensors, bytes(16), alignment=8))
    file = open_gguf(path)
    assert file.alignment == 8
    assert [tensor.offset - file.header_bytes for tensor in file.tensors.values()] == [0, 8]


def test_tensors_need_not_be_in_order_nor_tight_nor_have_elements(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tensors = [
        LITTLE.tensor("last", [8], offset=128),
        LITTLE.tensor("first", [8], offset=32),
        LITTLE.tensor("none", [0], offset=32),
    ]
    path.write_bytes(LITTLE.file([], tensors, bytes(200)))
    assert list(open_gguf(path).tensors) == ["last", "first", "none"]


def test_tokens_need_not_be_utf8_wherever_they_lie(tmp_path: Path) -> None:
    """An element that crosses the end of what has been read is stepped over like any other."""
    path = tmp_path / "x.gguf"
    token = LITTLE.string(b"\xff" * 5)
    n = FIRST_READ_BYTES // len(token) + 100
    path.write_bytes(LITTLE.file([LITTLE.key("t", VT.ARRAY, LITTLE.array(VT.STRING, n, token * n))]))
    value = open_gguf(path).value("t")
    assert value == ["�" * 5] * n


# what breaks the format

K, TENSOR = LITTLE.key, LITTLE.tensor
TWO_TENSORS = [TENSOR("a", [8]), TENSOR("b", [8], offset=32)]

BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    # content, what the message must say beside the file's name
    "empty": (b"", ("truncated in the magic number",)),
    "three bytes": (b"GGU", ("truncated in the magic number",)),
    "another magic": (b"ggml" + bytes(60), ("not a GGUF file", "b'ggml'")),
    "safetensors": (struct.pack("<Q", 2) + b"{}", ("not a GGUF file",)),
    "magic only": (b"GGUF", ("truncated in the version",)),
    "version 0": (LITTLE.file(version=0), ("version 0 is not supported", "version 2 or 3")),
    "version 1": (LITTLE.file(version=1), ("version 1 is not supported", "version 2 or 3")),
    "version 4": (LITTLE.file(version=4), ("version 4 is not supported", "version 2 or 3")),
    "no counts": (LITTLE.file()[:12], ("truncated in the tensor count",)),
    "tensor count too large": (LITTLE.file(counts=(2**63, 0)), ("the tensor count is impossible", f"{2**63:,}")),
    "key count too large": (LITTLE.file(counts=(0, 10**6)), ("the key count is impossible", "1,000,000")),
    "a key less than counted": (
        LITTLE.file([K("k" * 20, VT.UINT8, b"\1")], counts=(0, 2), alignment=1),
        ("truncated in the length of the name of key 1",),
    ),
    "a tensor less than counted": (
        LITTLE.file([], [TENSOR("t" * 40, [8])], counts=(2, 0), alignment=1),
        ("truncated in the length of the name of tensor 1",),
    ),
    "key name past the end": (
        LITTLE.file([LITTLE.u64(1000) + b"abcd" + bytes(9)]),
        ("the length of the name of key 0 is impossible", "1,000"),
    ),
    "key name too long": (LITTLE.file([K("k" * 70_000, VT.UINT8, b"\1")]), ("the name of key 0 is too long",)),
    "key name not UTF-8": (LITTLE.file([K(b"\xff", VT.UINT8, b"\1")]), ("the name of key 0 is not UTF-8",)),
    "key type unknown": (LITTLE.file([K("k", 13, bytes(8))]), ("the type of key 'k' is unknown", "13")),
    "key without a value": (LITTLE.file([K("key", VT.UINT64, b"")], alignment=1), ("truncated in key 'key'",)),
    "key twice": (LITTLE.file([K("k", VT.UINT8, b"\1")] * 2), ("key 'k' stands twice",)),
    "string past the end": (
        LITTLE.file([K("k", VT.STRING, LITTLE.u64(2**40) + b"abc")]),
        ("the length of key 'k' is impossible", f"{2**40:,}"),
    ),
    "string not UTF-8": (LITTLE.file([K("k", VT.STRING, LITTLE.string(b"a\xc3"))]), ("key 'k' is not UTF-8",)),
    "array of arrays": (
        LITTLE.file([K("k", VT.ARRAY, LITTLE.array(VT.ARRAY, 1, LITTLE.array(VT.UINT8, 1, b"\1")))]),
        ("key 'k' is an array of arrays",),
    ),
    "array element type unknown": (
        LITTLE.file([K("k", VT.ARRAY, LITTLE.array(99, 1, bytes(8)))]),
        ("the element type of key 'k' is unknown", "99"),
    ),
    "array of numbers past the end": (
        LITTLE.file([K("k", VT.ARRAY, LITTLE.array(VT.FLOAT32, 2**62, bytes(8)))]),
        ("the element count of key 'k' is impossible", f"{2**62:,}"),
    ),
    "array of strings past the end": (
        LITTLE.file([K("k", VT.ARRAY, LITTLE.array(VT.STRING, 2**62, bytes(8)))]),
        ("the element count of key 'k' is impossible",),
    ),
    "string of an array past the end": (
        LITTLE.file([K("k", VT.ARRAY, LITTLE.array(VT.STRING, 2, LITTLE.string("a") + LITTLE.u64(2**50)))]),
        ("a string of key 'k' is impossible", f"{2**50:,}"),
    ),
    "array of strings cut off": (
        LITTLE.file([K("k", VT.ARRAY, LITTLE.array(VT.STRING, 3, LITTLE.string("aaaaaaaaaaaaa") * 2))], alignment=1),
        ("truncated", "key 'k'"),
    ),
    "alignment of another type": (
        LITTLE.file([K("general.alignment", VT.UINT64, LITTLE.u64(32))]),
        ("general.alignment has the wrong type", "uint64"),
    ),
    "alignment an array": (
        LITTLE.file([K("general.alignment", VT.ARRAY, LITTLE.array(VT.UINT32, 1, LITTLE.u32(32)))]),
        ("general.alignment has the wrong type", "array of uint32"),
    ),
    "alignment zero": (LITTLE.file([K("general.alignment", VT.UINT32, LITTLE.u32(0))]), ("power of two", "0")),
    "alignment no power of two": (
        LITTLE.file([K("general.alignment", VT.UINT32, LITTLE.u32(48))]),
        ("general.alignment is impossible", "power of two", "48"),
    ),
    "alignment huge": (LITTLE.file([K("general.alignment", VT.UINT32, LITTLE.u32(1 << 31))]), ("power of two",)),
    "tensor name not UTF-8": (
        LITTLE.file([], [TENSOR(b"\xff", [8])], bytes(32)),
        ("the name of tensor 0 is not UTF-8",),
    ),
    "tensor without dimensions": (LITTLE.file([], [TENSOR("t", [])], bytes(32)), ("'t'", "number of dimensions", "0")),
    "tensor of five dimensions": (LITTLE.file([], [TENSOR("t", [1] * 5)], bytes(32)), ("'t'", "1 to 4", "5")),
    "tensor of a removed type": (
        LITTLE.file([], [TENSOR("t", [32], qtype=4)], bytes(32)),
        ("'t'", "unknown type", "4"),
    ),
    "tensor of an unknown type": (LITTLE.file([], [TENSOR("t", [32], qtype=999)], bytes(32)), ("'t'", "unknown type")),
    "tensor with part of a block": (
        LITTLE.file([], [TENSOR("t", [33], qtype=QType.Q8_0)], bytes(64)),
        ("'t'", "impossible shape", "blocks of 32", "33"),
    ),
    "tensor twice": (
        LITTLE.file([], [TENSOR("t", [8]), TENSOR("t", [8], offset=32)], bytes(64)),
        ("'t' stands twice",),
    ),
    "tensor not aligned": (LITTLE.file([], [TENSOR("t", [8], offset=8)], bytes(64)), ("'t' is not aligned", "32", "8")),
    "tensors overlapping": (
        LITTLE.file([], [TENSOR("a", [16]), TENSOR("b", [8], offset=32)], bytes(64)),
        ("'b' overlaps another",),
    ),
    "tensors at one place": (LITTLE.file([], [TENSOR("a", [8]), TENSOR("b", [8])], bytes(64)), ("overlaps another",)),
    "data truncated": (LITTLE.file([], TWO_TENSORS, bytes(63)), ("truncated: tensor 'b' ends past the file",)),
    "no data": (LITTLE.file([], TWO_TENSORS), ("truncated: tensor 'a' ends past the file",)),
    "tensor of exabytes": (LITTLE.file([], [TENSOR("t", [2**63] * 4)], bytes(64)), ("'t' ends past the file",)),
    "offset of exabytes": (LITTLE.file([], [TENSOR("t", [8], offset=2**63)], bytes(64)), ("'t' ends past the file",)),
    "big-endian, truncated": (BIG.file([], [BIG.tensor("t", [8])], bytes(31)), ("'t' ends past the file",)),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file(tmp_path: Path, content: bytes, said: tuple[str, ...]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    assert caught.value.exit_code == 11
    assert str(path) in caught.value.what
    for text in said:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 1000


LAYOUT_FAULTS = {
    # case of BROKEN -> what strict=False calls it
    "key twice": "duplicate-key",
    "alignment zero": "alignment-key",
    "alignment of another type": "alignment-key",
    "tensor twice": "duplicate-tensor",
    "tensor not aligned": "misaligned",
    "tensors overlapping": "overlap",
    "tensors at one place": "overlap",
    "data truncated": "truncated",
    "offset of exabytes": "truncated",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_fault_of_the_layout_can_be_collected(tmp_path: Path, case: str) -> None:
    content, said = BROKEN[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    try:
        file = open_gguf(path, strict=False)
    except GGUFError as error:
        assert case not in LAYOUT_FAULTS
        assert said[0] in str(error)
        return
    problem = file.problems[0]
    if case in LAYOUT_FAULTS:
        assert problem.kind == LAYOUT_FAULTS[case]
    assert said[0] in f"{problem.what} {problem.expected} {problem.found}"


@pytest.mark.parametrize("cut", range(0, len(MINIMAL_BYTES) - 8, 3))
def test_a_file_cut_anywhere(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(MINIMAL_BYTES[:cut])
    with pytest.raises(GGUFError, match=r"truncated|impossible"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda path: path.mkdir(), "not a file"), (lambda path: None, "no such file")],
    ids=["directory", "missing"],
)
def test_what_cannot_be_opened(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    make(tmp_path / "x.gguf")
    with pytest.raises(GGUFError) as caught:
        open_gguf(tmp_path / "x.gguf")
    assert caught.value.what == f"{tmp_path / 'x.gguf'}: {said}"


FULL = LITTLE.file(
    [
        K("n", VT.UINT32, LITTLE.u32(7)),
        K("words", VT.ARRAY, LITTLE.array(VT.STRING, 3, LITTLE.string("ab") * 3)),
        K("floats", VT.ARRAY, LITTLE.array(VT.FLOAT32, 3, bytes(12))),
        K("flag", VT.BOOL, b"\1"),
    ],
    [TENSOR("a", [32, 2], qtype=QType.Q8_0), TENSOR("b", [8], offset=96)],
    bytes(128),
)


@given(edits)
@example([(0, 7, 3), (0, 4, 0)])
@settings(every_run_alike, max_examples=400)
def test_changed_bytes_are_a_gguf_error_or_a_consistent_file(tmp_path: Path, edits: list[Edit]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(mutate(FULL, edits))
    try:
        file = open_gguf(path)
    except GGUFError as error:
        assert str(path) in str(error)
        return
    for name in file.keys:
        file.value(name)
    for tensor in file.tensors.values():
        assert tensor.offset % file.alignment == 0
        assert file.header_bytes <= tensor.offset <= tensor.offset + tensor.n_bytes <= file.file_bytes


# what is read and what it costs


class CountingFile(LocalFile):
    """A local file that counts the bytes read."""

    n_read = 0

    def read_at(self, offset: int, count: int) -> bytes:
        data = super().read_at(offset, count)
        self.n_read += len(data)
        return data


def test_a_full_vocabulary_is_read_once_and_the_weights_never(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tokens = [f"▁token{i}" for i in range(262_144)]
    layout = lay_out(
        [
            KeyValue("tokenizer.ggml.tokens", VT.ARRAY, tokens, VT.STRING),
            KeyValue("tokenizer.ggml.scores", VT.ARRAY, np.arange(262_144, dtype=np.float32).tolist(), VT.FLOAT32),
        ],
        [("t", (1 << 20, 2048), QType.F32)],
    )
    path.write_bytes(layout.header)
    os.truncate(path, layout.total_bytes)  # 8 GiB, sparse
    source = CountingFile(path)
    file = read_header(source)
    assert file.header_bytes == len(layout.header)
    assert source.n_read <= len(layout.header) + MAX_READ_BYTES
    words = file.keys["tokenizer.ggml.tokens"].value
    assert isinstance(words, GGUFArray)
    assert words.head(2) == tokens[:2]
    assert words.tolist() == tokens


def test_a_small_header_is_one_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(MINIMAL_BYTES)
    os.truncate(path, 1 << 30)
    source = CountingFile(path)
    assert list(read_header(source).keys) == ["a", "b", "c"]
    assert source.n_read == FIRST_READ_BYTES


@pytest.mark.parametrize(
    "content",
    [
        LITTLE.file(counts=(10**9, 0)),
        LITTLE.file(counts=(0, 10**9)),
        LITTLE.file([LITTLE.u64(10**9) + bytes(20)]),
        LITTLE.file([K("k", VT.ARRAY, LITTLE.array(VT.FLOAT64, 10**9, b""))]),
        LITTLE.file([K("k", VT.ARRAY, LITTLE.array(VT.STRING, 10**9, b""))]),
        LITTLE.file([K("k", VT.STRING, LITTLE.u64(10**9))]),
        LITTLE.file([], [TENSOR("t", [10**9] * 4)]),
    ],
    ids=["tensors", "keys", "name", "numbers", "strings", "string", "dimensions"],
)
def test_a_claimed_count_allocates_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


# layout


@pytest.mark.parametrize(("offset", "to"), [(0, 0), (1, 32), (31, 32), (32, 32), (33, 64)])
def test_aligned(offset: int, to: int) -> None:
    assert aligned(offset) == to


@pytest.mark.parametrize("qtype", QType, ids=lambda qtype: qtype.name)
def test_bytes_of_every_type(qtype: QType) -> None:
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    assert row_bytes(qtype, 3 * block_size) == 3 * block_bytes
    assert tensor_bytes(qtype, (2, 5, 3 * block_size)) == 30 * block_bytes
    if block_size > 1:
        with pytest.raises(ValueError, match=f"{qtype.name} stores blocks of {block_size}"):
            row_bytes(qtype, block_size + 1)


def test_every_slot_is_aligned_and_tight() -> None:
    layout = lay_out([], [("a", (5,), QType.F32), ("b", (3, 32), QType.Q8_0), ("c", (1,), QType.F16)])
    data = len(layout.header)
    assert data % 32 == 0
    assert [slot.offset - data for slot in layout.slots] == [0, 32, 160]
    assert layout.total_bytes == data + 192


@pytest.mark.parametrize(
    ("key", "error"),
    [
        (KeyValue("k", VT.UINT8, 256), struct.error),
        (KeyValue("k", VT.UINT32, -1), struct.error),
        (KeyValue("k", VT.INT32, 1.5), struct.error),
        (KeyValue("k", VT.FLOAT32, 1e39), OverflowError),
        (KeyValue("k", VT.ARRAY, [2**31], VT.INT32), OverflowError),
        (KeyValue("k", VT.ARRAY, [1]), ValueError),
    ],
    ids=["uint8", "uint32", "int32", "float32", "array", "array-without-type"],
)
def test_a_value_that_does_not_fit_is_not_written_wrong(key: KeyValue, error: type[Exception]) -> None:
    with pytest.raises(error):
        lay_out([key], [])


def test_half_a_surrogate_pair_becomes_a_question_mark(tmp_path: Path) -> None:
    write(tmp_path / "x.gguf", [KeyValue("k", VT.STRING, "a\udcffb")], {})
    assert open_gguf(tmp_path / "x.gguf").value("k") == "a?b"


# writing

LAYOUT = lay_out(MINIMAL_KEYS, [("t", (1000, 32), QType.F32)])


def test_rows_may_come_in_any_order_from_several_threads(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    rows = np.random.default_rng(0).standard_normal((1000, 32), np.float32)
    order = np.random.default_rng(1).permutation(1000)
    (slot,) = LAYOUT.slots
    with GGUFWriter(path, LAYOUT) as writer:

        def write_some(which: np.ndarray) -> None:
            for row in which:
                writer.write_at(slot.offset + 128 * int(row), rows[row].view(np.uint8))

        threads = [threading.Thread(target=write_some, args=(part,)) for part in np.array_split(order, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not path.exists()
        writer.commit()
    assert path.read_bytes() == LAYOUT.header + rows.tobytes()


def test_nothing_is_left_without_a_commit(tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "x.gguf", LAYOUT):
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".x.gguf.")
        assert partial.name.endswith(".partial")
        assert partial.stat().st_size == LAYOUT.total_bytes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OutputError], ids=lambda error: error.__name__)
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), GGUFWriter(tmp_path / "x.gguf", LAYOUT) as writer:
        writer.write_at(LAYOUT.slots[0].offset, np.ones(8, np.uint8))
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_nothing_is_left_when_even_the_header_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(whole_file, "lock", fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        GGUFWriter(tmp_path / "x.gguf", LAYOUT).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "x.gguf", [], {})
        assert stat.S_IMODE((tmp_path / "x.gguf").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        GGUFWriter(path, LAYOUT).__enter__()
    assert path.read_text() == "mine"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(OutputError, match="exists already"), GGUFWriter(path, LAYOUT) as writer:
        path.write_text("mine")
        writer.commit()
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_force_replaces_a_file_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("old")
    with GGUFWriter(path, LAYOUT, force=True) as writer:
        assert path.read_text() == "old"
        writer.commit()
    assert path.stat().st_size == LAYOUT.total_bytes


def below_a_file(directory: Path) -> Path:
    (directory / "file").write_bytes(b"")
    return directory / "file" / "x.gguf"


@pytest.mark.parametrize(
    ("path_in", "said"),
    [
        (lambda directory: directory, "is a directory"),
        (lambda directory: directory / "missing" / "x.gguf", "missing"),
        (below_a_file, "file"),
        (lambda directory: directory / ("x" * 300 + ".gguf"), "too long"),
    ],
    ids=["directory", "missing-directory", "below-a-file", "name-too-long"],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, path_in: Callable[[Path], Path], said: str) -> None:
    with pytest.raises(OutputError, match=said) as caught:
        GGUFWriter(path_in(tmp_path), LAYOUT).__enter__()
    assert caught.value.exit_code == 10
    assert not list(tmp_path.glob(".*"))


def test_a_disk_without_room_is_told_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=LAYOUT.total_bytes - 1))
    with pytest.raises(OutputError, match="not enough space") as caught:
        GGUFWriter(tmp_path / "x.gguf", LAYOUT).__enter__()
    assert f"{LAYOUT.total_bytes:,}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    check_space(tmp_path / "x.gguf", LAYOUT.total_bytes - 1)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.EIO, "cannot be written"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    error = OSError(number, os.strerror(number))
    assert said in output_error(tmp_path, error).what

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(OffsetFiles, "write_at", fail)
    with pytest.raises(OutputError, match=said), GGUFWriter(tmp_path / "x.gguf", LAYOUT) as writer:
        writer.write_at(0, np.zeros(1, np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_directories_are_made_where_there_are_none(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    with pytest.raises(OutputError, match="is not a directory"):
        make_directory(below_a_file(tmp_path))
    with pytest.raises(OutputError, match="is not a directory"):
        make_directory(tmp_path / "file")
    with pytest.raises(OutputError, match="too long"):
        make_directory(tmp_path / ("x" * 300))
