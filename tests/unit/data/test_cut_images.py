"""An image is resized until it covers a size, then cut to it, in the middle or at random."""

import numpy as np
import pytest
import torch
from pair_files import picture
from PIL import Image

from ds_dpo.data.images import cut_image
from ds_dpo.errors import DataError


def cut(image, *, size=(8, 8), is_flipped=False, crop_fractions=None):
    return cut_image(image, size=size, is_flipped=is_flipped, crop_fractions=crop_fractions)


def as_pixels(image):
    """What pixels should be: 0 -> -1, 255 -> 1."""
    return np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255 * 2 - 1


def test_an_image_of_the_right_size_is_not_resampled():
    image = picture(1, width=16, height=16)
    square = cut(image, size=(16, 16))
    assert square.pixels.shape == (3, 16, 16)
    assert square.pixels.dtype == torch.float32
    assert np.allclose(square.pixels, as_pixels(image), atol=1e-6)
    assert (square.original_size, square.corner) == ((16, 16), (0, 0))
    ends = cut(Image.fromarray(np.array([[[0] * 3, [255] * 3]] * 2, dtype=np.uint8)), size=(2, 2)).pixels
    assert (ends.min(), ends.max()) == (-1, 1)


def test_the_shorter_side_is_resized_and_the_middle_is_kept():
    image = picture(2, width=40, height=16)
    square = cut(image)  # 40 x 16 -> 20 x 8, of which columns 6..13
    expected = image.resize((20, 8), Image.Resampling.BILINEAR).crop((6, 0, 14, 8))
    assert np.allclose(square.pixels, as_pixels(expected), atol=1e-6)
    assert (square.original_size, square.corner) == ((16, 40), (0, 6))
    upright = cut(picture(2, width=16, height=40))
    assert (upright.original_size, upright.corner) == ((40, 16), (6, 0))


def test_the_resized_longer_side_is_rounded_down_as_torchvision_does():
    assert cut(picture(width=21, height=10), crop_fractions=(0.0, 0.999)).corner == (0, 8)  # int(8 * 21 / 10) = 16


def test_shrinking_averages_over_the_whole_footprint():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert cut(Image.fromarray(stripes)).pixels.abs().max() < 0.05  # without, all would be -1 or 1


@pytest.mark.parametrize(("fractions", "corner"), [((0, 0), (0, 0)), ((0, 0.5), (0, 6)), ((0.99, 0.999), (0, 12))])
def test_a_random_crop_takes_its_corner_from_fractions(fractions, corner):
    image = picture(2, width=20, height=8)  # 13 places for a square of 8
    square = cut(image, crop_fractions=fractions)
    assert square.corner == corner
    expected = image.crop((corner[1], 0, corner[1] + 8, 8))
    assert np.allclose(square.pixels, as_pixels(expected), atol=1e-6)


def test_mirrored_before_cropping_so_the_corner_is_that_of_the_image_as_seen():
    image = picture(2, width=20, height=8)
    square = cut(image, is_flipped=True, crop_fractions=(0.0, 0.2))  # left = int(0.2 * 13) = 2
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert square.corner == (0, 2)
    assert np.allclose(square.pixels, as_pixels(mirrored.crop((2, 0, 10, 8))), atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height", "size", "resized", "corner"),
    [
        (40, 16, (8, 12), (20, 8), (0, 4)),  # wider than 12 x 8: cut at the sides
        (16, 40, (8, 12), (12, 30), (11, 0)),  # taller
        (24, 24, (12, 8), (12, 12), (0, 2)),
        (36, 24, (8, 12), (12, 8), (0, 0)),  # of the same ratio: nothing is cut
        (37, 24, (8, 12), (12, 8), (0, 0)),  # 8 * 37 / 24 = 12.3, rounded down
        (12, 31, (8, 12), (12, 31), (12, 0)),  # as wide as is needed: not resampled; round(23 / 2) is the even one
        (3, 2, (24, 12), (36, 24), (0, 12)),  # enlarged
    ],
)
def test_an_image_is_resized_until_it_covers_a_rectangle(width, height, size, resized, corner):
    image = picture(2, width=width, height=height)
    result = cut(image, size=size)
    top, left = corner
    box = (left, top, left + size[1], top + size[0])
    expected = image.resize(resized, Image.Resampling.BILINEAR).crop(box)
    assert np.allclose(result.pixels, as_pixels(expected), atol=1e-6)
    assert (result.original_size, result.corner, result.size) == ((height, width), corner, size)


@pytest.mark.parametrize(("fractions", "corner"), [((0.0, 0.9), (0, 0)), ((0.5, 0), (11, 0)), ((0.999, 0), (22, 0))])
def test_a_random_crop_of_a_rectangle(fractions, corner):
    image = picture(2, width=12, height=30)  # 23 places for 8 rows
    result = cut(image, size=(8, 12), crop_fractions=fractions)
    assert result.corner == corner
    expected = image.crop((0, corner[0], 12, corner[0] + 8))
    assert np.allclose(result.pixels, as_pixels(expected), atol=1e-6)


def test_every_size_covers_every_rectangle():
    draw = np.random.default_rng(0)
    for width, height, *size in draw.integers(1, 40, (300, 4)).tolist():
        result = cut(Image.new("RGB", (width, height), "white"), size=tuple(size), crop_fractions=(0.999, 0.999))
        assert result.size == tuple(size)
        assert result.pixels.min() == 1  # nothing but the image


def test_an_image_too_thin_to_be_resized_is_refused():
    with pytest.raises(DataError, match="8000 x 1 is too long and thin"):
        cut_image(Image.new("RGB", (8000, 1)), size=(1024, 1024), is_flipped=False, crop_fractions=None)
