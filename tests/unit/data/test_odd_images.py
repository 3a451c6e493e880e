"""Images with metadata that makes no sense, and in formats that not every Pillow reads."""

import io
import struct

import numpy as np
import pytest
from pair_files import file_of, picture
from PIL import Image, features

from ds_dpo.data.images import decode_rgb, read_size


def exif_of(*, orientation, numerator, denominator):
    """EXIF with an orientation, and XResolution as a signed fraction, which Pillow reads and cannot write again."""
    tags = struct.pack("<HHIIHHII", 0x112, 3, 1, orientation, 0x11A, 10, 1, 38)
    fraction = struct.pack("<ii", numerator, denominator)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0) + fraction


@pytest.mark.parametrize("fraction", [(-1, 0), (-(2**31), 1), (7, -1)])
def test_an_odd_exif_tag_costs_no_image(fraction):
    exif = exif_of(orientation=6, numerator=fraction[0], denominator=fraction[1])
    content = file_of(picture(0, width=40, height=24), "JPEG", exif=exif, quality=95)
    stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    # 6: the left column of the stored image is its top row, so it is turned to the right
    assert np.array_equal(np.asarray(decode_rgb(content)), np.rot90(stored, k=-1))
    assert read_size(content) == (40, 24)


def test_exif_that_is_no_exif_costs_no_image():
    content = file_of(picture(0, width=40, height=24), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", quality=95)
    assert decode_rgb(content).size == (40, 24)
    assert read_size(content) == (24, 40)


def test_avif_is_read_where_pillow_reads_it():
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert decode_rgb(file_of(picture(0, width=24, height=16), "AVIF")).size == (24, 16)
