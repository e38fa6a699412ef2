"""Broken GGUF files, and what must hold for each: reader, lint and repair raise nothing but our own errors, and soon.

Most bytes of a header are names; what breaks readers are the few counts, lengths, types and offsets between them. So
`mutate` changes those more often than chance would.
"""

from __future__ import annotations

import random
import struct
import time
import tracemalloc

MAX_SECONDS = 1.0
MAX_BYTES = 64 << 20
MEASURE_EVERY = 64
"""Memory is traced for one input in so many: tracing makes Python slow."""

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    12,
    13,
    32,
    255,
    65_535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def seeds() -> list[bytes]:
    """Small files: empty, every value type, a Gemma 3n of three layers without data, in both byte orders."""
    from gguf3n.formats.gguf_layout import SCALAR_CODES, GGUFValueType, KeyValue, QType
    from gguf3n.formats.gguf_writer import lay_out
    from gguf3n.gemma3n.metadata import file_keys
    from gguf3n.gemma3n.published import PUBLISHED
    from gguf3n.gemma3n.text import model_keys

    every = [KeyValue(f"k{kind.value}", kind, 1) for kind in SCALAR_CODES]
    every += [KeyValue(f"a{kind.value}", GGUFValueType.ARRAY, [1, 0], kind) for kind in SCALAR_CODES]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<0x0A>", "a"]
    model = [
        KeyValue("general.architecture", GGUFValueType.STRING, "gemma3n"),
        *model_keys(PUBLISHED["E2B"]),
        *file_keys(7),
        KeyValue("tokenizer.ggml.model", GGUFValueType.STRING, "llama"),
        KeyValue("tokenizer.ggml.tokens", GGUFValueType.ARRAY, words, GGUFValueType.STRING),
        KeyValue("tokenizer.ggml.scores", GGUFValueType.ARRAY, [0.0] * 8, GGUFValueType.FLOAT32),
        KeyValue("tokenizer.ggml.token_type", GGUFValueType.ARRAY, [3] * 8, GGUFValueType.INT32),
        KeyValue("tokenizer.chat_template", GGUFValueType.STRING, "{{ bos_token }}<end_of_turn>"),
    ]
    tensors = [
        ("token_embd.weight", (8, 32), QType.Q8_0),
        ("per_layer_token_embd.weight", (6, 32), QType.Q8_0),
        ("per_layer_proj_norm.weight", (4,), QType.F32),
        *((f"blk.{i}.attn_q_norm.weight", (8,), QType.F32) for i in range(3)),
        *((f"blk.{i}.ffn_gate.weight", (32, 32), QType.Q4_0) for i in range(3)),
    ]
    files = []
    for keys, table in (([], []), (every, tensors[:2]), (model, tensors)):
        layout = lay_out(keys, table)
        files.append(layout.header + bytes(layout.total_bytes - len(layout.header)))
    big = struct.pack(">4sIQQQ1sIQ2s", b"GGUF", 3, 0, 1, 1, b"k", 8, 2, b"ab")
    return [*files, big]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change a number where one is likely to stand, or cut, double, move a piece."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if len(out) < 24:
            break
        choice = rng.random()
        at = rng.randrange(4, len(out) - 8)
        if choice < 0.35:
            struct.pack_into("<Q", out, at, rng.choice(NUMBERS))
        elif choice < 0.6:
            struct.pack_into("<I", out, at, rng.choice(NUMBERS) & 0xFFFFFFFF)
        elif choice < 0.7:
            struct.pack_into("<Q", out, rng.choice((8, 16)), rng.choice(NUMBERS[:10]))
        elif choice < 0.8:
            out[at] = rng.randrange(256)
        elif choice < 0.9:
            n = rng.randint(1, 64)
            source = rng.randrange(len(out))
            out[at:at] = out[source : source + n]
        else:
            del out[at : at + rng.randint(1, 64)]
    return bytes(out)


def check(data: bytes) -> None:
    """Read, lint and repair one input in memory. Raises whatever is not an error of ours."""
    from gguf3n.errors import Gguf3nError
    from gguf3n.formats.byte_source import HeaderInMemory
    from gguf3n.formats.gguf_draft import Draft
    from gguf3n.formats.gguf_reader import read_header
    from gguf3n.inspection.lint import lint_file
    from gguf3n.inspection.repair import plan_repair

    source = HeaderInMemory("fuzz", data, len(data))
    for strict in (True, False):
        try:
            gguf = read_header(source, strict=strict)
            for key in gguf.keys.values():
                gguf.value(key.name)
            if not strict:
                lint_file(gguf, with_data=True)
                draft = Draft(gguf)
                plan_repair(draft)
                draft.patches()
        except Gguf3nError:
            pass


def test_one_input(data: bytes) -> None:
    """`check`, with the bounds on time and, for some inputs, on memory."""
    traced = hash(data) % MEASURE_EVERY == 0
    if traced:
        tracemalloc.start()
    started = time.perf_counter()
    try:
        check(data)
    finally:
        seconds = time.perf_counter() - started
        peak = 0
        if traced:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    if seconds > MAX_SECONDS * (10 if traced else 1):
        raise TimeoutError(f"{seconds:.1f} s")
    if peak > MAX_BYTES:
        raise MemoryError(f"{peak:,} bytes")
