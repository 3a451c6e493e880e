"""The pixels of an image file of any kind: RGB, upright, on white, of the first frame."""

import io
import struct
import zlib

import numpy as np
import pytest
from images_by_hand import jpeg_of, png_chunk, png_of
from pair_files import file_of, picture
from PIL import Image

from ds_dpo.data.images import decode_rgb, read_size


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
