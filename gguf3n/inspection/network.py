"""Where in the network a tensor stands, told by its name: in a checkpoint of any layout, a GGUF file or an mmproj.

`STAGES` lists the parts of Gemma 3n in the order in which an input meets them: vision, audio, text.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from gguf3n.gemma3n.names import bare_name


class Section(enum.Enum):
    """A part of the model with an input of its own, in the order of a plot."""

    VISION = "vision"
    AUDIO = "audio"
    TEXT = "text"


class Kind(enum.Enum):
    """What a tensor does with its input."""

    MATRIX = "matrix"
    VECTOR = "norm or scale"
    CONVOLUTION = "convolution"


V, A, T = Section.VISION, Section.AUDIO, Section.TEXT

STAGES: tuple[tuple[Section, str, str], ...] = (
    (V, "stem", r"(?:^|\.)(?:timm_model|v)\.conv_stem\."),
    (V, "block", r"(?:(?:^|\.)timm_model\.blocks|^v\.blk)\.(\d+)\.(\d+)\."),
    (V, "fusion", r"(?:^|\.)(?:timm_model|v)\.msfa\."),
    (V, "tower", r"(?:(?:^|\.)vision_tower|^v)\."),
    (V, "embedder", r"(?:(?:^|\.)embed_vision|^mm)\.(?!a\.)"),
    (A, "subsampling", r"(?:(?:^|\.)audio_tower\.subsample_conv_projection|^a\.(?:conv1d|input_projection))\."),
    (A, "conformer", r"(?:(?:^|\.)audio_tower\.conformer|^a\.blk)\.(\d+)\."),
    (A, "tower", r"(?:(?:^|\.)audio_tower|^a)\."),
    (A, "embedder", r"(?:(?:^|\.)embed_audio|^mm\.a)\."),
    (T, "embedding", r"(?:^|\.)(?:embed_tokens|token_embd|per_layer_(?!input|projection\.)|altup_proj)"),
    (T, "layer", r"(?:(?:^|\.)layers|^blk)\.(\d+)\."),
    (T, "output", r""),
)  # fmt: skip
"""Section, name and pattern of each part; the first that matches counts. Numbers are those of layers and blocks."""

TOWER = re.compile(r"^(?:vision_tower\.(?:timm_model\.)?|audio_tower\.)")

_PATTERNS = tuple((section, stage, re.compile(pattern)) for section, stage, pattern in STAGES)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands. `rank` sorts places in network order."""

    section: Section
    stage: str
    rank: tuple[int, ...]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the layer or block."""
        return self.rank[1:]

    @property
    def label(self) -> str:
        """As in "layer 4", "block 2.21" or "embedding"."""
        return " ".join((self.stage, ".".join(map(str, self.numbers)))).strip()


def place(name: str) -> Place:
    """The place of a tensor."""
    for rank, (section, stage, pattern) in enumerate(_PATTERNS):
        match = pattern.search(name)
        if match is not None:
            return Place(section, stage, (rank, *map(int, match.groups())))
    raise AssertionError(name)


def kind(name: str, shape: tuple[int, ...]) -> Kind:
    """What a tensor is.

    Why: the matrices of text that are stacked to three dimensions are no convolutions; scales that an mmproj keeps as
    `[1, C, 1, 1]` are vectors.
    """
    if sum(n > 1 for n in shape) < 2 or 0 in shape:
        return Kind.VECTOR
    if len(shape) >= 3 and name.endswith(".weight") and place(name).section is not Section.TEXT:
        return Kind.CONVOLUTION
    return Kind.MATRIX


def short_name(name: str) -> str:
    """Without what all tensors of a section share."""
    return TOWER.sub("", bare_name(name)).removesuffix(".weight")
