"""Broken GGUF files through every command that takes one: a result or one error of ours, soon and in little memory."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

import gguf3n
from gguf3n.cli.application import app
from gguf3n.errors import Gguf3nError
from gguf3n.formats.byte_source import HeaderInMemory
from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType
from gguf3n.formats.gguf_reader import GGUFArray, read_header
from gguf3n.formats.gguf_writer import lay_out
from workshop import checkpoint_fuzzing, fuzzing, hostile

FILE, SOUND, OUT = "FILE", "SOUND", "OUT"
"""Words in COMMANDS: the broken file, the file as it was, a name to write."""

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("inspect", FILE),
    ("inspect", FILE, "--json"),
    ("inspect", FILE, "--keys"),
    ("inspect", FILE, "--tensors"),
    ("lint", FILE, "--deep"),
    ("lint", FILE, "--deep", "--json"),
    ("repair", FILE, "-o", OUT),
    ("repair", FILE, "--dry-run", "--json"),
    ("edit", FILE, "--set", "general.name=x", "-o", OUT),
    ("edit", FILE, "--unset", "tokenizer.chat_template", "--dry-run"),
    ("diff", FILE, SOUND),
    ("diff", SOUND, FILE, "--json"),
    ("stats", FILE, "--json"),
    ("stats", FILE),
    ("quantize", FILE, "--quant", "Q8_0", "--allow-requantize", "--threads", "1", "--quiet", "-o", OUT),
    ("quantize", FILE, "--quant", "F16", "--allow-requantize", "--threads", "1", "--quiet", "-o", OUT),
    ("quantize", FILE, "--quant", "Q4_K_M", "--allow-requantize", "--dry-run", "--quiet", "--json"),
    ("quantize", SOUND, "--like", FILE, "--allow-requantize", "--dry-run", "--quiet"),
    ("recipes", "extract", FILE),
    ("imatrix", "show", FILE),
)


@cache
def sound(qtype: str) -> bytes:
    """A sound file, its tensors in F16, BF16 or F32."""
    folder = Path(tempfile.mkdtemp(prefix="gguf3n-fuzz-"))
    try:
        for name, data in checkpoint_fuzzing.sources().items():
            if name != checkpoint_fuzzing.INDEX:
                (folder / name).write_bytes(data)
        return gguf3n.convert(folder, qtype, folder / "x.gguf", threads=1)[0].path.read_bytes()
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class _Contents:
    """A sound file's keys, and its tensors' names, shapes and types."""

    keys: tuple[KeyValue, ...]
    tensors: tuple[tuple[str, tuple[int, ...], QType], ...]
    header_bytes: int


@cache
def _contents(qtype: str) -> _Contents:
    data = sound(qtype)
    gguf = read_header(HeaderInMemory("sound", data, len(data)))
    keys = [
        KeyValue(key.name, key.type, key.value.tolist(), key.value.element_type)
        if isinstance(key.value, GGUFArray)
        else KeyValue(key.name, key.type, key.value)
        for key in gguf.all_keys
    ]
    tensors = [(tensor.name, tensor.shape, tensor.qtype) for tensor in gguf.all_tensors]
    return _Contents(tuple(keys), tuple(tensors), gguf.header_bytes)


def _mutate_header(qtype: str, rng: random.Random) -> bytes:
    data, n_header = sound(qtype), _contents(qtype).header_bytes
    cut = rng.choice((n_header, min(n_header, 6000)))  # most of a header is its vocabulary
    start = rng.choice((0, n_header - cut))
    return data[:start] + fuzzing.mutate(data[start : start + cut], rng) + data[start + cut :]


def _remake(qtype: str, rng: random.Random) -> bytes:
    """The same file with some keys and tensors of other types, values and shapes, well formed."""
    data, contents = sound(qtype), _contents(qtype)
    keys, table = list(contents.keys), list(contents.tensors)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(keys))
        choice = rng.random()
        if choice < 0.55:
            keys[at] = _other_value(keys[at], rng)
        elif choice < 0.65:
            del keys[at]
        else:
            at = rng.randrange(len(table))
            name, shape, kind = table[at]
            if choice < 0.8:
                kind = rng.choice(list(QType))
            elif choice < 0.95:
                shape = _other_shape(shape, rng)
            else:
                name = rng.choice(("", "a", "blk.0.attn_q.weight", "x" * 70, "blk.99.attn_q.weight", "\n\x1b[31m"))
            table[at] = (name, shape, kind)
    try:
        layout = lay_out(keys, table)
    except (ValueError, OverflowError):  # rows that hold no whole blocks
        return _mutate_header(qtype, rng)
    n_data = min(max(layout.total_bytes - len(layout.header), 0), 4 << 20)
    return layout.header + (data[contents.header_bytes :] + bytes(n_data))[:n_data]


def _other_shape(shape: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    changed = list(shape)
    match rng.randrange(4):
        case 0:
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 2, 3, 31, 33, 256))
        case 1:
            changed = [0, rng.choice((2**62, 2**40, 1))]
        case 2:
            changed.reverse()
        case _:
            changed.insert(0, rng.choice((1, 2)))
    return tuple(changed[:4])


def _other_value(key: KeyValue, rng: random.Random) -> KeyValue:
    scalars: dict[Any, Sequence[Any]] = {
        GGUFValueType.UINT32: (0, 1, 2, 3, 255, 2**31, 2**32 - 1),
        GGUFValueType.INT32: (-1, 0, 1, 2**31 - 1, -(2**31)),
        GGUFValueType.UINT64: (0, 2**62, 2**64 - 1),
        GGUFValueType.INT8: (-1, 1),
        GGUFValueType.FLOAT32: (0.0, -1.0, float("nan"), float("inf"), 1e38, 1.5),
        GGUFValueType.FLOAT64: (1e308, float("nan")),
        GGUFValueType.BOOL: (True, False),
        GGUFValueType.STRING: ("", "a", "\x1b[31m", "\n::error::x", "é" * 300, "x" * 100_000, "gemma3n", "llama"),
    }
    kind = rng.choice(list(scalars))
    if rng.random() < 0.5:
        return KeyValue(key.name, kind, rng.choice(scalars[kind]))
    n = len(key.value) if isinstance(key.value, list) and rng.random() < 0.6 else rng.choice((0, 1, 2, 7, 1000))
    return KeyValue(
        key.name,
        GGUFValueType.ARRAY,
        [rng.choice(scalars[kind][:7][-5:]) for _ in range(n)]
        if kind is not GGUFValueType.STRING
        else [rng.choice(("a", "", "▁")) for _ in range(n)],
        kind,
    )


def make(path: Path, number: int) -> None:
    """The file of this number."""
    rng = random.Random(number)
    qtype = rng.choice(("F16", "BF16", "F32"))
    broken = _remake(qtype, rng) if rng.random() < 0.6 else _mutate_header(qtype, rng)
    if rng.random() < 0.1:
        broken = hostile.mutate_bytes(broken, rng)
    path.write_bytes(broken)


@cache
def _command() -> Any:
    """The whole command line. Why not `main`: its last resort would hide what is looked for."""
    return typer.main.get_command(app)


def check(number: int) -> str:
    """One broken file through one command; what became of it."""
    folder = Path(tempfile.mkdtemp(prefix="gguf3n-fuzz-", dir="/dev/shm"))
    places = {FILE: folder / "broken.gguf", SOUND: folder / "sound.gguf", OUT: folder / "out.gguf"}
    command = COMMANDS[number % len(COMMANDS)]
    try:
        make(places[FILE], number)
        if SOUND in command:
            places[SOUND].write_bytes(sound("F16"))
        words = [str(places.get(word, word)) for word in command]
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(nowhere),
        ):
            result = _command()(words, standalone_mode=False)
        return f"exit {result or 0}"
    except Gguf3nError as error:
        str(error).encode("utf-8", "backslashreplace")
        return type(error).__name__
    except typer.Exit as left:
        return f"exit {left.exit_code}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
