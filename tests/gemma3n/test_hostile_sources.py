"""Checkpoints that mean harm: one error of ours, soon, whatever a file claims to be or to hold."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

import gguf3n
from gguf3n.errors import CheckpointError, Gguf3nError, MappingError, TokenizerError
from gguf3n.formats.checkpoint import MAX_HEADER_BYTES, MAX_TENSORS
from gguf3n.formats.sentencepiece_file import read_piece_types
from gguf3n.formats.small_file import CHECKPOINT_FILES, MAX_JSON_CONTAINERS, parse_json, read_small
from gguf3n.gemma3n.config import MAX_ALTUP_INPUTS
from gguf3n.gemma3n.metadata import MAX_FRONT_MATTER
from tests import micro
from workshop import checkpoint_fuzzing, checkpoints

MAX_BYTES = 48 << 20
SPM = (checkpoints.TOKENIZER / "tokenizer.model").read_bytes()


def config(**text: object) -> Callable[[Path], None]:
    return lambda directory: micro.write_json(directory / "config.json", micro.config(**text))


def header(entries: object) -> Callable[[Path], None]:
    encoded = json.dumps(entries).encode()
    return lambda directory: write(directory / "model.safetensors", struct.pack("<Q", len(encoded)) + encoded)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def card(front: str) -> Callable[[Path], None]:
    return lambda directory: write(directory / "README.md", f"---\n{front}\n---\n".encode())


def contents(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda directory: write(directory / name, data)


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)) + "tags: *a39"

BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "AltUp inputs": (config(altup_num_inputs=30_000_000), f"at most {MAX_ALTUP_INPUTS}"),
    "a vocabulary of text tokens": (config(vocab_size=20_000_000, vocab_size_per_layer_input=20_000_000), "shape"),
    "a vocabulary of other tokens": (config(vocab_size=20_000_000), "shape"),
    "a vocabulary twice as large": (config(vocab_size=4000), "shape"),
    "layers": (config(num_hidden_layers=2**31 - 1), "num_hidden_layers"),
    "a number of 5,000 digits": (contents("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"), "digits"),
    "nested JSON": (contents("config.json", b"[" * 500_000), "not JSON"),
    "nested JSON, for another package": (contents("tokenizer.json", b"[" * 100_000), "malformed"),
    "lists": (contents("tokenizer.json", b"[" + b"[]," * MAX_JSON_CONTAINERS + b"[]]"), "too many lists"),
    "names of tensors": (header({f"t{i}": EMPTY for i in range(MAX_TENSORS + 1)}), "too many tensors"),
    "a header": (contents("model.safetensors", struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(1 << 25)), "at most"),
    "a dimension beside zero": (header({"a": EMPTY | {"shape": [0, 2**62]}}), "no rule knows"),
    "an empty tensor": (header({"model.norm.weight": EMPTY}), "missing"),
    "front matter": (card("tags:\n" + "- a\n" * (MAX_FRONT_MATTER // 4)), "front matter of"),
    "aliases": (card(ALIASES), "an alias"),
    "a number in the front matter": (card("author: 0x" + "f" * 5000), "model card"),
    "pieces that are no texts": (contents("tokenizer.model", b"\n\x04\n\x02\xff\xfe"), "sentencepiece"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb(bomb: str, tmp_path: Path) -> None:
    """Memory is that of Python alone; the limit is a few times what a sound checkpoint of this size takes."""
    directory = micro.make(tmp_path / "x")
    change, said = BOMBS[bomb]
    change(directory)
    gguf3n.plan(micro.make(tmp_path / "sound"), "F16")  # what is imported once does not count
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(Gguf3nError, match=said):
            gguf3n.plan(directory, "F16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (3 * MAX_BYTES if bomb in ("names of tensors", "a header") else MAX_BYTES)
    assert time.monotonic() - started < 20


def test_sizes_are_still_padded(tmp_path: Path) -> None:
    """Gemma's per-layer table has fewer rows than there are tokens."""
    assert gguf3n.plan(micro.make(tmp_path / "x"), "F16").total_bytes > 0


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a directory": (Path.mkdir, "a directory"),
    "a pipe": (os.mkfifo, "a pipe"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "a file with holes": (lambda path: write(path, b"") or os.truncate(path, 3 << 30), "too large"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_no_ordinary_file(name: str, kind: str, tmp_path: Path) -> None:
    directory = micro.make(tmp_path / "x")
    change, said = KINDS[kind]
    if name == "model.safetensors.index.json":
        (directory / "model.safetensors").unlink()
    (directory / name).unlink(missing_ok=True)
    change(directory / name)
    with pytest.raises(CHECKPOINT_FILES[name][1], match=said) as caught:
        gguf3n.plan(directory, "F16")
    assert name in caught.value.what


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_weights_in_a_pipe(name: str, tmp_path: Path) -> None:
    directory = micro.make(tmp_path / "x")
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / name)
    with pytest.raises(CheckpointError, match="a pipe"):
        gguf3n.read_source(directory)


def test_a_directory_without_permission(tmp_path: Path) -> None:
    directory = micro.make(tmp_path / "x")
    os.chmod(tmp_path, 0o755)
    os.chmod(directory, 0o600)  # names may be listed, nothing in it may be opened
    try:
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(Gguf3nError):
            gguf3n.read_source(directory)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        os.chmod(directory, 0o700)


def test_sizes_of_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_small(path, 5, CheckpointError) == b"12345"
    with pytest.raises(CheckpointError, match="at most 4"):
        read_small(path, 4, CheckpointError)
    with pytest.raises(CheckpointError, match="changed while"):  # a file that does not say its size
        read_small(Path("/proc/self/status"), 5, CheckpointError)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_small(Path("a\0b"), 4, CheckpointError)


@pytest.mark.parametrize("data", [b"[" * 10**6, b"\xff", b"", b"9" * 5000, b"[1e999"])
def test_json_that_can_not_be_read(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="not JSON"):
        parse_json(data, "x", CheckpointError)


def field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


PIECE = field(1, field(1, b"a"))
SCORE = b"\x15" + bytes(4)
MODELS = {
    "empty": b"",
    "zeros": bytes(1000),
    "cut off": SPM[:5000],
    "a length past the end": PIECE + b"\x0a\x7f",
    "a length without end": PIECE + b"\x0a" + b"\xff" * 20,
    "no pieces": field(2, b""),
    "an empty piece": field(1, field(1, b"")),
    "a piece with a zero byte": field(1, field(1, b"a\0b")),
    "a usual piece that is empty": field(1, field(1, b"") + SCORE),
    "a usual piece with a zero byte": field(1, field(1, b"a\0b") + SCORE),
    "a usual piece that is not UTF-8": PIECE + field(1, field(1, b"\xff") + SCORE + b"\x18\x01"),
    "halves of a character in two pieces": field(1, field(1, b"\xc3") + SCORE) + field(1, field(1, b"\xa9") + SCORE),
    "a piece that is not UTF-8": field(1, field(1, b"\xff")),
    "a piece that is a number": b"\x08\x01",
    "rules of normalization": PIECE + field(3, field(2, b"abcd")),
    "a type that is none": PIECE + field(1, field(1, b"b") + SCORE + b"\x18\x09"),
    "a group": PIECE + b"\x0b",
}


@pytest.mark.parametrize("name", MODELS)
def test_no_sentencepiece_model(name: str) -> None:
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        read_piece_types(MODELS[name], Path("tokenizer.model"))


def test_a_sound_sentencepiece_model() -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    model.ParseFromString(SPM)
    assert read_piece_types(SPM, Path("x")) == [piece.type for piece in model.pieces]
    control = field(1, field(1, b"b") + SCORE + b"\x18\x03")
    assert read_piece_types(PIECE + control + field(2, b"") + control + PIECE, Path("x")) == [1, 3, 3, 1]
    assert read_piece_types(PIECE + b"\x30\x01" + b"\x39" + bytes(8) + b"\x3d" + bytes(4), Path("x")) == [1]


@pytest.mark.parametrize("dtype, shape", [("I8", (64,)), ("F64", (64,)), ("F32", (0,)), ("F32", (2**62, 0))])
def test_a_tensor_of_a_gguf_file_without_weights(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    from gguf3n.formats.gguf_layout import KeyValue, QType
    from gguf3n.formats.gguf_reader import GGUFArray
    from gguf3n.formats.gguf_writer import lay_out

    sound = gguf3n.open_gguf(gguf3n.convert(micro.make(tmp_path / "x"), "F32", tmp_path / "x.gguf")[0].path)
    keys = [
        KeyValue(key.name, key.type, key.value.tolist(), key.value.element_type)
        if isinstance(key.value, GGUFArray)
        else KeyValue(key.name, key.type, key.value)
        for key in sound.all_keys
    ]
    table = [
        (t.name, shape, QType[dtype]) if t.name == "output_norm.weight" else (t.name, t.shape, t.qtype)
        for t in sound.all_tensors
    ]
    layout = lay_out(keys, table)
    path = tmp_path / "broken.gguf"
    path.write_bytes(layout.header + bytes(layout.total_bytes - len(layout.header)))
    with pytest.raises((MappingError, gguf3n.UsageError), match=f"output_norm|{dtype}"):
        gguf3n.convert(gguf3n.read_gguf(path, allow_requantize=True), "F16", tmp_path / "out.gguf")


def test_what_the_fuzzer_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its inputs; scripts/fuzz_checkpoint.py takes as many as there is time for."""
    answers = {checkpoint_fuzzing.check(number) for number in (*range(60), 1469)}
    assert {"planned", "ConfigError", "TokenizerError", "CheckpointError"} <= answers
