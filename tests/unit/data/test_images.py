"""Files of every kind into images of one size: what decodes, what is refused, and what pixels and sizes are."""

import io
import re
import struct
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from pair_files import config, file_of, picture
from PIL import Image

from ds_dpo.data.images import cut_image, decode_rgb, read_size
from ds_dpo.data.source import BadRowError, PairRecord
from ds_dpo.data.stream.draws import draw_pair
from ds_dpo.data.stream.prepare import prepare_pair
from ds_dpo.diffusion.noising import Noising
from ds_dpo.errors import DataError

# ---- files that are refused ----


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width, height, lines, *, depth=8, colour_type=2, before=(), after=()):
    """A PNG written by hand. lines: all bytes of its pixels. before, after: chunks around the pixels."""
    size = len(lines) // max(height, 1)
    filtered = b"".join(b"\0" + lines[start : start + size] for start in range(0, len(lines), size or 1))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(filtered))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *before, pixels, *after, png_chunk(b"IEND", b"")])


def png_that_claims(width, height):
    """A PNG of a few bytes whose header states any size."""
    return png_of(width, height, b"")


def jpeg_of(*levels, adobe_transform):
    """A baseline JPEG of one block of 8 x 8, written by hand: each component has the same stored level everywhere."""

    def segment(marker, content):
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    bits = ""
    for level in levels:
        mean = 8 * (level - 128)  # the DCT's first coefficient
        category = abs(mean).bit_length()
        value = mean if mean > 0 else mean + 2**category - 1
        bits += f"{category:04b}" + (f"{value:0{category}b}" if category else "") + "0"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    numbers = range(1, len(levels) + 1)
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, adobe_transform)),
            segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC0, struct.pack(">BHHB", 8, 8, 8, len(levels)) + b"".join(bytes([n, 0x11, 0]) for n in numbers)),
            segment(0xC4, b"\x00" + bytes([0, 0, 0, 12, *[0] * 12]) + bytes(range(12))),  # codes of 4 bits
            segment(0xC4, b"\x10" + bytes([1, *[0] * 15]) + b"\0"),  # the end of a block is "0"
            segment(0xDA, bytes([len(levels)]) + b"".join(bytes([n, 0]) for n in numbers) + b"\0\x3f\0"),
            scan,
            b"\xff\xd9",
        ]
    )


def with_a_flipped_byte(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", file_of(picture()))
    return buffer.getvalue()


def closed_image():
    image = picture()
    image.close()
    return image


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
    "PDF": (b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n", "not an image"),
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
    "32-bit floats with NaN": (file_of(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "mode F"),
    "an image that was closed": (closed_image(), "cannot be decoded: ValueError: Operation on closed image"),
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
        cut_image(Image.new("RGB", (8000, 1)), size=(1024, 1024), is_flipped=False, crop_fractions=None)


def test_a_torn_file_still_has_the_size_that_its_header_states():
    for content in (PNG[: len(PNG) // 2], JPEG[: len(JPEG) // 2]):
        assert read_size(content) == (64, 64)


HEADERS = [name for name in REFUSED if not re.search("torn|without its last|wrong byte|closed", name)]


@pytest.mark.parametrize("name", HEADERS)
def test_what_its_header_refuses_has_no_size_for_the_same_reason(name):
    raw, reason = REFUSED[name]
    with pytest.raises(DataError, match=reason):
        read_size(raw)


# ---- files that are converted ----


def palette_image():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return image


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def multi_picture():
    """What phones write: a JPEG with another, such as its preview, behind it."""
    first, second = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (8, 8), "blue")
    return file_of(first, "MPO", save_all=True, append_images=[second])


def profiled(kind):
    return file_of(Image.new("RGB", (8, 8), (10, 20, 30)), kind, icc_profile=b"not a profile at all")


RED = Image.new("RGB", (8, 8), "red")
ORANGE = Image.new("RGBA", (4, 4), (255, 128, 0, 64))
CONVERTED = {  # what is stored, and the colour that all of it has when it is upright, in RGB and on white
    "8-bit gray": (file_of(Image.new("L", (4, 4), 77)), (77, 77, 77)),
    "1-bit": (file_of(Image.new("1", (4, 4), 1)), (255, 255, 255)),
    "1-bit TIFF of a fax": (file_of(Image.new("1", (32, 4), 1), "TIFF", compression="group4"), (255, 255, 255)),
    "one pixel": (file_of(Image.new("RGB", (1, 1), (1, 2, 3))), (1, 2, 3)),
    "1 x 10000": (file_of(Image.new("RGB", (1, 10_000), (1, 2, 3))), (1, 2, 3)),
    "10000 x 1": (file_of(Image.new("RGB", (10_000, 1), (1, 2, 3)), "BMP"), (1, 2, 3)),
    # the high byte of 16
    "16-bit RGB PNG": (png_of(2, 1, bytes([255, 255, 128, 9, 0, 0] * 2), depth=16), (255, 128, 0)),
    # 32768 / 257 = 127.5, to even; alpha 0
    "16-bit gray": (png_of(2, 1, bytes([128, 0] * 2), depth=16, colour_type=0), (128, 128, 128)),
    "16-bit gray, a value of it transparent": (
        png_of(2, 1, bytes([18, 52] * 2), depth=16, colour_type=0, before=[png_chunk(b"tRNS", bytes([18, 52]))]),
        (255, 255, 255),
    ),
    "16-bit gray and alpha": (
        png_of(2, 1, bytes([100, 0, 0, 0] * 2), depth=16, colour_type=4),
        (255, 255, 255),
    ),
    "gray and alpha": (file_of(Image.new("LA", (4, 4), (0, 255 - 51))), (51, 51, 51)),
    "RGB, a colour of it transparent": (file_of(RED, transparency=(255, 0, 0)), (255, 255, 255)),
    # 255; 128 * 64 / 255 + 191; 191
    "RGBA WEBP": (file_of(ORANGE, "WEBP", lossless=True), (255, 223, 191)),
    "RGBA TIFF": (file_of(ORANGE, "TIFF"), (255, 223, 191)),
    "palette": (file_of(palette_image()), (10, 20, 30)),
    "palette with alphas": (file_of(palette_image(), transparency=bytes([51, 255])), (206, 208, 210)),
    "palette GIF with a transparent colour": (file_of(palette_image(), "GIF", transparency=0), (255, 255, 255)),
    "palette of 16 colours, BMP": (file_of(palette_image(), "BMP"), (10, 20, 30)),
    "progressive JPEG": (file_of(RED, "JPEG", progressive=True, quality=100), (254, 0, 0)),
    "gray JPEG": (file_of(Image.new("L", (8, 8), 77), "JPEG"), (77, 77, 77)),
    # as Photoshop writes it, ink that covers all stored as 0: no cyan, all of magenta and yellow, no black
    "CMYK JPEG, inverted": (jpeg_of(255, 0, 0, 255, adobe_transform=0), (255, 0, 0)),
    # half of the black ink: 255 * (1 - 127 / 255)
    "CMYK JPEG, half black": (jpeg_of(255, 0, 255, 128, adobe_transform=0), (128, 0, 128)),
    # the same three inks as luminance and colour differences of (0, 255, 255)
    "YCCK JPEG, inverted": (jpeg_of(179, 171, 0, 255, adobe_transform=2), (255, 0, 0)),
    "RGB JPEG, not as luminance": (jpeg_of(255, 0, 128, adobe_transform=0), (255, 0, 128)),
    "CMYK TIFF": (file_of(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    "YCbCr TIFF": (file_of(Image.new("YCbCr", (8, 8), (76, 85, 255)), "TIFF"), (254, 0, 0)),
    "Lab TIFF, lightest": (file_of(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF"), (255, 255, 255)),
    "a colour profile, not applied": (profiled("PNG"), (10, 20, 30)),
    "a colour profile of a TIFF": (profiled("TIFF"), (10, 20, 30)),
    "several pictures of a phone": (multi_picture(), (254, 0, 0)),
    "bytes behind its end": (file_of(RED) + b"more" * 9, (255, 0, 0)),
    "an open image with alpha": (ORANGE, (255, 223, 191)),
    "an open image of a palette": (palette_image(), (10, 20, 30)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_file_of_one_colour_has_it_everywhere(name):
    raw, colour = CONVERTED[name]
    image = decode_rgb(raw)
    assert image.mode == "RGB"
    lossy = "JPEG" in name or "phone" in name or "YCbCr" in name or "Lab" in name
    assert np.abs(np.asarray(image, dtype=int) - colour).max() <= (2 if lossy else 0)
    assert read_size(raw) == (image.height, image.width)


def test_an_interlaced_png(tmp_path):
    """Adam7 of 8 x 8, one pass after another; Pillow reads it and does not write it."""
    values = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = b"".join(
        b"\0" + line.tobytes() for top, left, down, right in passes for line in values[top::down, left::right]
    )
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1))
    content = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    assert np.array_equal(np.asarray(decode_rgb(content))[..., 0], values)


def test_a_gif_torn_in_its_second_frame_has_its_first():
    frames = [picture(number, width=64, height=64).convert("L") for number in range(2)]
    content = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(decode_rgb(content[:-500])), np.asarray(frames[0].convert("RGB")))


def first_pixel(raw):
    image = decode_rgb(raw)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


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


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.allclose(first_pixel(content), (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
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
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    content = file_of(stored, kind, exif=turned(orientation), **options)
    difference = np.asarray(decode_rgb(content), dtype=int) - np.asarray(upright)
    assert np.abs(difference).max() <= (8 if kind == "JPEG" else 0)
    assert read_size(content) == read_size(Image.open(io.BytesIO(content))) == (16, 24)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", ["eXIf", "XMP"])
def test_a_png_may_tell_its_orientation_before_or_after_its_pixels(place, kind):
    chunks = {
        "eXIf": png_chunk(b"eXIf", turned(6).tobytes().removeprefix(b"Exif\0\0")),
        "XMP": png_chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'),
    }
    content = png_of(3, 2, bytes(range(18)), **{place: [chunks[kind]]})
    assert decode_rgb(content).size == (2, 3)
    assert read_size(content) == (3, 2)


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


# ---- the cut ----


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


# ---- a pair ----


def draws(**changes):
    drawn = draw_pair(seed=0, pair_id=5, visit=0, latent_shape=(4, 2, 2), noising=Noising.plain(1000))
    return replace(drawn, **changes)


def prepared(pair, drawn, *, size=(16, 16), **fields):
    return prepare_pair(pair, drawn, data=config(**fields), size=size)


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
    samples = prepared(record(), drawn, flip=flip)
    plain = prepared(record(), drawn).chosen_pixels
    for pixels, is_flipped in zip((samples.chosen_pixels, samples.rejected_pixels), expected, strict=True):
        assert torch.equal(pixels, plain.flip(-1) if is_flipped else plain)


def test_a_random_crop_is_shared_by_both_images():
    samples = prepared(record(), draws(), crop="random", size_conditioning="true")
    centre = prepared(record(), draws(), crop="center")
    assert torch.equal(samples.chosen_pixels, samples.rejected_pixels)
    assert not torch.equal(samples.chosen_pixels, centre.chosen_pixels)
    # of sizes that differ, it is the same fraction: places 0..16 of one, 0..32 of the other
    wide = picture(4, width=48, height=16)
    corners = prepared(record(rejected=wide), draws(crop_left=0.5), crop="random", size_conditioning="true")
    assert (corners.chosen_time_ids[0, 3], corners.rejected_time_ids[0, 3]) == (8, 16)


def test_time_ids_fixed_and_true():
    pair = record(rejected=picture(4, width=24, height=48))
    fixed = prepared(pair, draws())
    assert fixed.chosen_time_ids.tolist() == fixed.rejected_time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
    true = prepared(pair, draws(), size_conditioning="true")
    # chosen: 16 x 32 (height x width), not resized, centre at left 8; rejected: 48 x 24 -> 32 x 16, centre at top 8
    assert true.chosen_time_ids.tolist() == [[16, 32, 0, 8, 16, 16]]
    assert true.rejected_time_ids.tolist() == [[48, 24, 8, 0, 16, 16]]
    assert true.chosen_time_ids.dtype == torch.float32


def test_time_ids_of_a_rectangle():
    pair = record(rejected=picture(4, width=24, height=48))
    fixed = prepared(pair, draws(), size=(24, 16))
    assert fixed.chosen_time_ids.tolist() == fixed.rejected_time_ids.tolist() == [[24, 16, 0, 0, 24, 16]]
    true = prepared(pair, draws(), size=(24, 16), size_conditioning="true")
    # chosen: 16 x 32 -> 24 x 48, centre at left 16; rejected: 48 x 24 -> 32 x 16, centre at top 4
    assert true.chosen_time_ids.tolist() == [[16, 32, 0, 16, 24, 16]]
    assert true.rejected_time_ids.tolist() == [[48, 24, 4, 0, 24, 16]]


def test_a_prompt_is_dropped_below_its_share():
    assert prepared(record(), draws(prompt_dropout=0.3), prompt_dropout=0.2).prompts == ["a cat"]
    assert prepared(record(), draws(prompt_dropout=0.1), prompt_dropout=0.2).prompts == [""]
    assert prepared(record(), draws(prompt_dropout=0.0), prompt_dropout=0.0).prompts == ["a cat"]
    assert prepared(record(), draws(prompt_dropout=0.999), prompt_dropout=1.0).prompts == [""]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_bad_image_names_row_side_and_reason(side):
    with pytest.raises(BadRowError, match=f"row 9: {side} image: empty: 0 bytes") as caught:
        prepared(record(**{side: b""}), draws())
    assert (caught.value.bad_row.uid, caught.value.bad_row.reason) == ("row 9", f"{side} image: empty: 0 bytes")
