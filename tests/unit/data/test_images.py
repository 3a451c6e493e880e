"""Files of every kind into the same square: what decodes, what is refused, and what the pixels and sizes are."""

import io
import struct
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from pair_files import config, file_of, picture
from PIL import Image

from ds_dpo.data.draws import draw_pair
from ds_dpo.data.images import cut_square, decode_rgb
from ds_dpo.data.prepare import prepare_pair
from ds_dpo.data.source import BadRowError, PairRecord
from ds_dpo.errors import DataError

# ---- files that are refused ----


def png_that_claims(width, height):
    """A PNG of a few bytes whose header states any size."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def with_a_flipped_byte(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", file_of(picture()))
    return buffer.getvalue()


LARGE = picture(width=64, height=64)
PNG, JPEG, WEBP, GIF = (file_of(LARGE, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF"))

REFUSED = {
    "null": (None, "null instead of an image"),
    "no bytes": (b"", "0 bytes"),
    "text": (b"<html>404 Not Found</html>", "not an image"),
    "random bytes": (bytes(range(256)) * 4, "not an image"),
    "a zip": (zipped(), "not an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "EPS, which Pillow would hand to a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "PPM, a format not listed": (file_of(picture(), "PPM"), "not an image"),
    "torn JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "JPEG without its last byte of data": (JPEG[:-60], "truncated"),
    "JPEG header alone": (JPEG[:20], "not an image|cannot be decoded"),
    "torn PNG": (PNG[: len(PNG) // 2], "truncated"),
    "PNG with a wrong byte": (with_a_flipped_byte(PNG, len(PNG) // 2), "cannot be decoded"),
    "torn WEBP": (WEBP[: len(WEBP) // 2], "not an image|cannot be decoded"),
    "torn GIF": (GIF[: len(GIF) // 2], "cannot be decoded"),
    "PNG that claims more than is allowed": (png_that_claims(8193, 8193), "claims 8193 x 8193 pixels"),
    "decompression bomb": (png_that_claims(50_000, 50_000), "cannot be decoded: DecompressionBomb|claims 50000"),
    "PNG with no width": (png_that_claims(0, 5), "not an image|no pixels|cannot be decoded"),
    "32-bit floats": (file_of(Image.new("F", (16, 16)), "TIFF"), "mode F"),
    "32-bit integers": (file_of(Image.new("I", (16, 16)), "TIFF"), r"mode I \(32-bit\)"),
    "a text in the place of bytes": ("image.png", "str instead of bytes"),
    "a number": (7, "int instead of bytes"),
    "a list": ([137, 80], "list instead of bytes"),
    "a dict of nothing": ({"bytes": None, "path": None}, "null instead of an image"),
    "a dict with no bytes": ({"bytes": b"", "path": "a.png"}, "0 bytes"),
    "a dict whose file is elsewhere": ({"bytes": None, "path": "/nowhere/a.png"}, "/nowhere/a.png is not a file here"),
    "a dict whose path is a folder": ({"bytes": None, "path": "/"}, "is not a file here"),
    "a dict whose path never ends": ({"bytes": None, "path": "/dev/zero"}, "/dev/zero is not a file here"),
}


@pytest.mark.parametrize(("raw", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_whole_image_is_refused_with_a_reason(raw, reason):
    with pytest.raises(DataError, match=reason):
        decode_rgb(raw)


def test_a_file_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)  # sparse
    with pytest.raises(DataError, match="larger than 268435456 bytes"):
        decode_rgb({"bytes": None, "path": str(path)})


def test_an_image_too_thin_to_be_resized_is_refused():
    with pytest.raises(DataError, match="8000 x 1 is too long and thin"):
        cut_square(Image.new("RGB", (8000, 1)), resolution=1024, is_flipped=False, crop_fractions=None)


# ---- files that are converted ----


def first_pixel(raw):
    image = decode_rgb(raw)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def test_gray_and_one_bit():
    assert first_pixel(file_of(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert first_pixel(file_of(Image.new("1", (4, 4), 1))) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32896, 65535]] * 4, dtype=np.uint16)
    row = np.asarray(decode_rgb(file_of(Image.fromarray(values), kind)))[0, :, 0]
    assert row.tolist() == [0, 1, 128, 255]  # 65535 / 257 = 255


def test_transparency_is_laid_on_white():
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    red, green, blue = first_pixel(file_of(half_red))
    assert (red, green, blue) == (255, 127, 127)  # 255 * (1 - 128/255)
    assert first_pixel(file_of(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)


def test_a_transparent_colour_of_a_palette_is_white_and_others_keep_theirs():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    content = file_of(image, transparency=0)
    assert first_pixel(content) == (200, 100, 50)
    assert decode_rgb(content).getpixel((1, 1)) == (255, 255, 255)
    assert decode_rgb(file_of(image)).getpixel((1, 1)) == (10, 20, 30)


def test_cmyk():
    # red = 255 * (1 - cyan) * (1 - black)
    assert first_pixel(file_of(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")) == (0, 255, 255)
    as_jpeg = first_pixel(file_of(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.allclose(as_jpeg, (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.allclose(first_pixel(content), (255, 0, 0), atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = picture(3, width=24, height=16)
    # how a camera stores a picture that a viewer is to turn: the inverse of what the tag names
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.rotate(180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.rotate(90, expand=True),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.rotate(-90, expand=True),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_rgb(file_of(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))


def test_every_form_of_a_row_gives_the_same_pixels(tmp_path):
    content = file_of(picture(5))
    (tmp_path / "a.jpg").write_bytes(content)  # a PNG under another name
    forms = [
        content,
        {"bytes": content, "path": "/nowhere/a.png"},
        {"bytes": None, "path": str(tmp_path / "a.jpg")},
        picture(5),
        Image.open(io.BytesIO(content)),
    ]
    for form in forms:
        assert np.array_equal(np.asarray(decode_rgb(form)), np.asarray(picture(5)))


# ---- the square ----


def cut(image, *, resolution=8, is_flipped=False, crop_fractions=None):
    return cut_square(image, resolution=resolution, is_flipped=is_flipped, crop_fractions=crop_fractions)


def as_pixels(image):
    """What pixels should be: 0 -> -1, 255 -> 1."""
    return np.asarray(image, dtype=np.float64).transpose(2, 0, 1) / 255 * 2 - 1


def test_an_image_of_the_right_size_is_not_resampled():
    image = picture(1, width=16, height=16)
    square = cut(image, resolution=16)
    assert square.pixels.shape == (3, 16, 16)
    assert square.pixels.dtype == torch.float32
    assert np.allclose(square.pixels, as_pixels(image), atol=1e-6)
    assert (square.original_size, square.corner) == ((16, 16), (0, 0))
    ends = cut(Image.fromarray(np.array([[[0] * 3, [255] * 3]] * 2, dtype=np.uint8)), resolution=2).pixels
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


# ---- a pair ----


def draws(**changes):
    drawn = draw_pair(seed=0, pair_id=5, visit=0, latent_shape=(4, 2, 2), num_train_timesteps=1000)
    return replace(drawn, **changes)


def record(**changes):
    same = picture(4, width=32, height=16)
    return replace(PairRecord(prompt="a cat", chosen=same, rejected=same, pair_id=5, uid="row 9"), **changes)


@pytest.mark.parametrize(
    ("flip", "chosen_flip", "rejected_flip", "expected"),
    [
        ("off", 0.1, 0.1, (False, False)),
        ("shared", 0.1, 0.9, (True, True)),
        ("shared", 0.9, 0.1, (False, False)),
        ("independent", 0.1, 0.9, (True, False)),
        ("independent", 0.9, 0.1, (False, True)),
        ("independent", 0.5, 0.49, (False, True)),
    ],
)
def test_flips(flip, chosen_flip, rejected_flip, expected):
    drawn = draws(chosen_flip=chosen_flip, rejected_flip=rejected_flip)
    samples = prepare_pair(record(), drawn, data=config(flip=flip))
    plain = prepare_pair(record(), drawn, data=config()).chosen_pixels
    for pixels, is_flipped in zip((samples.chosen_pixels, samples.rejected_pixels), expected, strict=True):
        assert torch.equal(pixels, plain.flip(-1) if is_flipped else plain)


def test_a_random_crop_is_shared_by_both_images():
    samples = prepare_pair(record(), draws(), data=config(crop="random", size_conditioning="true"))
    centre = prepare_pair(record(), draws(), data=config(crop="center"))
    assert torch.equal(samples.chosen_pixels, samples.rejected_pixels)
    assert not torch.equal(samples.chosen_pixels, centre.chosen_pixels)
    # of sizes that differ, it is the same fraction: places 0..16 of one, 0..32 of the other
    wide = picture(4, width=48, height=16)
    corners = prepare_pair(
        record(rejected=wide), draws(crop_left=0.5), data=config(crop="random", size_conditioning="true")
    )
    assert (corners.chosen_time_ids[0, 3], corners.rejected_time_ids[0, 3]) == (8, 16)


def test_time_ids_fixed_and_true():
    pair = record(rejected=picture(4, width=24, height=48))
    fixed = prepare_pair(pair, draws(), data=config())
    assert fixed.chosen_time_ids.tolist() == fixed.rejected_time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
    true = prepare_pair(pair, draws(), data=config(size_conditioning="true"))
    # chosen: 16 x 32 (height x width), not resized, centre at left 8; rejected: 48 x 24 -> 32 x 16, centre at top 8
    assert true.chosen_time_ids.tolist() == [[16, 32, 0, 8, 16, 16]]
    assert true.rejected_time_ids.tolist() == [[48, 24, 8, 0, 16, 16]]
    assert true.chosen_time_ids.dtype == torch.float32


def test_a_prompt_is_dropped_below_its_share():
    assert prepare_pair(record(), draws(prompt_dropout=0.3), data=config(prompt_dropout=0.2)).prompts == ["a cat"]
    assert prepare_pair(record(), draws(prompt_dropout=0.1), data=config(prompt_dropout=0.2)).prompts == [""]
    assert prepare_pair(record(), draws(prompt_dropout=0.0), data=config(prompt_dropout=0.0)).prompts == ["a cat"]
    assert prepare_pair(record(), draws(prompt_dropout=0.999), data=config(prompt_dropout=1.0)).prompts == [""]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_bad_image_names_row_side_and_reason(side):
    with pytest.raises(BadRowError, match=f"row 9: {side} image: empty: 0 bytes") as caught:
        prepare_pair(record(**{side: b""}), draws(), data=config())
    assert (caught.value.bad_row.uid, caught.value.bad_row.reason) == ("row 9", f"{side} image: empty: 0 bytes")
