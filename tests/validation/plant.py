"""Faults planted in a copy of a GGUF file: what a converter, a merge or a mix-up would have written instead.

Each function changes the source's values of one tensor, which are then quantized to the tensor's type, with the same
importances as the rest of the file, and written over it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as QType
from gguf.quants import dequantize

from gguf3n.formats.gguf_reader import open_part
from gguf3n.formats.rows import Stored, Zeros
from gguf3n.gemma3n.part import Part
from gguf3n.quants.api import quantize


@dataclass
class Planter:
    """A file to plant faults in, and the source it was made from. `quant_weights` by tensor."""

    path: Path
    source: Part
    quant_weights: Mapping[str, np.ndarray] = field(default_factory=dict)

    def values(self, name: str) -> np.ndarray:
        """A source tensor in float32."""
        (tensor,) = [tensor for tensor in self.source.tensors if tensor.name == name]
        pieces = []
        for rows in tensor.rows:
            if isinstance(rows, Zeros):
                pieces.append(np.zeros((rows.n_rows, tensor.n_per_row), np.float32))
                continue
            assert isinstance(rows, Stored), rows
            raw = np.fromfile(rows.file, np.uint8, rows.stored_bytes, offset=rows.offset)
            pieces.append(dequantize(raw, QType[rows.dtype]).reshape(rows.n_rows, tensor.n_per_row))
        return np.concatenate(pieces).reshape(tensor.shape).astype(np.float32)

    def write(self, name: str, values: np.ndarray) -> str:
        """Write other values over a tensor; returns its name."""
        tensor = open_part(self.path).tensors[name]
        blocks = quantize(np.ascontiguousarray(values, np.float32), tensor.qtype, self.quant_weights.get(name))
        assert blocks.nbytes == tensor.n_bytes
        with open(self.path, "r+b") as file:
            file.seek(tensor.offset)
            file.write(blocks.tobytes())
        return name


Plant = Callable[[Planter], str]
PLANTS: dict[str, tuple[Plant, str]] = {}
"""By what it is: a function that plants a fault and returns the tensor's name, and what is to be said of it."""


def plants(said: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        PLANTS[plant.__name__] = (plant, said)
        return plant

    return register


@plants(r"^the values of blk\.4\.attn_q\.weight;")
def another_layers_tensor(planter: Planter) -> str:
    return planter.write("blk.2.attn_q.weight", planter.values("blk.4.attn_q.weight"))


@plants(r"^the values of blk\.3\.ffn_up\.weight;")
def gate_and_up_mixed_up(planter: Planter) -> str:
    return planter.write("blk.3.ffn_gate.weight", planter.values("blk.3.ffn_up.weight"))


@plants(r"^rows 128-191 of 512: zeros;")
def zeroed_rows(planter: Planter) -> str:
    values = planter.values("blk.5.ffn_up.weight")
    values[128:192] = 0
    return planter.write("blk.5.ffn_up.weight", values)


@plants(r"^rows 64-95 of 256: the values of blk\.8\.attn_q\.weight;")
def foreign_rows(planter: Planter) -> str:
    values = planter.values("blk.7.attn_q.weight")
    values[64:96] = planter.values("blk.8.attn_q.weight")[64:96]
    return planter.write("blk.7.attn_q.weight", values)


@plants(r"^zeros;")
def zeroed_tensor(planter: Planter) -> str:
    return planter.write("blk.11.proj.weight", 0 * planter.values("blk.11.proj.weight"))


@plants(r"^every value is 1 more than in the source \(Gemma 3n's norms")
def norm_with_1_added(planter: Planter) -> str:
    return planter.write("blk.6.attn_norm.weight", planter.values("blk.6.attn_norm.weight") + 1)


@plants(r"^its matrices in another order: 1, 2, 0;")
def altup_in_another_order(planter: Planter) -> str:
    return planter.write("altup_proj.weight", planter.values("altup_proj.weight")[[1, 2, 0]])


@plants(r"its rows in another order: row 1 is the source's row 4;")
def altup_coefficients_in_another_order(planter: Planter) -> str:
    """4 x 4 coefficients a row of four, its groups swapped."""
    values = planter.values("blk.9.altup_predict_coef.weight")
    return planter.write("blk.9.altup_predict_coef.weight", values.reshape(4, 4, 4).transpose(1, 0, 2).reshape(16, 4))


@plants(r"^another version of this tensor(: \d+\.\d+% of its weights|, 1\.5\d% away;)")
def older_version(planter: Planter) -> str:
    """Of weights that differ by 1.5 %, quantized as the others."""
    values = planter.values("blk.10.ffn_down.weight")
    noise = np.random.default_rng(0).standard_normal(values.shape, np.float32)
    return planter.write("blk.10.ffn_down.weight", values + 0.015 * np.sqrt(np.mean(values**2)) * noise)


@plants(r"^its rows shifted by -1;")
def shifted_vocabulary(planter: Planter) -> str:
    return planter.write("token_embd.weight", np.roll(planter.values("token_embd.weight"), 1, axis=0))


@plants(r"^its rows shifted by -1;")
def shifted_per_layer_vocabulary(planter: Planter) -> str:
    return planter.write(
        "per_layer_token_embd.weight", np.roll(planter.values("per_layer_token_embd.weight"), 1, axis=0)
    )


@plants(r"^transposed;")
def transposed_square(planter: Planter) -> str:
    return planter.write("blk.12.attn_q.weight", planter.values("blk.12.attn_q.weight").T)


@plants(r"^transposed;")
def transposed_oblong(planter: Planter) -> str:
    """The bytes of the transposed matrix under the shape that it has."""
    values = planter.values("blk.13.ffn_gate.weight")
    return planter.write("blk.13.ffn_gate.weight", values.T.reshape(values.shape))


@plants(r"^scaled by (1\.[89]\d*|2|2\.0\d*);")
def scaled(planter: Planter) -> str:
    return planter.write("blk.14.ffn_down.weight", 2 * planter.values("blk.14.ffn_down.weight"))


@plants(r"its rows in another order: row 1 is the source's row 32;")
def permuted_heads(planter: Planter) -> str:
    """As converters of Llama reorder what RoPE rotates."""
    values = planter.values("blk.15.attn_k.weight")
    n_heads, n_columns = 2, values.shape[1]
    turned = values.reshape(n_heads, 2, -1, n_columns).swapaxes(1, 2).reshape(values.shape)
    return planter.write("blk.15.attn_k.weight", turned)


@plants(r"^something else;")
def noise(planter: Planter) -> str:
    values = planter.values("blk.16.attn_v.weight")
    other = np.random.default_rng(1).standard_normal(values.shape, np.float32)
    return planter.write("blk.16.attn_v.weight", float(values.std()) * other)
