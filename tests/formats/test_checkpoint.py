"""safetensors checkpoints: what is read, and what is refused with the file and the tensor named."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gguf3n.errors import CheckpointError, SourceError
from gguf3n.formats.checkpoint import INDEX, MAX_HEADER_BYTES, SINGLE, read_header, read_tensor_table
from gguf3n.formats.rows import DTYPE_BYTES, Stored
from tests.mutation import Edit, edits, every_run_alike, mutate

Entry = dict[str, Any]


def entry(dtype: str, shape: list[int], begin: int, end: int) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def packed(header: object, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


A = entry("F32", [2, 3], 0, 24)
B = entry("BF16", [4], 24, 32)
GOOD = packed({"__metadata__": {"format": "pt"}, "b": B, "a": A}, bytes(range(32)))


def test_a_good_file_is_a_list_in_the_order_of_offsets(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(GOOD)
    start = len(GOOD) - 32
    assert read_header(path) == [
        Stored("a", "F32", (2, 3), path, start),
        Stored("b", "BF16", (4,), path, start + 24),
    ]
    assert {name: tensor.rows[0].stored_bytes for name, tensor in read_tensor_table(tmp_path).items()} == {
        "a": 24,
        "b": 8,
    }


@pytest.mark.parametrize(
    ("header", "data", "shapes"),
    [
        ({}, b"", {}),
        ({"__metadata__": {}}, b"", {}),
        ({"scalar": entry("F32", [], 0, 4)}, bytes(4), {"scalar": ()}),
        ({"none": entry("F32", [0, 7], 0, 0), "a": A}, bytes(24), {"none": (0, 7), "a": (2, 3)}),
        ({"a": A, "none": entry("I8", [0], 24, 24)}, bytes(24), {"a": (2, 3), "none": (0,)}),
        (b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}      ', b"x", {"a": (1,)}),
    ],
    ids=["empty", "metadata-only", "scalar", "no-elements-first", "no-elements-last", "padded-header"],
)
def test_unusual_but_valid(tmp_path: Path, header: object, data: bytes, shapes: dict[str, tuple[int, ...]]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(header, data))
    assert {tensor.name: tensor.shape for tensor in read_header(path)} == shapes


BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("truncated",)),
    "short header length": (b"\x10\0\0", ("truncated",)),
    "header beyond the file": (struct.pack("<Q", 100) + b"{}", ("not a safetensors file, or truncated", "100")),
    "header of exabytes": (b"\xff" * 16, ("not a safetensors file, or truncated",)),
    "pickle": (b"PK\x03\x04" + bytes(200), ("not a safetensors file, or truncated",)),
    "header not JSON": (packed(b"{nope}"), ("not JSON",)),
    "header not UTF-8": (packed(b'{"\xff\xfe\xfd": 1}'), ("not JSON",)),
    "header of nested lists": (packed(b"[" * 100_000), ("not JSON",)),
    "header a list": (packed([]), ("not a JSON object", "list")),
    "header null": (packed(None), ("not a JSON object", "NoneType")),
    "entry a number": (packed({"w": 3}), ("'w'", "malformed")),
    "entry a string": (packed({"w": "F32"}), ("'w'", "malformed")),
    "entry null": (packed({"w": None}), ("'w'", "malformed")),
    "entry without shape": (packed({"w": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), ("'w'", "malformed")),
    "entry without dtype": (packed({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), ("'w'", "malformed")),
    "entry without offsets": (packed({"w": {"dtype": "F32", "shape": [1]}}, bytes(4)), ("'w'", "malformed")),
    "three offsets": (packed({"w": A | {"data_offsets": [0, 12, 24]}}, bytes(24)), ("'w'", "malformed")),
    "offsets a number": (packed({"w": A | {"data_offsets": 24}}, bytes(24)), ("'w'", "malformed")),
    "offsets fractional": (packed({"w": A | {"data_offsets": [0, 24.0]}}, bytes(24)), ("'w'", "malformed")),
    "offsets negative": (packed({"w": A | {"data_offsets": [-24, 0]}}, bytes(24)), ("'w'", "malformed")),
    "shape a string": (packed({"w": A | {"shape": "23"}}, bytes(24)), ("'w'", "malformed")),
    "shape negative": (packed({"w": A | {"shape": [-2, -3]}}, bytes(24)), ("'w'", "malformed")),
    "shape boolean": (packed({"w": entry("F32", [True], 0, 4)}, bytes(4)), ("'w'", "malformed")),  # type: ignore[list-item]
    "shape of huge integers": (packed({"w": A | {"shape": [10**4000] * 2}}, bytes(24)), ("'w'", "malformed")),
    "shape of many dimensions": (packed({"w": A | {"shape": [1] * 100_000}}, bytes(24)), ("'w'", "malformed")),
    "dtype a list": (packed({"w": A | {"dtype": ["F32"]}}, bytes(24)), ("'w'", "malformed")),
    "dtype unknown": (packed({"w": A | {"dtype": "F33"}}, bytes(24)), ("'w'", "dtype", "F33")),
    "dtype in lower case": (packed({"w": A | {"dtype": "bf16"}}, bytes(24)), ("'w'", "dtype", "bf16")),
    "range too short": (packed({"w": entry("F32", [2, 3], 0, 20)}, bytes(20)), ("'w'", "24", "20")),
    "range too long": (packed({"w": entry("BF16", [2, 3], 0, 24)}, bytes(24)), ("'w'", "12", "24")),
    "range reversed": (packed({"w": entry("F32", [2, 3], 24, 0)}, bytes(24)), ("'w'", "-24")),
    "overlap": (packed({"a": A, "w": entry("F32", [2], 20, 28)}, bytes(28)), ("'w'", "overlaps another")),
    "same range twice": (packed({"a": A, "w": A}, bytes(24)), ("'w'", "overlaps another")),
    "gap at the start": (packed({"w": entry("F32", [1], 4, 8)}, bytes(8)), ("'w'", "leaves a gap")),
    "gap between": (packed({"a": A, "w": entry("F32", [1], 28, 32)}, bytes(32)), ("'w'", "leaves a gap")),
    "truncated data": (GOOD[:-1], ("truncated", f"{len(GOOD):,}", f"{len(GOOD) - 1:,}")),
    "no data": (GOOD[:-32], ("truncated",)),
    "trailing byte": (GOOD + b"\0", ("bytes after the last tensor", f"{len(GOOD) + 1:,}")),
}
"""Content of a file, and what the message must say beside the file's name."""


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file(tmp_path: Path, content: bytes, said: tuple[str, ...]) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_tensor_table(tmp_path)
    assert caught.value.exit_code == 5
    assert str(path) in caught.value.what
    for text in said:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_the_message_of_a_range_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(packed({"w": entry("F32", [2, 3], 0, 20)}, bytes(20)))
    with pytest.raises(CheckpointError) as caught:
        read_tensor_table(tmp_path)
    assert str(caught.value).splitlines() == [
        f"{tmp_path / SINGLE}: tensor 'w' has a range that does not fit its shape",
        "  expected: 24 bytes for F32 [2, 3]",
        "  found:    20 bytes",
    ]


def test_a_header_longer_than_the_librarys_limit(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_header(tmp_path / "x.safetensors")
    assert caught.value.found == "No such file or directory"


# directories

ONE, TWO, THREE = (f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))
WEIGHT_MAP = {"a": ONE, "b": ONE, "c": TWO, "d": THREE}


def shard(*names: str) -> bytes:
    header = {name: entry("I8", [1], i, i + 1) for i, name in enumerate(names)}
    return packed(header, bytes(len(names)))


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 4}, "weight_map": weight_map}).encode()


SHARDS = {ONE: shard("a", "b"), TWO: shard("c"), THREE: shard("d")}

COMPLETE: dict[str, dict[str, bytes]] = {
    "shards with an index": {**SHARDS, INDEX: index(WEIGHT_MAP)},
    "shards without an index": SHARDS,
    "one file": {SINGLE: shard("a", "b", "c", "d")},
    "one file before an index left over": {SINGLE: shard("a", "b", "c", "d"), INDEX: index({"x": "gone.safetensors"})},
    "shards of other names": {
        "first.safetensors": shard("a", "b"),
        "second.safetensors": shard("c", "d"),
        INDEX: index({"a": "first.safetensors", "b": "first.safetensors", "c": "second.safetensors"}),
    },
    "other programs' files": {
        **SHARDS,
        INDEX: index(WEIGHT_MAP),
        "consolidated.safetensors": b"",
        "adapter_config.json": b"{}",
        "training_args.bin": b"",
        "x.gguf": b"",
    },
}


def fill(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (directory / name).write_bytes(content)


@pytest.mark.parametrize("files", COMPLETE.values(), ids=COMPLETE)
def test_a_complete_checkpoint(tmp_path: Path, files: dict[str, bytes]) -> None:
    fill(tmp_path, files)
    assert sorted(read_tensor_table(tmp_path)) == ["a", "b", "c", "d"]


BROKEN_CHECKPOINTS: dict[str, tuple[dict[str, bytes], str, tuple[str, ...]]] = {
    # files, the file that is named, what else is said
    "missing shard": ({ONE: SHARDS[ONE], THREE: SHARDS[THREE], INDEX: index(WEIGHT_MAP)}, TWO, ("missing",)),
    "missing first shard, no index": ({TWO: SHARDS[TWO], THREE: SHARDS[THREE]}, ONE, ("missing", TWO, THREE)),
    "missing last shard, no index": ({ONE: SHARDS[ONE], TWO: SHARDS[TWO]}, THREE, ("missing",)),
    "shards of two sets, no index": (
        {"model-00001-of-00001.safetensors": shard("a"), **SHARDS},
        ONE,
        ("shard of another set",),
    ),
    "shard zero": ({"model-00000-of-00000.safetensors": shard("a")}, "model-00000-of-00000.safetensors", ()),
    "index names a tensor no shard has": (
        {**SHARDS, INDEX: index(WEIGHT_MAP | {"e": TWO})},
        TWO,
        ("'e'", "is missing", "no shard"),
    ),
    "index names the wrong shard": (
        {**SHARDS, INDEX: index(WEIGHT_MAP | {"b": TWO})},
        TWO,
        ("'b'", f"it in {ONE}"),
    ),
    "tensor in two shards": ({**SHARDS, THREE: shard("d", "c"), INDEX: index(WEIGHT_MAP)}, THREE, ("'c'", TWO)),
    "broken shard": ({**SHARDS, TWO: b"", INDEX: index(WEIGHT_MAP)}, TWO, ("truncated",)),
    "index outside the directory": ({**SHARDS, INDEX: index({"a": "../elsewhere.safetensors"})}, INDEX, ("unusable",)),
    "index with an absolute path": ({**SHARDS, INDEX: index({"a": "/etc/passwd"})}, INDEX, ("unusable",)),
    "index with a directory": ({**SHARDS, INDEX: index({"a": ".."})}, "..", ("a directory",)),
    "index with numbers": ({**SHARDS, INDEX: index({"a": 1})}, INDEX, ("unusable",)),
    "index with lists": ({**SHARDS, INDEX: index({"a": [ONE]})}, INDEX, ("unusable",)),
    "index empty": ({**SHARDS, INDEX: index({})}, INDEX, ("unusable",)),
    "index without a weight map": ({**SHARDS, INDEX: b"{}"}, INDEX, ("weight map",)),
    "index with a list for a weight map": ({**SHARDS, INDEX: index([])}, INDEX, ("weight map",)),
    "index a list": ({**SHARDS, INDEX: b"[]"}, INDEX, ("not a JSON object",)),
    "index not JSON": ({**SHARDS, INDEX: b"<html>"}, INDEX, ("not JSON",)),
    "index not UTF-8": ({**SHARDS, INDEX: b'{"weight_map": "\xff"}'}, INDEX, ("not JSON",)),
    "index of nested lists": ({**SHARDS, INDEX: b"[" * 100_000}, INDEX, ("not JSON",)),
}


@pytest.mark.parametrize(("files", "named", "said"), BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint(tmp_path: Path, files: dict[str, bytes], named: str, said: tuple[str, ...]) -> None:
    fill(tmp_path, files)
    with pytest.raises(CheckpointError) as caught:
        read_tensor_table(tmp_path)
    assert caught.value.exit_code == 5
    assert caught.value.what.startswith(f"{tmp_path / named}: ")
    for text in said:
        assert text in str(caught.value)


NOT_CHECKPOINTS: dict[str, tuple[list[str], str, str]] = {
    # files, what it is, what to do
    "empty directory": ([], "no checkpoint here", "an empty directory"),
    "config only": (["config.json", "tokenizer.json"], "no checkpoint here", "config.json, tokenizer.json"),
    "many files": ([f"{c}.txt" for c in "abcdef"], "no checkpoint here", "a.txt, b.txt, c.txt, d.txt, e.txt, …"),
    "PEFT adapter": (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter", "--adapter"),
    "FSDP shards": (["__0_0.distcp", ".metadata"], "FSDP", "accelerate merge-weights"),
    "FSDP folder": (["pytorch_model_fsdp_0"], "FSDP", "pytorch_model_fsdp_0 DIR"),
    "FSDP file": (["pytorch_model_fsdp.bin"], "FSDP", "save_file"),
    "files of FSDP's ranks": (["pytorch_model_fsdp_rank0.bin"], "pickle of its own", "FULL_STATE_DICT"),
    "DeepSpeed script": (["zero_to_fp32.py", "latest"], "DeepSpeed", "zero_to_fp32.py"),
    "DeepSpeed shards": (["global_step500"], "DeepSpeed", "zero_to_fp32.py"),
    "pickle": (["config.json", "pytorch_model.bin"], "pickle", "save_file"),
    "pickle shards": (["pytorch_model-00001-of-00002.bin"], "pickle", "save_file"),
    "GGUF": (["gemma-3n-E4B-it-Q4_K_M.gguf"], "GGUF", "Hugging Face checkpoint"),
    "safetensors of another name": (["weights.safetensors"], "no checkpoint here", "weights.safetensors"),
}


@pytest.mark.parametrize(("names", "what", "hint"), NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
def test_what_is_no_checkpoint(tmp_path: Path, names: list[str], what: str, hint: str) -> None:
    fill(tmp_path, dict.fromkeys(names, b""))
    with pytest.raises(SourceError) as caught:
        read_tensor_table(tmp_path)
    assert type(caught.value) is SourceError
    assert caught.value.exit_code == 3
    assert str(tmp_path) in caught.value.what
    assert what in caught.value.what
    assert hint in str(caught.value)


def test_a_directory_that_cannot_be_listed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="cannot be read"):
        read_tensor_table(tmp_path / "file")


# properties

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "u1", "BOOL": "?"}

tensor_specs = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 4), max_size=4).map(tuple)),
    max_size=6,
)


@given(tensor_specs, st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=2))
@settings(every_run_alike, max_examples=60)
def test_what_the_safetensors_library_writes(
    tmp_path: Path, specs: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.integers(0, 2, shape).astype(NUMPY[dtype]).reshape(shape) for name, (dtype, shape) in specs.items()
    }
    path = tmp_path / SINGLE
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    table = read_tensor_table(tmp_path)
    data = path.read_bytes()
    assert {name: (*tensor.dtypes, tensor.shape) for name, tensor in table.items()} == specs
    for name, (tensor,) in ((name, tensor.stored) for name, tensor in table.items()):
        assert data[tensor.offset : tensor.offset + tensor.stored_bytes] == arrays[name].tobytes()


@given(edits, st.booleans())
@example([(0, 7, 255)], False)
@example([(2, 0, 200)], False)
@settings(every_run_alike, max_examples=300)
def test_changed_bytes_are_a_checkpoint_error_or_still_consistent(
    tmp_path: Path, edits: list[Edit], fixed_length: bool
) -> None:
    """With `fixed_length` the header's length is corrected, so that changes reach what lies behind it."""
    if fixed_length:
        header = mutate(GOOD[8:-32], edits)
        content = packed(header, GOOD[-32:])
    else:
        content = mutate(GOOD, edits)
    path = tmp_path / SINGLE
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    (header_bytes,) = struct.unpack("<Q", content[:8])
    position = 8 + header_bytes
    for tensor in tensors:
        assert tensor.offset == position
        assert tensor.stored_bytes == math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        position += tensor.stored_bytes
    assert position == len(content)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["w", "dtype", "shape", "data_offsets", "__metadata__", "weight_map"]), inner
            )
        ),
    )
)
@settings(every_run_alike, max_examples=150)
@pytest.mark.parametrize("write", [
    lambda directory, value: (directory / SINGLE).write_bytes(packed(json.dumps(value).encode())),
    lambda directory, value: (directory / INDEX).write_text(json.dumps(value), "utf-8"),
], ids=["header", "index"])  # fmt: skip
def test_any_json_is_a_checkpoint_error_or_an_empty_checkpoint(
    tmp_path: Path, write: Callable[[Path, object], None], value: object
) -> None:
    write(tmp_path, value)
    try:
        assert not [tensor for tensor in read_tensor_table(tmp_path).values() if tensor.rows[0].stored_bytes]
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
