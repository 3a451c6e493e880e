"""What is no whole image is refused with a reason, where possible by its header alone."""

import io
import re
import zipfile

import numpy as np
import pytest
from images_by_hand import png_of
from pair_files import file_of, picture
from PIL import Image

from ds_dpo.data.images import decode_rgb, read_size
from ds_dpo.errors import DataError


def png_that_claims(width, height):
    """A PNG of a few bytes whose header states any size."""
    return png_of(width, height, b"")


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


def test_a_torn_file_still_has_the_size_that_its_header_states():
    for content in (PNG[: len(PNG) // 2], JPEG[: len(JPEG) // 2]):
        assert read_size(content) == (64, 64)


HEADERS = [name for name in REFUSED if not re.search("torn|without its last|wrong byte|closed", name)]


@pytest.mark.parametrize("name", HEADERS)
def test_what_its_header_refuses_has_no_size_for_the_same_reason(name):
    raw, reason = REFUSED[name]
    with pytest.raises(DataError, match=reason):
        read_size(raw)
