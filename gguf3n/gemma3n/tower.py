"""The vision tower: MobileNet-V5, four stages of blocks of three kinds, and every tensor that each of them has.

    Edge        a k x k convolution that widens, and a 1 x 1 back (stage 0)
    Inverted    1 x 1 convolutions that widen and narrow, depthwise ones before and between where kernels are not 0
    Attention   multi-query attention; keys and values from every second place where there is a down kernel

The first block of a stage halves the image. `PUBLISHED` is the tower of both published sizes; one of another width is
read off its tensors' shapes, so that small ones can be tested.

Source: timm/models/mobilenetv5.py, _gen_mobilenet_v5; tools/mtmd/models/mobilenetv5.cpp of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from gguf3n.errors import MappingError

Shape: TypeAlias = tuple[int, ...]

N_STAGES = 4
PUBLISHED_WIDTH = 2048
"""Of what the published tower gives out."""
N_COLORS = 3

BLOCK = re.compile(r"(?:blocks|blk)\.(\d+)\.(\d+)\.(.+)")
"""Stage, block and suffix of a tensor's own name, in a checkpoint or a GGUF file."""
MAX_BLOCKS = 1000
"""Of all stages. The published tower has 84."""
WHOLE = "use files with a whole vision tower of a Gemma 3n, such as those of the checkpoint that this was tuned from"
"""What to do about any other."""


@dataclass(frozen=True)
class Edge:
    """A fused inverted residual."""

    n_in: int
    n_mid: int
    n_out: int
    kernel: int

    @property
    def tensors(self) -> dict[str, Shape]:
        """Suffix -> shape in numpy order."""
        return {
            "conv_exp.weight": (self.n_mid, self.n_in, self.kernel, self.kernel),
            "bn1.weight": (self.n_mid,),
            "conv_pwl.weight": (self.n_out, self.n_mid, 1, 1),
            "bn2.weight": (self.n_out,),
        }


@dataclass(frozen=True)
class Inverted:
    """A universal inverted residual. A kernel of 0: none."""

    n_in: int
    n_mid: int
    n_out: int
    start_kernel: int = 0
    mid_kernel: int = 0

    @property
    def tensors(self) -> dict[str, Shape]:
        """Suffix -> shape in numpy order."""
        depthwise: dict[str, Shape] = {}
        for part, n, kernel in (("dw_start", self.n_in, self.start_kernel), ("dw_mid", self.n_mid, self.mid_kernel)):
            if kernel:
                depthwise |= {f"{part}.conv.weight": (n, 1, kernel, kernel), f"{part}.bn.weight": (n,)}
        return depthwise | {
            "pw_exp.conv.weight": (self.n_mid, self.n_in, 1, 1),
            "pw_exp.bn.weight": (self.n_mid,),
            "pw_proj.conv.weight": (self.n_out, self.n_mid, 1, 1),
            "pw_proj.bn.weight": (self.n_out,),
            "layer_scale.gamma": (self.n_out,),
        }


@dataclass(frozen=True)
class Attention:
    """Multi-query attention: many heads of queries, one of keys and values. `n_query` is of all heads together."""

    n_in: int
    n_query: int
    n_key: int
    down_kernel: int = 0

    @property
    def n_out(self) -> int:
        return self.n_in

    @property
    def tensors(self) -> dict[str, Shape]:
        """Suffix -> shape in numpy order."""
        n, kernel = self.n_in, self.down_kernel
        down: dict[str, Shape] = {}
        if kernel:
            for part in ("key", "value"):
                down |= {f"attn.{part}.down_conv.weight": (n, 1, kernel, kernel), f"attn.{part}.norm.weight": (n,)}
        return down | {
            "norm.weight": (n,),
            "attn.query.proj.weight": (self.n_query, n, 1, 1),
            "attn.key.proj.weight": (self.n_key, n, 1, 1),
            "attn.value.proj.weight": (self.n_key, n, 1, 1),
            "attn.output.proj.weight": (n, self.n_query, 1, 1),
            "layer_scale.gamma": (n,),
        }


Block: TypeAlias = Edge | Inverted | Attention


@dataclass(frozen=True)
class Tower:
    """A whole tower: the width of its stem, its blocks by stage, the fusion of the last two stages' ends."""

    n_stem: int
    stages: tuple[tuple[Block, ...], ...]
    n_fused: int
    n_out: int

    @property
    def n_blocks(self) -> int:
        return sum(map(len, self.stages))

    @property
    def tensors(self) -> dict[str, Shape]:
        """Every tensor by its name in a checkpoint, without the tower's prefix: its shape in numpy order."""
        both_ends = sum(blocks[-1].n_out for blocks in self.stages[-2:])
        return {
            "conv_stem.conv.weight": (self.n_stem, N_COLORS, 3, 3),
            "conv_stem.conv.bias": (self.n_stem,),
            "conv_stem.bn.weight": (self.n_stem,),
            **{
                f"blocks.{stage}.{block}.{suffix}": shape
                for stage, blocks in enumerate(self.stages)
                for block, each in enumerate(blocks)
                for suffix, shape in each.tensors.items()
            },
            "msfa.ffn.pw_exp.conv.weight": (self.n_fused, both_ends, 1, 1),
            "msfa.ffn.pw_exp.bn.weight": (self.n_fused,),
            "msfa.ffn.pw_proj.conv.weight": (self.n_out, self.n_fused, 1, 1),
            "msfa.ffn.pw_proj.bn.weight": (self.n_out,),
            "msfa.norm.weight": (self.n_out,),
        }


PUBLISHED = Tower(
    n_stem=64,
    stages=(
        (Edge(64, 256, 128, 3), *2 * (Edge(128, 512, 128, 3),)),
        (Inverted(128, 768, 256, 3, 5), *(Inverted(256, 1024, 256, kernel) for kernel in (5, 3, 5, 3))),
        (
            Inverted(256, 1536, 640, 5, 5),
            *7 * (Inverted(640, 2560, 640, 5),),
            Inverted(640, 640, 640),
            *14 * (Attention(640, 768, 64, 3), Inverted(640, 1280, 640)),
        ),
        (Inverted(640, 3840, 1280, 5, 5), *19 * (Attention(1280, 1536, 96), Inverted(1280, 2560, 1280))),
    ),
    n_fused=3840,
    n_out=PUBLISHED_WIDTH,
)
"""mobilenetv5_300m_enc, of E2B and E4B."""


def read_tower(shapes: Mapping[str, Shape], origin: str, prefix: str = "v.") -> Tower:
    """The tower that has tensors of these shapes: the published one where the width is that.

    The sizes are those of the main convolutions; whether all other tensors are there and fit, the mapping sees.

    Args:
        shapes: by names as `Tower.tensors` has them, or with `blk` for `blocks`.
        origin: named in errors.
        prefix: what stands before the names in the file, for errors.

    Raises: MappingError for what can't be one.
    """
    n_out, n_fused = _sizes(shapes, "msfa.ffn.pw_proj.conv.weight", origin, prefix)[:2]
    if n_out == PUBLISHED_WIDTH:
        return PUBLISHED
    blocks: dict[tuple[int, int], dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if match := BLOCK.fullmatch(name):
            if len(match[1]) > 3 or len(match[2]) > 3:
                expected = f"at most {MAX_BLOCKS} blocks"
                raise MappingError(f"{origin}: vision tower: {name}", expected=expected, fix=WHOLE)
            blocks.setdefault((int(match[1]), int(match[2])), {})[match[3]] = shape
    stages: list[tuple[Block, ...]] = []
    for stage in range(N_STAGES):
        numbers = sorted(number for at, number in blocks if at == stage)
        if not numbers or numbers != list(range(len(numbers))):
            missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
            raise MappingError(
                f"{origin}: block {stage}.{missing} of the vision tower is missing",
                expected=f"{N_STAGES} stages of blocks without gaps: llama.cpp stops counting at the first",
                found=f"blocks of stage {stage}: {', '.join(map(str, numbers)) or 'none'}",
                fix=WHOLE,
            )
        stages.append(tuple(_block(blocks[stage, number], f"{stage}.{number}", origin) for number in numbers))
    _check_widths(stages, origin)
    return Tower(_sizes(shapes, "conv_stem.conv.weight", origin, prefix)[0], tuple(stages), n_fused, n_out)


def _block(shapes: Mapping[str, Shape], place: str, origin: str) -> Block:
    where = f"{origin}: block {place} of the vision tower"

    def kernel(name: str) -> int:
        return _sizes(shapes, name, where)[-1] if name in shapes else 0

    if "conv_exp.weight" in shapes:
        n_mid, n_in, _, size = _sizes(shapes, "conv_exp.weight", where)
        found: Block = Edge(n_in, n_mid, _sizes(shapes, "conv_pwl.weight", where)[0], size)
        kernels: tuple[int, ...] = (size,)
    elif "pw_exp.conv.weight" in shapes:
        n_mid, n_in = _sizes(shapes, "pw_exp.conv.weight", where)[:2]
        start, mid = kernels = kernel("dw_start.conv.weight"), kernel("dw_mid.conv.weight")
        found = Inverted(n_in, n_mid, _sizes(shapes, "pw_proj.conv.weight", where)[0], start, mid)
    elif "attn.query.proj.weight" in shapes:
        n_query, n_in = _sizes(shapes, "attn.query.proj.weight", where)[:2]
        kernels = (kernel("attn.key.down_conv.weight"),)
        found = Attention(n_in, n_query, _sizes(shapes, "attn.key.proj.weight", where)[0], kernels[0])
        if n_query % found.n_key:
            expected = f"heads of {found.n_key}, as the keys have"
            raise MappingError(f"{where}: {n_query} queries", expected=expected, fix=WHOLE)
    else:
        raise MappingError(
            f"{where} is none of MobileNet-V5's",
            expected="one with conv_exp, pw_exp or attn.query, as in Gemma 3n",
            found=", ".join(sorted(shapes)[:5]),
            fix=WHOLE,
        )
    if even := [size for size in kernels if size and not size % 2]:
        found_kernel = f"{even[0]} x {even[0]}"
        raise MappingError(f"{where} has an even kernel", expected="3 x 3 or 5 x 5", found=found_kernel, fix=WHOLE)
    return found


def _sizes(shapes: Mapping[str, Shape], name: str, origin: str, prefix: str = "") -> Shape:
    """The four dimensions of a convolution's kernel."""
    shape = shapes.get(name)
    if shape is None:
        raise MappingError(
            f"{origin}: tensor {prefix + name!r} is missing",
            expected="it, in the vision tower of a Gemma 3n",
            fix=WHOLE,
        )
    if len(shape) != 4 or 0 in shape:
        expected = "output channels, input channels, rows, columns"
        raise MappingError(
            f"{origin}: {prefix}{name} is no convolution", expected=expected, found=str(list(shape)), fix=WHOLE
        )
    return shape


def _check_widths(stages: list[tuple[Block, ...]], origin: str) -> None:
    before: Block | None = None
    place = ""
    for stage, blocks in enumerate(stages):
        for number, block in enumerate(blocks):
            if before is not None and block.n_in != before.n_out:
                raise MappingError(
                    f"{origin}: blocks {place} and {stage}.{number} of the vision tower do not fit together",
                    expected="as many input channels as the block before has output channels",
                    found=f"{before.n_out} output channels of {place}, {block.n_in} input channels of {stage}.{number}",
                    fix=WHOLE,
                )
            before, place = block, f"{stage}.{number}"
