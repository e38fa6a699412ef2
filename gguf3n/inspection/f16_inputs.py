"""How large the inputs of the vision tower's convolutions can be, whatever the image: bounds from the weights alone.

llama.cpp keeps what a convolution gives out in F32, but rounds what goes in to F16 where the kernel is F16. So F16 can
overflow at the inputs only, at magnitudes above 65504. Every input has a norm not far behind it, which bounds it:

    RMS norm of C channels with weights w      channel c is at most |w_c| sqrt(C); together, w times a vector no longer
                                               than sqrt(C)
    GELU                                       makes nothing larger
    values of attention                        y = V (w u) with |u| <= sqrt(C): |y_d| <= sqrt(C) |V_d w|; attention
                                               takes means of them, which are no larger
    its output projection                      |o_c| <= the sum over d of |O_cd| max|y_d|, and <= the sum over heads of
                                               |O_ch| sqrt(C) |V w|: the smaller of the two
    a block that adds to what is there         the bounds of both added up, channel by channel

These are bounds and no estimates: what lies below 65504 cannot overflow; what lies above may, and most likely does not,
as no image drives all channels to their bounds. A hundredth is added for what rounding does on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from gguf3n.formats.gguf_reader import GGUFFile
from gguf3n.formats.half import F16_MAX
from gguf3n.formats.rows import RowReader
from gguf3n.gemma3n.mmproj import target_name
from gguf3n.gemma3n.tower import Attention, Block, Edge, Inverted, Tower

ROUNDING = 1.01
CONVOLUTION_INPUTS = F16_MAX
"""What an F16 kernel's input may be."""

Bound = NDArray[np.float64]


def input_bounds(gguf: GGUFFile, tower: Tower) -> dict[str, float]:
    """Of each convolution of the tower but the stem, by its name in the file: the largest magnitude that can go in.

    Raises: GGUFError where the file ends early.
    """
    with closing(RowReader()) as reader:
        return {name: ROUNDING * bound for name, bound in _Bounds(gguf, reader).of(tower)}


class _Bounds:
    def __init__(self, gguf: GGUFFile, reader: RowReader) -> None:
        self.gguf = gguf
        self.reader = reader

    def of(self, tower: Tower) -> Iterator[tuple[str, float]]:
        there = self.norm("conv_stem.bn.weight")
        ends = []
        for stage, blocks in enumerate(tower.stages):
            for number, block in enumerate(blocks):
                place = f"blocks.{stage}.{number}."
                added, inputs = self.block(block, place, there)
                for suffix, bound in inputs.items():
                    yield target_name(f"{place}{suffix}"), float(bound.max())
                stays = number > 0 and block.n_in == block.n_out
                there = there + added if stays else added
            ends.append(there)
        yield target_name("msfa.ffn.pw_exp.conv.weight"), float(max(end.max() for end in ends[-2:]))
        yield target_name("msfa.ffn.pw_proj.conv.weight"), float(self.norm("msfa.ffn.pw_exp.bn.weight").max())

    def block(self, block: Block, place: str, there: Bound) -> tuple[Bound, dict[str, Bound]]:
        """What a block gives out, and what goes into each of its convolutions."""
        inputs: dict[str, Bound] = {}
        if isinstance(block, Edge):
            inputs["conv_exp.weight"] = there
            inputs["conv_pwl.weight"] = self.norm(f"{place}bn1.weight")
            return self.norm(f"{place}bn2.weight"), inputs
        scale = np.abs(self.vector(f"{place}layer_scale.gamma"))
        if isinstance(block, Inverted):
            inside = there
            if block.start_kernel:
                inputs["dw_start.conv.weight"] = inside
                inside = self.norm(f"{place}dw_start.bn.weight")
            inputs["pw_exp.conv.weight"] = inside
            inside = self.norm(f"{place}pw_exp.bn.weight")
            if block.mid_kernel:
                inputs["dw_mid.conv.weight"] = inside
                inside = self.norm(f"{place}dw_mid.bn.weight")
            inputs["pw_proj.conv.weight"] = inside
            return scale * self.norm(f"{place}pw_proj.bn.weight"), inputs
        return self.attention(block, place, scale, inputs), inputs

    def attention(self, block: Attention, place: str, scale: Bound, inputs: dict[str, Bound]) -> Bound:
        normed = f"{place}norm.weight"
        inputs["attn.query.proj.weight"] = self.norm(normed)
        for part in ("key", "value"):
            before = normed
            if block.down_kernel:
                inputs[f"attn.{part}.down_conv.weight"] = self.norm(normed)
                before = f"{place}attn.{part}.norm.weight"
            inputs[f"attn.{part}.proj.weight"] = self.norm(before)
        values = self.matrix(f"{place}attn.value.proj.weight") * self.vector(before)  # of "value", the last part
        each = np.sqrt(block.n_in) * np.linalg.norm(values, axis=1)
        n_heads = block.n_query // block.n_key
        inputs["attn.output.proj.weight"] = each
        out = np.abs(self.matrix(f"{place}attn.output.proj.weight"))
        by_value = out @ np.tile(each, n_heads)
        by_head = np.linalg.norm(out.reshape(block.n_in, n_heads, block.n_key), axis=2).sum(1) * np.linalg.norm(each)
        added: Bound = scale * np.minimum(by_value, by_head)
        return added

    def norm(self, name: str) -> Bound:
        """What an RMS norm with these weights can give out, by channel."""
        weights = np.abs(self.vector(name))
        return np.asarray(weights * np.sqrt(len(weights)), np.float64)

    def vector(self, name: str) -> Bound:
        return self.values(name).reshape(-1)

    def matrix(self, name: str) -> Bound:
        """A 1 x 1 kernel. Shapes: [outputs, inputs]."""
        return self.values(name)[:, :, 0, 0]

    def values(self, name: str) -> Bound:
        tensor = self.gguf.tensors[target_name(name)]
        stored = self.gguf.stored(tensor)
        values = np.empty((stored.n_rows, stored.n_per_row), np.float32)
        self.reader.fill(stored, 0, values)
        return values.reshape(tensor.shape).astype(np.float64)
