"""Pictures that are shown to both engines, and how llama.cpp prepares them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from gguf3n.engines.pictures import PICTURES, Picture, as_png, padded


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_is_the_same_each_time_and_survives_png(picture: Picture) -> None:
    pixels = picture.pixels()
    assert pixels.shape == (picture.height, picture.width, 3) and pixels.dtype == np.uint8
    assert (pixels == picture.pixels()).all()
    assert pixels.std() > 40 and len(np.unique(pixels)) > 100
    assert (np.asarray(Image.open(io.BytesIO(as_png(pixels)))) == pixels).all()


def test_a_square_of_the_right_size_is_left_alone() -> None:
    pixels = Picture(256, 256, 1).pixels()
    assert padded(pixels, 256) is pixels


def test_a_wide_picture_stands_between_black_bars() -> None:
    pixels = np.full((50, 200, 3), 200, np.uint8)
    found = padded(pixels, 64)
    assert found.shape == (64, 64, 3)
    assert (found[24:40] == 200).all() and not found[:24].any() and not found[40:].any()


def test_a_tall_picture_is_rounded_up() -> None:
    """100 * 64 / 300 is 21.3: 22 columns, the odd one to the right."""
    found = padded(np.full((300, 100, 3), 9, np.uint8), 64)
    assert np.flatnonzero(found.any(axis=(0, 2))).tolist() == list(range(21, 43))


def test_there_are_squares_and_others() -> None:
    assert {picture.is_square for picture in PICTURES} == {True, False}
