"""What config.json and the processor's files say of the vision and audio encoders, as one checked value.

`VISION`, `AUDIO` and `PROCESSOR` list what is read. A key that is missing has the value of the published checkpoints,
as in llama.cpp's converter; one that is there must be possible.

Source: Gemma3nVisionConfig and Gemma3nAudioConfig in transformers; Gemma3nVisionAudioModel in llama.cpp's conversion/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf3n.errors import ConfigError, SourceError, shown
from gguf3n.formats.small_file import is_there, read_checkpoint_json
from gguf3n.gemma3n.config import MAX_FLOAT, MAX_INT, MAX_LAYERS
from gguf3n.gemma3n.tower import PUBLISHED_WIDTH

ARCHITECTURE = "mobilenetv5_300m_enc"
"""vision_config.architecture of every Gemma 3n: timm's name of the tower."""
VISION_TYPE, AUDIO_TYPE = "gemma3n_vision", "gemma3n_audio"

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""In the order in which they are read: what the later one says counts."""

MAX_IMAGE_SIZE = 8192
"""Source: clip.cpp refuses more."""
IMAGE_UNIT = 256
"""What an image's side is a multiple of: the tower makes a sixteenth of it, and means of that on 16 x 16 places."""
N_IMAGE_TOKENS = 256
"""The 16 x 16 places: built into transformers' processor and llama.cpp's graph."""


@dataclass(frozen=True)
class Vision:
    """The vision encoder. Units: `image_size` in pixels, both ways."""

    hidden_size: int
    vocab_size: int
    feed_forward_length: int
    num_attention_heads: int
    layer_norm_eps: float
    image_size: int
    patch_size: int


@dataclass(frozen=True)
class Audio:
    """The audio encoder, a conformer behind two convolutions; names as in config.json."""

    hidden_size: int
    vocab_size: int
    feed_forward_length: int
    conf_num_hidden_layers: int
    conf_num_attention_heads: int
    conf_conv_kernel_size: int
    input_feat_size: int
    sscp_conv_channel_size: tuple[int, int]
    sscp_conv_kernel_size: tuple[tuple[int, int], tuple[int, int]]
    sscp_conv_stride_size: tuple[tuple[int, int], tuple[int, int]]

    @property
    def subsampled_width(self) -> int:
        """Of what the two convolutions make of a spectrum: frequencies that are left, times channels."""
        left = self.input_feat_size
        for _, stride in self.sscp_conv_stride_size:
            left = (left - 1) // stride + 1
        return left * self.sscp_conv_channel_size[1]


@dataclass(frozen=True)
class Encoders:
    """What is to be written: the encoders that are wanted, and the width of the text model that they speak to."""

    text_width: int
    vision: Vision | None
    audio: Audio | None


VISION: Mapping[str, int | float] = {
    "hidden_size": PUBLISHED_WIDTH,
    "vocab_size": 128,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "layer_norm_eps": 1e-6,
}
"""Keys of vision_config, and what one means that is missing."""

AUDIO: Mapping[str, Any] = {
    "hidden_size": 1536,
    "vocab_size": 128,
    "intermediate_size": 6144,
    "conf_num_hidden_layers": 12,
    "conf_num_attention_heads": 8,
    "conf_conv_kernel_size": 5,
    "input_feat_size": 128,
    "sscp_conv_channel_size": (128, 32),
    "sscp_conv_kernel_size": ((3, 3), (3, 3)),
    "sscp_conv_stride_size": ((2, 2), (2, 2)),
}
"""The same of audio_config."""

PROCESSOR: Mapping[str, int] = {"image_size": 768, "image_seq_length": N_IMAGE_TOKENS}


def read_encoders(
    raw: Mapping[str, Any],
    directory: Path,
    text_width: int,
    *,
    vision: bool,
    audio: bool,
    files: tuple[str, ...] = PROCESSOR_FILES,
) -> Encoders:
    """The encoders that are wanted.

    Args:
        raw: the content of config.json.
        directory: the checkpoint.
        files: what is read there of the processor, where it is there.

    Raises: SourceError for a checkpoint without them; ConfigError for another encoder or a value that can't be.
    """
    config = directory / "config.json"
    return Encoders(
        text_width,
        _vision(_section(raw, "vision_config", VISION_TYPE, config), directory, files) if vision else None,
        _audio(_section(raw, "audio_config", AUDIO_TYPE, config), config) if audio else None,
    )


def _section(raw: Mapping[str, Any], name: str, model_type: str, path: Path) -> dict[str, Any]:
    section = raw.get(name)
    if section is None:
        raise SourceError(
            f"{path}: no {name}: a model of text only has no mmproj file",
            expected="a Gemma3nForConditionalGeneration",
            fix="leave --mmproj out, or convert the checkpoint that it was tuned from",
        )
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {name} is not an object", found=type(section).__name__)
    found = section.get("model_type", model_type)
    if found != model_type:
        raise ConfigError(
            f"{path}: {name} is of another model", expected=f"model_type {model_type}", found=shown(found)
        )
    return section


def _vision(section: Mapping[str, Any], directory: Path, files: tuple[str, ...]) -> Vision:
    config = directory / "config.json"
    values = {name: _number(section, name, default, config) for name, default in VISION.items()}
    architecture = section.get("architecture", ARCHITECTURE)
    if values["hidden_size"] == PUBLISHED_WIDTH and architecture != ARCHITECTURE:
        raise ConfigError(
            f"{config}: another vision tower than Gemma 3n's", expected=ARCHITECTURE, found=shown(architecture)
        )
    image_size, n_tokens, path = _processor(directory, files)
    if image_size % IMAGE_UNIT or image_size > MAX_IMAGE_SIZE or n_tokens != N_IMAGE_TOKENS:
        raise ConfigError(
            f"{path}: images that llama.cpp can't take",
            expected=f"a size that is a multiple of {IMAGE_UNIT}, up to {MAX_IMAGE_SIZE}, for {N_IMAGE_TOKENS} tokens",
            found=f"size {image_size}, image_seq_length {n_tokens}",
        )
    if values["intermediate_size"] > MAX_INT // 4:
        found = str(values["intermediate_size"])
        raise ConfigError(f"{config}: intermediate_size is impossible", expected="a quarter of a uint32", found=found)
    return Vision(
        hidden_size=int(values["hidden_size"]),
        vocab_size=int(values["vocab_size"]),
        feed_forward_length=4 * int(values["intermediate_size"]),
        num_attention_heads=int(values["num_attention_heads"]),
        layer_norm_eps=values["layer_norm_eps"],
        image_size=image_size,
        patch_size=image_size // n_tokens,
    )


def _processor(directory: Path, files: tuple[str, ...]) -> tuple[int, int, Path]:
    """Image size, tokens an image, and the file that says so (or would)."""
    found: dict[str, Any] = {}
    path = directory / PROCESSOR_FILES[0]
    for name in files:
        if is_there(directory / name, ConfigError):
            content = read_checkpoint_json(directory / name)
            for inner in ("media_proc_cfg", "image_processor"):
                if isinstance(content.get(inner), dict):
                    content = {**content, **content[inner]}
            if "size" in content or "image_seq_length" in content:
                path = directory / name
            found |= content
    size = found.get("size", {"height": PROCESSOR["image_size"]})
    if not isinstance(size, dict) or "height" not in size:
        raise ConfigError(f"{path}: size is impossible", expected="an object with height and width", found=shown(size))
    if size.get("width", size["height"]) != size["height"]:
        raise ConfigError(f"{path}: images are not square", expected="equal height and width", found=shown(size))
    sides = {"image_size": size["height"], "image_seq_length": found.get("image_seq_length")}
    image_size, n_tokens = (int(_number(sides, name, default, path)) for name, default in PROCESSOR.items())
    return image_size, n_tokens, path


def _audio(section: Mapping[str, Any], path: Path) -> Audio:
    def pair(name: str) -> Any:
        """A list of two of whatever the published value is made of."""
        value, default = section.get(name), AUDIO[name]
        if value is None:
            return default
        if isinstance(value, list | tuple) and len(value) == len(default):
            if all(_is_count(item) for item in value) and _is_count(default[0]):
                return tuple(value)
            if not _is_count(default[0]) and all(
                isinstance(item, list | tuple) and len(item) == 2 and all(map(_is_count, item)) for item in value
            ):
                return tuple(map(tuple, value))
        raise ConfigError(f"{path}: audio_config.{name} is impossible", expected=str(default), found=shown(value))

    numbers: dict[str, Any] = {
        name: int(_number(section, name, default, path)) for name, default in AUDIO.items() if type(default) is int
    }
    pairs: dict[str, Any] = {name: pair(name) for name, default in AUDIO.items() if type(default) is tuple}
    if numbers["conf_num_hidden_layers"] > MAX_LAYERS:
        found = str(numbers["conf_num_hidden_layers"])
        raise ConfigError(f"{path}: too many conformer layers", expected=f"at most {MAX_LAYERS}", found=found)
    return Audio(feed_forward_length=numbers.pop("intermediate_size"), **numbers, **pairs)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_INT


def _number(section: Mapping[str, Any], name: str, default: float, path: Path) -> float:
    """A positive number of the kind that the default is. Raises: ConfigError."""
    value = section.get(name)
    if value is None:
        return default
    if type(default) is int:
        sound = _is_count(value)
    else:
        sound = not isinstance(value, bool) and isinstance(value, int | float) and 0 < value <= MAX_FLOAT
    if not sound:
        kind = "a positive whole number" if type(default) is int else "a positive number"
        raise ConfigError(f"{path}: {name} is impossible", expected=kind, found=shown(value))
    return value  # type: ignore[no-any-return]
