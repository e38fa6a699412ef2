"""Pictures to show to two engines: drawn here, the same everywhere, and prepared as llama.cpp prepares them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]
"""Shapes: `[height, width, 3]`, red, green, blue."""


@dataclass(frozen=True)
class Picture:
    """A picture of waves in three colours with a plain rectangle and a disc. Units: pixels."""

    width: int
    height: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def is_square(self) -> bool:
        """Then llama.cpp, which pads, and transformers, which squashes, see the same."""
        return self.width == self.height

    def pixels(self) -> Pixels:
        rng = np.random.default_rng(self.seed)
        y, x = np.mgrid[: self.height, : self.width] / np.float64(max(self.width, self.height))
        waves = [
            128 + 100 * np.sin(rng.uniform(6, 48) * x + rng.uniform(6, 48) * y + rng.uniform(0, 6)) for _ in range(3)
        ]
        image = np.stack(waves, axis=-1)
        image[self.height // 4 : self.height // 2, self.width // 3 : self.width // 2] = rng.integers(0, 256, 3)
        image[np.hypot(x - x.max() * 0.7, y - y.max() * 0.7) < 0.12] = rng.integers(0, 256, 3)
        return image.astype(np.uint8)


PICTURES = (Picture(256, 256, 1), Picture(512, 512, 2), Picture(97, 97, 3), Picture(400, 200, 4), Picture(120, 300, 5))
"""Squares of the small checkpoint's own size, larger and smaller, and two that are not square."""


def as_png(pixels: Pixels) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def padded(pixels: Pixels, size: int) -> Pixels:
    """Scaled to fit into a square and put in its middle, on black.

    Exact: as llama.cpp prepares a picture for Gemma 3n; its resampling is Pillow's.
    Source: mtmd_image_preprocessor_fixed_size in tools/mtmd/mtmd-image.cpp.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    scale = min(np.float32(size) / np.float32(width), np.float32(size) / np.float32(height))
    new_width, new_height = (min(int(np.ceil(np.float32(n) * scale)), size) for n in (width, height))
    resized = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR))
    left, top = (size - new_width) // 2, (size - new_height) // 2
    out = np.zeros((size, size, 3), np.uint8)
    out[top : top + new_height, left : left + new_width] = resized
    return out
