"""A way to plant each fault of lint's table in a sound file."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gguf3n.formats.gguf_draft import Draft, DraftTensor
from gguf3n.formats.gguf_layout import GGUFValueType as VT
from gguf3n.formats.gguf_layout import KeyValue, QType
from gguf3n.formats.gguf_reader import GGUFFile, open_part

Plant = Callable[[Path], Path | None]
PLANTS: dict[str, Plant] = {}
"""By check: a function that plants its fault in a file; it may say that the fault is in another one."""


def plants(check_id: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        assert check_id not in PLANTS
        PLANTS[check_id] = plant
        return plant

    return register


@contextmanager
def drafted(path: Path) -> Iterator[Draft]:
    """A draft of the file, saved in its place at the end."""
    draft = Draft(open_part(path))
    yield draft
    draft.save()


def set_key(path: Path, name: str, kind: VT, value: Any) -> None:
    with drafted(path) as draft:
        draft.set(KeyValue(name, kind, value))


def set_array(path: Path, name: str, kind: VT, values: list[Any]) -> None:
    with drafted(path) as draft:
        draft.set(KeyValue(name, VT.ARRAY, values, kind))


def unset_key(path: Path, name: str) -> None:
    with drafted(path) as draft:
        draft.unset(name)


def values(path: Path, name: str) -> list[Any]:
    found = open_part(path).value(name)
    assert isinstance(found, list)
    return found


def change_tensor(path: Path, name: str, **changes: Any) -> None:
    with drafted(path) as draft:
        (i,) = [i for i, tensor in enumerate(draft.tensors) if tensor.name == name]
        draft.tensors[i] = replace(draft.tensors[i], **changes)


def drop_tensors(path: Path, *names: str) -> None:
    with drafted(path) as draft:
        draft.tensors = [tensor for tensor in draft.tensors if tensor.name not in names]


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def patch_offset(path: Path, name: str, add: int) -> None:
    """Add to the offset that the table gives a tensor."""
    gguf = open_part(path)
    tensor = gguf.tensors[name]
    entry = struct.pack("<Q", len(name)) + name.encode()
    header = gguf.parts[0].read_at(0, gguf.header_bytes)
    at = header.index(entry) + len(entry) + 4 + 8 * len(tensor.shape) + 4
    (old,) = struct.unpack_from("<Q", header, at)
    patch(path, at, struct.pack("<Q", old + add))


def last_tensor(gguf: GGUFFile) -> str:
    return max(gguf.tensors.values(), key=lambda tensor: tensor.offset).name


def move_last(path: Path, n: int) -> None:
    """Put the last tensor's data n bytes further."""
    gguf = open_part(path)
    tensor = gguf.tensors[last_tensor(gguf)]
    data = gguf.read(tensor)
    patch_offset(path, tensor.name, n)
    os.truncate(path, tensor.offset)
    patch(path, tensor.offset + n, data)
    os.truncate(path, path.stat().st_size + -path.stat().st_size % gguf.alignment)


def write(path: Path, name: str, data: bytes, at: int = 0) -> None:
    """Write over a tensor's data."""
    patch(path, open_part(path).tensors[name].offset + at, data)


# layout


@plants("unreadable")
def _(path: Path) -> None:
    patch(path, 0, b"GGML")


@plants("duplicate-key")
def _(path: Path) -> None:
    with drafted(path) as draft:
        draft.packed.append(draft.packed[3])


@plants("empty-key")
def _(path: Path) -> None:
    with drafted(path) as draft:
        draft.packed.append(("", struct.pack("<QIB", 0, VT.UINT8, 1)))


@plants("alignment-key")
def _(path: Path) -> None:
    with drafted(path) as draft:
        draft.packed.append(
            ("general.alignment", struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 24))
        )


@plants("misaligned")
def _(path: Path) -> None:
    move_last(path, 16)


@plants("gaps")
def _(path: Path) -> None:
    move_last(path, 64)


@plants("overlap")
def _(path: Path) -> None:
    patch_offset(path, last_tensor(open_part(path)), -32)


@plants("truncated")
def _(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


@plants("trailing-bytes")
def _(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more" * 1000)


@plants("duplicate-tensor")
def _(path: Path) -> None:
    with drafted(path) as draft:
        draft.tensors.append(draft.tensors[7])


@plants("long-name")
def _(path: Path) -> None:
    with drafted(path) as draft:
        draft.tensors.append(DraftTensor("x" * 64, (1,), QType.F32))


@plants("big-endian")
def _(path: Path) -> None:
    """A whole file, for no header can be turned without the rest."""

    def text(words: str) -> bytes:
        return struct.pack(">Q", len(words)) + words.encode()

    key = text("general.architecture") + struct.pack(">I", VT.STRING) + text("gemma3n")
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + key)


@plants("split-parts")
def _(path: Path) -> Path:
    """Two parts, each of which says it is the second."""
    with drafted(path) as draft:
        draft.set(KeyValue("split.count", VT.UINT16, 2))
        draft.set(KeyValue("split.no", VT.UINT16, 1))
    second = path.with_name(f"{path.stem}-00002-of-00002.gguf")
    second.write_bytes(path.read_bytes())
    return path.rename(path.with_name(f"{path.stem}-00001-of-00002.gguf"))


@plants("lone-part")
def _(path: Path) -> None:
    set_key(path, "split.count", VT.UINT16, 2)


# model


@plants("missing-key")
def _(path: Path) -> None:
    unset_key(path, "gemma3n.embedding_length")


@plants("assumed-key")
def _(path: Path) -> None:
    unset_key(path, "gemma3n.rope.freq_base")


@plants("shared-kv-type")
def _(path: Path) -> None:
    set_key(path, "gemma3n.attention.shared_kv_layers", VT.FLOAT32, 2.0)


@plants("mistyped-key")
def _(path: Path) -> None:
    set_key(path, "gemma3n.block_count", VT.INT32, 22)


@plants("array-length")
def _(path: Path) -> None:
    set_array(path, "gemma3n.feed_forward_length", VT.INT32, [512] * 21)


@plants("block-count")
def _(path: Path) -> None:
    set_key(path, "gemma3n.block_count", VT.UINT32, 21)


@plants("size-key")
def _(path: Path) -> None:
    set_key(path, "gemma3n.attention.head_count_kv", VT.UINT32, 4)


@plants("fixed-size")
def _(path: Path) -> None:
    set_key(path, "gemma3n.attention.shared_kv_layers", VT.UINT32, 3)


@plants("mixed-ffn")
def _(path: Path) -> None:
    for name in ("ffn_gate", "ffn_up"):
        change_tensor(path, f"blk.5.{name}.weight", shape=(256, 256), n_source=0)
    change_tensor(path, "blk.5.ffn_down.weight", shape=(256, 256), n_source=0)


@plants("missing-tensor")
def _(path: Path) -> None:
    drop_tensors(path, "blk.3.attn_q.weight")


@plants("missing-shared-kv")
def _(path: Path) -> None:
    drop_tensors(path, *(f"blk.{i}.attn_{x}.weight" for i in (20, 21) for x in ("k", "v", "k_norm")))


@plants("extra-tensor")
def _(path: Path) -> None:
    with drafted(path) as draft:
        draft.tensors.append(DraftTensor("blk.0.ffn_gate_inp.weight", (8, 256), QType.F32))


@plants("wrong-shape")
def _(path: Path) -> None:
    change_tensor(path, "blk.3.attn_q.weight", shape=(128, 256), n_source=0)


@plants("float-tensor")
def _(path: Path) -> None:
    change_tensor(path, "blk.3.attn_norm.weight", qtype=QType.F16, n_source=0)


@plants("table-rows")
def _(path: Path) -> None:
    """As Ollama converted in 2025: a row for each text token only."""
    gguf = open_part(path)
    table = gguf.tensors["per_layer_token_embd.weight"]
    n_rows = 1024
    shape = (n_rows, table.shape[1])
    change_tensor(path, table.name, shape=shape, n_source=table.n_bytes // table.shape[0] * n_rows)


@plants("ple-type")
def _(path: Path) -> None:
    change_tensor(path, "per_layer_token_embd.weight", qtype=QType.Q4_K, n_source=0)


@plants("file-type")
def _(path: Path) -> None:
    set_key(path, "general.file_type", VT.UINT32, 15)


@plants("quantization-version")
def _(path: Path) -> None:
    unset_key(path, "general.quantization_version")


# vocabulary


@plants("missing-tokenizer")
def _(path: Path) -> None:
    unset_key(path, "tokenizer.ggml.model")


@plants("tokenizer-model")
def _(path: Path) -> None:
    set_key(path, "tokenizer.ggml.model", VT.STRING, "gpt2")


@plants("token-scores")
def _(path: Path) -> None:
    unset_key(path, "tokenizer.ggml.scores")


@plants("token-types")
def _(path: Path) -> None:
    unset_key(path, "tokenizer.ggml.token_type")


@plants("duplicate-token")
def _(path: Path) -> None:
    tokens = values(path, "tokenizer.ggml.tokens")
    set_array(path, "tokenizer.ggml.tokens", VT.STRING, [*tokens[:-1], tokens[-2]])


@plants("byte-token")
def _(path: Path) -> None:
    tokens = values(path, "tokenizer.ggml.tokens")
    set_array(path, "tokenizer.ggml.tokens", VT.STRING, ["nothing" if t == "<0x0A>" else t for t in tokens])


@plants("byte-type")
def _(path: Path) -> None:
    retype(path, "<0x0A>", 1)


@plants("control-type")
def _(path: Path) -> None:
    retype(path, "<start_of_turn>", 1)


def retype(path: Path, text: str, kind: int) -> None:
    types = values(path, "tokenizer.ggml.token_type")
    types[values(path, "tokenizer.ggml.tokens").index(text)] = kind
    set_array(path, "tokenizer.ggml.token_type", VT.INT32, types)


@plants("special-id")
def _(path: Path) -> None:
    set_key(path, "tokenizer.ggml.bos_token_id", VT.UINT32, 1)


@plants("no-bos")
def _(path: Path) -> None:
    set_key(path, "tokenizer.ggml.add_bos_token", VT.BOOL, False)


@plants("two-bos")
def _(path: Path) -> None:
    set_key(path, "tokenizer.chat_template", VT.STRING, "{{ bos_token }}{{ messages[0].content }}")


@plants("space-prefix")
def _(path: Path) -> None:
    unset_key(path, "tokenizer.ggml.add_space_prefix")


@plants("end-of-turn")
def _(path: Path) -> None:
    set_key(path, "tokenizer.ggml.eos_token_id", VT.UINT32, 1)
    with drafted(path) as draft:
        if "tokenizer.ggml.eot_token_id" in draft.names():
            draft.unset("tokenizer.ggml.eot_token_id")


@plants("chat-template")
def _(path: Path) -> None:
    unset_key(path, "tokenizer.chat_template")


@plants("sampling")
def _(path: Path) -> None:
    unset_key(path, "general.sampling.temp")


# data


@plants("bad-value")
def _(path: Path) -> None:
    write(path, "blk.4.ffn_up.weight", struct.pack("<H", 0x7C00), at=34 * 8)  # a scale of Q8_0


@plants("all-zero")
def _(path: Path) -> None:
    write(path, "blk.4.ffn_up.weight", bytes(open_part(path).tensors["blk.4.ffn_up.weight"].n_bytes))


@plants("f16-range")
def _(path: Path) -> None:
    change_tensor(path, "blk.4.laurel_l.weight", qtype=QType.F16)
    write(path, "blk.4.laurel_l.weight", struct.pack("<H", 0x7BFF))


@plants("wrong-table")
def _(path: Path) -> None:
    """The per-layer table's rows are the token table's, over and over."""
    gguf = open_part(path)
    token, per_layer = (gguf.tensors[f"{name}.weight"] for name in ("token_embd", "per_layer_token_embd"))
    rows = np.frombuffer(gguf.read(token), np.uint8).reshape(token.shape[0], -1)
    repeats = per_layer.n_bytes // token.n_bytes
    write(path, per_layer.name, np.tile(rows, (1, repeats)).tobytes())
