"""Broken checkpoints, and what must hold for each: a plan and a file, or one error of ours, soon, in little memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from workshop import checkpoints, hostile

README = """\
---
license: gemma
base_model: [google/gemma-3n-E2B-it]
language: [en, no]
tags:
- a
datasets: [org/set]
author: somebody
---
# A model
"""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"

FRONT_MATTER = (
    "author: &a [1, 2]\ntags: [*a, *a]", "author: {a: {b: c}}", "license: 0x" + "f" * 5000, "license: " + "9" * 5000,
    "author: 1:1:1:1:1", "tags: " + "[" * 2000, "a: &a [*a]", "license: 2020-13-45", "license: 2020-01-01", "name: ''",
    "language: " + "[a, " * 3000, "base_model: " + "a-" * 3000, 'author: "\\ud800"', "author: !!binary x",
    "author: !!python/object:os.system x", "? [a]\n: b", "<<: {a: b}", "name: [a, b]", "datasets: [{a: b}, 1, null]",
    "base_model: [{}, 1, [a]]", "base_model: https://huggingface.co/" + "a" * 500, "size_label: 1e999", "version: 1.0",
    "tags: {a: b}", "tags: [1, 2.5, null, [a]]", "\tname: x", "name: \0", "author: .inf", "name: " + "x" * 100_000,
)  # fmt: skip


def sources() -> dict[str, bytes]:
    """The files of a sound checkpoint of two layers, its weights zeros."""
    raw = checkpoints.tiny_config()
    raw["text_config"] |= {
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 1,
        "hidden_size": 32,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": [32] * 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.95, 0.0],
    }
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in checkpoints.tiny_shapes(raw).items():
        if name.startswith(checkpoints.PUBLISHED):
            end = offset + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    files = {path.name: path.read_bytes() for path in checkpoints.TOKENIZER.iterdir()}
    files["config.json"] = json.dumps(raw).encode()
    files["README.md"] = README.encode()
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(header, SHARD)}).encode()
    encoded = json.dumps(header).encode()
    files[WEIGHTS] = struct.pack("<Q", len(encoded)) + encoded + bytes(offset)
    return files


@cache
def _sound() -> Mapping[str, bytes]:
    return sources()


def _weights(data: bytes, rng: random.Random) -> bytes:
    """Change the header, mostly as JSON with the right length before it, or some weights."""
    (n_header,) = struct.unpack_from("<Q", data)
    header, rest = data[8 : 8 + n_header], data[8 + n_header :]
    choice = rng.random()
    if choice < 0.7:
        header = hostile.mutate_json(json.loads(header), rng)
    elif choice < 0.85:
        header = hostile.mutate_bytes(header, rng)
    elif choice < 0.95:
        rest = rest[: rng.randrange(len(rest))] if rng.random() < 0.3 else rng.randbytes(2000) + rest[2000:]
    n_header = len(header) if rng.random() < 0.95 else rng.choice((0, 1, 2**31, 2**62, 2**64 - 1))
    return struct.pack("<Q", n_header) + header + rest


def _card(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return hostile.mutate_bytes(data, rng)
    lines = data.decode().splitlines()
    lines.insert(rng.randint(1, 8), rng.choice(FRONT_MATTER))
    return "\n".join(lines).encode()


def _json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return hostile.mutate_bytes(data, rng)
    return hostile.mutate_json(json.loads(data), rng)


MUTATIONS: Mapping[str, Callable[[bytes, random.Random], bytes]] = {
    "config.json": _json,
    "generation_config.json": _json,
    "special_tokens_map.json": _json,
    "tokenizer_config.json": _json,
    "tokenizer.json": _json,
    INDEX: _json,
    WEIGHTS: _weights,
    "README.md": _card,
    "tokenizer.model": hostile.mutate_bytes,
    "chat_template.jinja": hostile.mutate_bytes,
}


def _other_kind(path: Path, rng: random.Random) -> None:
    """Something that is no file with bytes of its own, or one that is far too large."""
    path.unlink(missing_ok=True)
    match rng.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            with open(path, "wb") as file:
                file.truncate(3 << 30)
        case _:
            path.touch()


def make(directory: Path, number: int) -> None:
    """The checkpoint of this number."""
    rng = random.Random(number)
    sound = _sound()
    names = set(sound)
    if rng.random() < 0.8:
        names.discard(INDEX)
    if rng.random() < 0.5:
        names.discard(rng.choice(("tokenizer.model", "tokenizer.json")))
    broken = set(rng.sample(sorted(MUTATIONS.keys() & names), rng.choice((1, 1, 1, 2, 3))))
    for name in sorted(names):
        place = directory / (SHARD if name == WEIGHTS and INDEX in names else name)
        place.write_bytes(MUTATIONS[name](sound[name], rng) if name in broken else sound[name])
        if name in broken and rng.random() < 0.05:
            _other_kind(place, rng)


def check(number: int) -> str:
    """Plan one broken checkpoint, and of some write a file; what became of it."""
    import gguf3n
    from gguf3n.errors import Gguf3nError
    from gguf3n.gemma3n.sentencepieces import SentencePieces
    from gguf3n.gemma3n.source import Checkpoint

    directory = Path(tempfile.mkdtemp(prefix="gguf3n-fuzz-", dir="/dev/shm"))
    try:
        make(directory, number)
        source = gguf3n.read_source(directory)
        plan = gguf3n.plan(source, "F16")
        assert isinstance(source, Checkpoint)
        if (directory / "tokenizer.model").exists():
            SentencePieces(source).encode("Some text, 123 <b> é\n")
        if number % 8 == 0:
            written = gguf3n.write([plan], directory / "out.gguf", threads=1)[0]
            gguf3n.open_gguf(written.path)
            return "written"
        return "planned"
    except Gguf3nError as error:
        str(error).encode("utf-8", "backslashreplace")
        return type(error).__name__
    finally:
        shutil.rmtree(directory, ignore_errors=True)
