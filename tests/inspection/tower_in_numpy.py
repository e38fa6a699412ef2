"""The vision tower in plain NumPy, float64, as llama.cpp's graph has it: what goes into each convolution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gguf3n.formats.gguf_reader import GGUFFile
from gguf3n.formats.rows import RowReader
from gguf3n.gemma3n.mmproj import target_name
from gguf3n.gemma3n.tower import Attention, Edge, Tower


def inputs(gguf: GGUFFile, tower: Tower, image: np.ndarray) -> Iterator[tuple[str, float]]:
    """Name of a convolution and the largest magnitude that goes into it. Shapes: image [3, n, n]."""
    reader = RowReader()
    seen: list[tuple[str, float]] = []

    def weight(name: str) -> np.ndarray:
        tensor = gguf.tensors[target_name(name)]
        stored = gguf.stored(tensor)
        values = np.empty((stored.n_rows, stored.n_per_row), np.float32)
        reader.fill(stored, 0, values)
        return values.reshape(tensor.shape).astype(np.float64)

    def convolve(name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        if name != "conv_stem.conv.weight":
            seen.append((target_name(name), float(np.abs(x).max())))
        return convolution(x, weight(name), stride)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(0) + 1e-6) * weight(name)[:, None, None]

    x = convolve("conv_stem.conv.weight", image, 2) + weight("conv_stem.conv.bias").reshape(-1, 1, 1)
    x = gelu(norm("conv_stem.bn.weight", x))
    ends = []
    for stage, blocks in enumerate(tower.stages):
        for number, block in enumerate(blocks):
            at = f"blocks.{stage}.{number}."
            stride = 1 if number else 2
            if isinstance(block, Edge):
                y = gelu(norm(f"{at}bn1.weight", convolve(f"{at}conv_exp.weight", x, stride)))
                y = norm(f"{at}bn2.weight", convolve(f"{at}conv_pwl.weight", y))
            elif isinstance(block, Attention):
                y = attention(block, at, norm(f"{at}norm.weight", x), convolve, norm)
                y = convolve(f"{at}attn.output.proj.weight", y) * weight(f"{at}layer_scale.gamma")[0]
            else:
                y = x
                if block.start_kernel:
                    y = norm(f"{at}dw_start.bn.weight", convolve(f"{at}dw_start.conv.weight", y))
                y = gelu(norm(f"{at}pw_exp.bn.weight", convolve(f"{at}pw_exp.conv.weight", y)))
                if block.mid_kernel:
                    y = gelu(norm(f"{at}dw_mid.bn.weight", convolve(f"{at}dw_mid.conv.weight", y, stride)))
                y = norm(f"{at}pw_proj.bn.weight", convolve(f"{at}pw_proj.conv.weight", y))
                y = y * weight(f"{at}layer_scale.gamma")[0]
            x = x + y if x.shape == y.shape else y
        ends.append(x)
    last = ends[-1].repeat(ends[-2].shape[1] // ends[-1].shape[1], 1).repeat(ends[-2].shape[2] // ends[-1].shape[2], 2)
    y = convolve("msfa.ffn.pw_exp.conv.weight", np.concatenate([ends[-2], last]))
    convolve("msfa.ffn.pw_proj.conv.weight", gelu(norm("msfa.ffn.pw_exp.bn.weight", y)))
    reader.close()
    yield from seen


def attention(block: Attention, at: str, x: np.ndarray, convolve: Any, norm: Any) -> np.ndarray:
    """What goes into the output projection. Shapes: x [channels, h, w]."""
    queries = convolve(f"{at}attn.query.proj.weight", x)
    parts = []
    for part in ("key", "value"):
        y = x
        if block.down_kernel:
            y = norm(f"{at}attn.{part}.norm.weight", convolve(f"{at}attn.{part}.down_conv.weight", x, 2))
        parts.append(convolve(f"{at}attn.{part}.proj.weight", y).reshape(block.n_key, -1))
    keys, values = parts
    heads = queries.reshape(-1, block.n_key, x.shape[1] * x.shape[2])
    scores = np.einsum("hdn,dm->hnm", heads, keys) / np.sqrt(block.n_key)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("hnm,dm->hdn", shares, values).reshape(block.n_query, *x.shape[1:])


def convolution(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """With zeros around, so that the size is the input's over the stride; depthwise where a kernel has one input."""
    size = kernel.shape[-1]
    n = -(-x.shape[1] // stride)
    pad = max((n - 1) * stride + size - x.shape[1], 0)
    x = np.pad(x, ((0, 0), *2 * ((pad // 2, pad - pad // 2),)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]
    if kernel.shape[1] == 1 and len(x) > 1:
        return np.asarray(np.einsum("chwij,cij->chw", windows, kernel[:, 0]))
    return np.asarray(np.einsum("chwij,ocij->ohw", windows, kernel))


def gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))
