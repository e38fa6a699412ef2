"""The vision and audio towers of the tiny checkpoint: E2B's with fewer blocks and an eighth of all widths.

Their blocks are one of each kind that the published tower has in that stage, numbered anew. llama.cpp fixes the stages
(four, each begins with a stride of two, the last two are fused) and 16 x 16 tokens an image; transformers builds the
tower from config.json alone, because timm takes its blocks as an argument.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

SHRINK = 8
"""What all widths are divided by; image channels and kernels are not."""
LARGEST_KERNEL = 5

IMAGE_SIZE = 256
"""Pixels. The last but one stage then has 16 x 16 places, which nothing has to pool."""
FULL_IMAGE_SIZE = 768

N_CONFORMERS = 2

TIMM = "vision_tower.timm_model."

BLOCKS = {
    (0, 0): 0,
    (0, 1): 1,
    (1, 0): 0,
    (1, 1): 1,
    (2, 0): 0,
    (2, 1): 1,
    (2, 9): 2,
    (2, 10): 3,
    (3, 0): 0,
    (3, 1): 1,
    (3, 2): 2,
}
"""Stage and block of the published tower -> its number here."""


def _edge(stride: int, width: int) -> dict[str, Any]:
    kernels = {"exp_kernel_size": 3, "pw_kernel_size": 1, "force_in_chs": 0}
    return _block("er", stride, width) | kernels | {"exp_ratio": 4.0, "se_ratio": 0.0}


def _inverted(stride: int, width: int, start: int, mid: int, ratio: float) -> dict[str, Any]:
    kernels = {"dw_kernel_size_start": start, "dw_kernel_size_mid": mid, "dw_kernel_size_end": 0}
    return _block("uir", stride, width) | kernels | {"exp_ratio": ratio, "se_ratio": 0.0}


def _attention(width: int, heads: int, head_dim: int, kv_stride: int) -> dict[str, Any]:
    heads_of = {"num_heads": heads, "key_dim": head_dim, "value_dim": head_dim, "kv_stride": kv_stride}
    return _block("mqa", 1, width) | {"dw_kernel_size": 3} | heads_of


def _block(kind: str, stride: int, width: int) -> dict[str, Any]:
    return {"block_type": kind, "out_chs": width, "stride": stride, "act_layer": None, "noskip": False}


STAGES = (
    (_edge(2, 16), _edge(1, 16)),
    (_inverted(2, 32, 3, 5, 6.0), _inverted(1, 32, 5, 0, 4.0)),
    (_inverted(2, 80, 5, 5, 6.0), _inverted(1, 80, 5, 0, 4.0), _attention(80, 12, 8, 2), _inverted(1, 80, 0, 0, 2.0)),
    (_inverted(2, 160, 5, 5, 6.0), _attention(160, 16, 12, 1), _inverted(1, 160, 0, 0, 2.0)),
)
"""The blocks for timm. Source: timm/models/mobilenetv5.py, its strings decoded, widths divided."""

VISION_CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    # the published tower's own architecture, mobilenetv5_300m_enc, is always 2,048 wide
    "architecture": "mobilenetv5_300m",
    "model_args": {"block_args": STAGES, "stem_size": 8, "num_features": 256, "pad_type": "same"},
}
AUDIO_CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "conf_num_hidden_layers": N_CONFORMERS,
    "sscp_conv_channel_size": [16, 4],
}


def tiny_name(name: str) -> str | None:
    """What a published tensor of the towers is called here; None for those of blocks that are left out."""
    conformer = re.search(r"\.conformer\.(\d+)\.", name)
    if conformer and int(conformer[1]) >= N_CONFORMERS:
        return None
    block = re.search(r"\.blocks\.(\d)\.(\d+)\.", name)
    if not block:
        return name
    number = BLOCKS.get((int(block[1]), int(block[2])))
    return None if number is None else name.replace(block[0], f".blocks.{block[1]}.{number}.")


def tiny_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n if n <= LARGEST_KERNEL else n // SHRINK for n in shape)


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values.

    Why: norms keep activations near one, so what counts is how much a block adds to what is there (layer_scale), and
    that the stem sees the image and not its bias.
    """
    if name.endswith("layer_scale.gamma"):
        return 0.3, 0.03
    if name.endswith("conv_stem.conv.bias"):
        return 0.0, 0.05
    if len(shape) == 1:
        return 1.0, 0.1
    return 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))


def processor_files(image_size: int) -> dict[str, str]:
    """preprocessor_config.json and processor_config.json in the published style."""
    preprocessor = {
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": False,
        "dither": 0.0,
        "do_convert_rgb": None,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "Gemma3nAudioFeatureExtractor",
        "feature_size": 128,
        "fft_length": 1024,
        "fft_overdrive": True,
        "frame_length": 512,
        "hop_length": 160,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessorFast",
        "image_seq_length": 256,
        "image_std": [0.5, 0.5, 0.5],
        "input_scale_factor": 1.0,
        "max_frequency": 7600.0,
        "mel_floor": 1e-05,
        "min_frequency": 125.0,
        "padding_side": "right",
        "padding_value": 0.0,
        "per_bin_mean": None,
        "per_bin_stddev": None,
        "preemphasis": 0.97,
        "preemphasis_htk_flavor": True,
        "processor_class": "Gemma3nProcessor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "return_attention_mask": True,
        "sampling_rate": 16000,
        "size": {"height": image_size, "width": image_size},
    }
    processor = {"audio_seq_length": 188, "image_seq_length": 256, "processor_class": "Gemma3nProcessor"}
    files = {"preprocessor_config.json": preprocessor, "processor_config.json": processor}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
