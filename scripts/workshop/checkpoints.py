"""Gemma 3n checkpoints of random weights: the same bytes for the same options.

The names and shapes of the full sizes come from fixtures/inventories. The tiny model has what llama.cpp fixes for this
architecture (20 layers with keys and values of their own, 10 sparse ones, per-layer width 256, laurel rank 64, four
AltUp inputs, one FFN width) and is small elsewhere. Of its two layers with shared keys and values one is sliding and
one is full, so both sources are read. Its vision and audio towers stand in workshop/towers.py.

Random weights of unit size make a chaotic network, in which a rounding error in the first layer decides the last logit.
These are well conditioned instead (see `spread`): quantization errors stay in proportion, and engines can be compared.

Large tensors are rolled copies of one block of noise whose length is prime. So no two rows of a tensor are equal, and
the disk is the only limit.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from workshop import small_tokenizer as small
from workshop import towers
from workshop.places import FIXTURES

INVENTORIES = FIXTURES / "inventories"
CONFIGS = FIXTURES / "configs"
TOKENIZER = FIXTURES / "tokenizer"

PUBLISHED = "model.language_model."
LAYOUTS = {
    # published name -> name in this layout, by prefix; first match wins
    "published": {},
    "text-only": {PUBLISHED: "model."},
    "nested": {PUBLISHED: "language_model.model.", "model.": ""},
    "peft-prefix": {"model.": "base_model.model.model."},
}
DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4}
SHARED_KV = re.compile(r"\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.")

BLOCK = 16_777_213  # the largest prime below 2^24
FRESH = 1 << 20  # tensors up to this many values get noise of their own


@dataclass(frozen=True)
class Options:
    """What is asked for, as on the command line."""

    size: str = "tiny"
    layout: str = "published"
    dtype: str = "bf16"
    shards: int = 1
    shared_kv: bool = True
    tokenizer: str = "both"
    multimodal: bool = False
    seed: int = 0


def read_inventory(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, with the ranges of fixtures/inventories written out.

    `{0..29}` stands for 30 layers, `{9..35..2}` counts in twos, `{0..8,10}` joins ranges.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, shape in json.loads(path.read_text("utf-8")).items():
        for name in expand(pattern):
            assert name not in shapes, f"{path}: {name} twice"
            shapes[name] = tuple(shape)
    return shapes


def expand(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for."""
    head, brace, tail = pattern.partition("{")
    if not brace:
        yield pattern
        return
    inside, _, tail = tail.partition("}")
    for part in inside.split(","):
        first, *rest = (int(n) for n in part.split(".."))
        last, step = (*rest, 1)[:2] if rest else (first, 1)
        for i in range(first, last + 1, step):
            yield f"{head}{i}{tail}"


@dataclass(frozen=True)
class Small:
    """A model of few weights: its layers, how many of them share keys and values, and how wide it is."""

    n_layers: int
    n_kv_shared: int
    times: int = 1


SMALL = {"tiny": Small(22, 2), "tiny-e4b": Small(35, 15), "mid-e4b": Small(35, 15, times=6)}
"""The last is for measurements: 1.5 GB."""


def tiny_config(size: str = "tiny") -> dict[str, Any]:
    """E2B's config.json with every size that is free made small."""
    config: dict[str, Any] = json.loads((CONFIGS / "gemma-3n-e2b.json").read_text("utf-8"))
    n_layers, times, n_pieces, n_soft = SMALL[size].n_layers, SMALL[size].times, 1024, 32
    sliding = [(i + 1) % 5 != 0 for i in range(n_layers - 1)] + [False]
    config["text_config"] |= {
        "vocab_size": n_pieces + 2 * n_soft,
        "vocab_size_per_layer_input": n_pieces,
        "hidden_size": 256 * times,
        "intermediate_size": [512 * times] * n_layers,
        "num_hidden_layers": n_layers,
        "num_kv_shared_layers": SMALL[size].n_kv_shared,
        "num_attention_heads": 4 * times,
        "num_key_value_heads": 2 * times,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "sliding_window": 32,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (n_layers - 10),
    }
    config["vision_config"] |= {"vocab_size": n_soft, "vocab_offset": n_pieces, **towers.VISION_CONFIG}
    config["audio_config"] |= {"vocab_size": n_soft, "vocab_offset": n_pieces + n_soft, **towers.AUDIO_CONFIG}
    return config | {
        "boi_token_id": 1016,
        "boa_token_id": 1017,
        "eoi_token_id": n_pieces,
        "image_token_id": n_pieces + 1,
        "eoa_token_id": n_pieces + n_soft,
        "audio_token_id": n_pieces + n_soft + 1,
    }


def tiny_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """A tiny model's tensors: the names of a published size, their sizes scaled down."""
    text = config["text_config"]
    n_layers, hidden, per_layer = text["num_hidden_layers"], text["hidden_size"], text["hidden_size_per_layer_input"]
    heads, kv_heads, head_dim = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    attention = {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}
    special = {
        "embed_tokens": (text["vocab_size"], hidden),
        "embed_tokens_per_layer": (text["vocab_size_per_layer_input"], n_layers * per_layer),
        "per_layer_model_projection": (n_layers * per_layer, hidden),
        "per_layer_projection_norm": (per_layer,),
        "per_layer_input_gate": (per_layer, hidden),
        "per_layer_projection": (hidden, per_layer),
        **{name: (rows, hidden) for name, rows in attention.items()},
        "o_proj": (hidden, heads * head_dim),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }
    lengths = {2048: hidden, 8192: text["intermediate_size"][0], 16384: text["intermediate_size"][0]}
    shapes = {}
    published = "gemma-3n-e2b.json" if n_layers <= 30 else "gemma-3n-e4b.json"
    for name, shape in read_inventory(INVENTORIES / published).items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= n_layers:
            continue
        if name.startswith(PUBLISHED):
            part = name.removesuffix(".weight").rpartition(".")[2]
            shapes[name] = special.get(part) or tuple(lengths.get(n, n) for n in shape)
        elif small_name := towers.tiny_name(name):
            shapes[small_name] = towers.tiny_shape(shape)
    for modality in ("vision", "audio"):
        section = config[f"{modality}_config"]
        shapes[f"model.embed_{modality}.embedding.weight"] = (section["vocab_size"], section["hidden_size"])
    return shapes


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values.

    Why: what a layer adds to the residual stream is a fifth of what is there (the `post_*norm` weights), AltUp's mixing
    coefficients stay near the identity, and matrices neither grow nor shrink their input much.
    """
    if not name.startswith(PUBLISHED):
        return towers.spread(name, shape)
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part in ("prediction_coefs", "correction_coefs"):
        return 0.0, 0.02
    if part == "correct_output_scale":
        return 0.1, 0.01
    if len(shape) == 1:
        return (0.2, 0.02) if part.startswith("post_") else (1.0, 0.1)
    row_length = math.prod(shape[1:])
    return 0.0, (1.0 if part.startswith("embed_tokens") else 0.5) / math.sqrt(row_length)


class Noise:
    """Normal random numbers, the same for a tensor's name whatever else is written."""

    def __init__(self, seed: int, dtype: str) -> None:
        self.seed = seed
        self.dtype = dtype
        self._block: np.ndarray | None = None
        self._cast: dict[tuple[float, float], np.ndarray] = {}

    def values(self, name: str, count: int, mean: float, deviation: float) -> Iterator[np.ndarray]:
        """`count` values in pieces, in the checkpoint's dtype (BF16 as its bits)."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        if count <= FRESH:
            yield self.cast(rng.standard_normal(count, dtype=np.float32), mean, deviation)
            return
        block = self.block(mean, deviation)
        start = int(rng.integers(BLOCK // 2))
        while count:
            piece = block[start : start + count]
            yield piece
            count -= len(piece)
            start = 0

    def block(self, mean: float, deviation: float) -> np.ndarray:
        """The block that large tensors share, scaled; the last few scales are kept."""
        if self._block is None:
            self._block = np.random.default_rng(self.seed).standard_normal(BLOCK, dtype=np.float32)
        key = (mean, deviation)
        if key not in self._cast:
            if len(self._cast) == 8:
                del self._cast[next(iter(self._cast))]
            self._cast[key] = self.cast(self._block, mean, deviation)
        return self._cast[key]

    def cast(self, normal: np.ndarray, mean: float, deviation: float) -> np.ndarray:
        values = normal * np.float32(deviation)
        values += np.float32(mean)
        if self.dtype == "f32":
            return values
        if self.dtype == "f16":
            return values.astype(np.float16)
        bits = values.view(np.uint32)
        rounding = ((bits >> 16) & 1) + np.uint32(0x7FFF)
        rounding += bits
        rounding >>= 16
        return rounding.astype(np.uint16)


def tensor_values(noise: Noise, name: str, shape: tuple[int, ...], n_real: int) -> Iterator[np.ndarray]:
    """The values of one tensor under its published name; rows from `n_real` on are copies of row 0, the pad token's."""
    count = math.prod(shape)
    if name != f"{PUBLISHED}embed_tokens.weight":
        yield from noise.values(name, count, *spread(name, shape))
        return
    row_length = shape[1]
    pad_row = None
    for piece in noise.values(name, n_real * row_length, *spread(name, shape)):
        if pad_row is None:
            pad_row = piece[:row_length].copy()
        yield piece
    assert pad_row is not None
    yield np.tile(pad_row, shape[0] - n_real)


def rename(name: str, layout: str) -> str:
    """A published name in another layout."""
    for prefix, other in LAYOUTS[layout].items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


def config_of(config: dict[str, Any], options: Options) -> dict[str, Any]:
    """config.json for the layout asked for; without shared keys and values in the form that transformers 5 gives it."""
    text = config["text_config"]
    dtype = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[options.dtype]
    header = {"torch_dtype": dtype} if options.shared_kv else {"dtype": dtype, "transformers_version": "5.23.0"}
    if not options.shared_kv:
        del config["torch_dtype"], text["rope_scaling"]
        text["rope_parameters"] = {
            "full_attention": {"rope_theta": text.pop("rope_theta"), "rope_type": "default"},
            "sliding_attention": {"rope_theta": text.pop("rope_local_base_freq"), "rope_type": "default"},
        }
    if options.layout == "text-only":
        version = config["transformers_version"]
        config = text | {"architectures": ["Gemma3nForCausalLM"], "transformers_version": version}
    config |= header
    return config if options.shared_kv else sorted_without_nulls(config)


def sorted_without_nulls(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in sorted(config.items()) if value is not None}
    return {key: sorted_without_nulls(value) if isinstance(value, dict) else value for key, value in kept.items()}


def plan(options: Options) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config in the published layout, and the tensors to write: published name -> shape."""
    if options.size in SMALL:
        config = tiny_config(options.size)
        shapes = tiny_shapes(config)
    else:
        config = json.loads((CONFIGS / f"gemma-3n-{options.size}.json").read_text("utf-8"))
        shapes = read_inventory(INVENTORIES / f"gemma-3n-{options.size}.json")
    text = config["text_config"]
    first_shared = text["num_hidden_layers"] - text["num_kv_shared_layers"]

    def wanted(name: str) -> bool:
        shared = SHARED_KV.search(name)
        if shared and int(shared[1]) >= first_shared and not options.shared_kv:
            return False
        return options.multimodal or name.startswith(PUBLISHED)

    return config, {name: shape for name, shape in shapes.items() if wanted(name)}


def split(shapes: dict[str, tuple[int, ...]], n_shards: int) -> list[list[str]]:
    """Names by shard, in order, of roughly equal size, none empty."""
    total, done = sum(math.prod(shape) for shape in shapes.values()), 0
    shards: list[list[str]] = [[] for _ in range(n_shards)]
    at = 0
    for left, (name, shape) in zip(range(len(shapes), 0, -1), shapes.items(), strict=True):
        full = done >= total * (at + 1) / n_shards or left < n_shards - at
        if shards[at] and at + 1 < n_shards and full:
            at += 1
        shards[at].append(name)
        done += math.prod(shape)
    assert all(shards), f"{n_shards} shards are too many for {len(shapes)} tensors"
    return shards


def write_safetensors(
    file: BinaryIO, names: list[str], shapes: dict[str, tuple[int, ...]], options: Options, n_real: int
) -> int:
    """One safetensors file, its values streamed; returns the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        end = offset + math.prod(shapes[name]) * ITEM_BYTES[options.dtype]
        header[rename(name, options.layout)] = {
            "dtype": DTYPES[options.dtype],
            "shape": list(shapes[name]),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    noise = Noise(options.seed, options.dtype)
    for name in names:
        for piece in tensor_values(noise, name, shapes[name], n_real):
            file.write(piece.data)
    return offset


def model_card(options: Options) -> str:
    base = "google/gemma-3n-E4B-it" if options.size.endswith("e4b") else "google/gemma-3n-E2B-it"
    return f"""\
---
license: gemma
base_model: {base}
pipeline_tag: text-generation
library_name: transformers
tags:
- test-fixture
---

# Random weights in the shape of Gemma 3n

Made by `scripts/make_checkpoint.py --size {options.size}`. Every weight is a random number: it has
learned nothing.
"""


def syllable_words() -> list[str]:
    """Words of one to three syllables, more than the full-size vocabulary has room for.

    Each is a join of two earlier ones, so every piece can be reached by merges.
    """
    syllables = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]
    words = [a + b for a in syllables for b in syllables]
    words += [a + b + c for a in syllables for b in syllables for c in syllables]
    return syllables + ["▁" + s for s in syllables] + [mark + word for word in words for mark in ("", "▁")]


def full_size_tokenizer() -> dict[str, bytes]:
    """Tokenizer files of the real size, 262,144 pieces with Gemma's special ids."""
    from sentencepiece import sentencepiece_model_pb2

    n_pieces, n_soft = 262144, 128
    start_of_image = 255999
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((TOKENIZER / "tokenizer.model").read_bytes())
    pieces = list(proto.pieces)
    head, learned = pieces[: small.FIRST_LEARNED], pieces[small.FIRST_LEARNED : -len(small.LAST)]
    single = [p.piece for p in learned if len(p.piece) == 1]
    merged = dict.fromkeys([p.piece for p in learned if len(p.piece) > 1] + syllable_words())
    texts = list(merged)[: start_of_image - len(head) - len(single)] + single
    last = [*small.LAST[:2], *(f"<unused{i}>" for i in range(99, 99 + n_pieces - start_of_image - 2))]
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    del proto.pieces[small.FIRST_LEARNED :]
    for text in texts:
        proto.pieces.add(piece=text, type=kind.NORMAL)
    for text in last:
        proto.pieces.add(piece=text, type=kind.USER_DEFINED)
    assert len(proto.pieces) == n_pieces == len({p.piece for p in proto.pieces})
    ids = (n_pieces, n_pieces + 1, n_pieces + n_soft, n_pieces + n_soft + 1)
    beyond = dict(zip(ids, small.BEYOND_PIECES.values(), strict=True))
    return small.tokenizer_files(small.finish(proto), beyond)


def tokenizer_of(options: Options) -> dict[str, bytes]:
    """The tokenizer files that were asked for: name -> contents."""
    if options.size in SMALL:
        files = {path.name: path.read_bytes() for path in sorted(TOKENIZER.iterdir())}
    else:
        files = full_size_tokenizer()
    if options.tokenizer == "json" and not options.shared_kv:
        # transformers 5 writes one file less, and neither added_tokens_decoder nor add_bos_token
        del files["special_tokens_map.json"]
        config = json.loads(files["tokenizer_config.json"])
        specific = config.pop("extra_special_tokens")
        for key in ("added_tokens_decoder", "add_bos_token", "add_eos_token"):
            del config[key]
        config |= {"backend": "tokenizers", "mask_token": "<mask>", "model_specific_special_tokens": specific}
        files["tokenizer_config.json"] = (json.dumps(dict(sorted(config.items())), indent=2) + "\n").encode()
    left_out = {"model": "tokenizer.json", "json": "tokenizer.model", "both": None}[options.tokenizer]
    return {name: contents for name, contents in files.items() if name != left_out}


def make(directory: Path, options: Options) -> None:
    """Writes the checkpoint."""
    config, shapes = plan(options)
    directory.mkdir(parents=True, exist_ok=True)
    shards = split(shapes, options.shards)
    total = 0
    weight_map: dict[str, str] = {}
    n_real = config["text_config"]["vocab_size_per_layer_input"]
    for i, names in enumerate(shards, 1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        with (directory / file_name).open("wb") as file:
            total += write_safetensors(file, names, shapes, options, n_real)
        weight_map |= {rename(name, options.layout): file_name for name in names}
    texts = {"config.json": json.dumps(config_of(config, options), indent=2) + "\n", "README.md": model_card(options)}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        texts["model.safetensors.index.json"] = json.dumps(index, indent=2) + "\n"
    if options.multimodal:
        image_size = towers.IMAGE_SIZE if options.size in SMALL else towers.FULL_IMAGE_SIZE
        texts |= towers.processor_files(image_size)
    for name, text in texts.items():
        (directory / name).write_text(text, "utf-8")
    for name, contents in tokenizer_of(options).items():
        (directory / name).write_bytes(contents)
