"""The record of which types llama-quantize chooses for Gemma 3n: what was asked, and how the answers are written down.

The record is fixtures/recipes/llama_cpp.json, made by scripts/make_recipe_snapshots.py, one line a file type:

    "attn_v": "Q4_K, Q6_K 0-3,6,9"      Q6_K in layers 0 to 3, 6 and 9, Q4_K in the others
    "imatrix"                           what differs with an importance matrix
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from gguf3n.formats.gguf_layout import GGUFValueType, KeyValue, QType
from gguf3n.formats.gguf_writer import lay_out
from gguf3n.gemma3n.config import Config, parse_config
from gguf3n.gemma3n.mapping import Storage
from gguf3n.gemma3n.published import PUBLISHED, outline
from gguf3n.gemma3n.text import ARCH, model_keys
from workshop.checkpoints import tiny_config
from workshop.places import FIXTURES

SNAPSHOT = FIXTURES / "recipes" / "llama_cpp.json"

FTYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1",
    "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M",
    "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ1_0", "TQ2_0",
)  # fmt: skip

TINY = parse_config(tiny_config(), Path("tiny"))
SIZES: Mapping[str, Config] = {
    **PUBLISHED,
    "tiny": TINY,
    "odd": replace(
        TINY, hidden_size=288, intermediate_size=(520,) * 22, num_attention_heads=4, num_key_value_heads=1, head_dim=80
    ),
}
"""The models asked about. Why: `odd` has rows of 288, 320 and 520, which hold no blocks of 256 or of 32."""


def compress(types: Mapping[str, str]) -> dict[str, str]:
    """Tensor -> type, as kind of tensor -> the type of most layers, then the others with their layers."""
    kinds: dict[str, dict[int, str]] = {}
    lines: dict[str, str] = {}
    for name, qtype in types.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
        if match is None:
            lines[name.removesuffix(".weight")] = qtype
        else:
            kinds.setdefault(match[2], {})[int(match[1])] = qtype
    for kind, layers in sorted(kinds.items()):
        usual = Counter(layers.values()).most_common(1)[0][0]
        parts = [usual]
        for qtype in dict.fromkeys(layers.values()):
            if qtype != usual:
                parts.append(f"{qtype} {ranges(bid for bid, other in layers.items() if other == qtype)}")
        lines[kind] = ", ".join(parts)
    return lines


def expand(lines: Mapping[str, str], n_layers: int) -> dict[str, str]:
    """The inverse of `compress`."""
    types: dict[str, str] = {}
    for kind, line in lines.items():
        if kind in ("token_embd", "per_layer_token_embd"):
            types[f"{kind}.weight"] = line
            continue
        usual, *others = re.split(r", (?=[A-Z])", line)
        for bid in range(n_layers):
            types[f"blk.{bid}.{kind}.weight"] = usual
        for part in others:
            qtype, layers = part.split(" ")
            for first, last in (piece.partition("-")[::2] for piece in layers.split(",")):
                for bid in range(int(first), int(last or first) + 1):
                    types[f"blk.{bid}.{kind}.weight"] = qtype
    return types


def ranges(numbers: Iterable[int]) -> str:
    """As in "0-3,6,9"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def write_sparse(config: Config, path: Path) -> set[str]:
    """A BF16 file of zeros that takes no space; returns the names of the tensors that may be quantized."""
    tensors = outline(config)
    layout = lay_out(
        [KeyValue("general.architecture", GGUFValueType.STRING, ARCH), *model_keys(config)],
        [
            (tensor.name, tensor.shape, QType.F32 if tensor.storage is Storage.FLOAT32 else QType.BF16)
            for tensor in tensors
        ],
    )
    with open(path, "wb") as file:
        file.write(layout.header)
        file.truncate(layout.total_bytes)
    return {tensor.name for tensor in tensors if tensor.storage is Storage.QUANTIZABLE}
