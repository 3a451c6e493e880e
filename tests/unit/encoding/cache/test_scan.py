"""Which images count as the same, and how distinct contents are numbered."""

from __future__ import annotations

import io

import pyarrow as pa
from PIL import Image
from small_pair_cache import picture

from ds_dpo.encoding.cache.scan import find_distinct, key_of_image


def test_equal_files_of_another_shape_or_other_pixels_are_other_images() -> None:
    image = Image.open(io.BytesIO(picture(0)))
    turned = image.copy()
    turned.getexif()[0x112] = 6
    palette = image.convert("P")
    raws = [picture(0), picture(1), image, turned, palette]
    keys = {key_of_image(raw, shape, otherwise="") for raw in raws for shape in ((32, 32), (32, 48))}
    assert len(keys) == 2 * len(raws)
    assert key_of_image({"bytes": picture(0), "path": "x"}, (32, 32), otherwise="") == key_of_image(
        picture(0), (32, 32), otherwise=""
    )
    assert key_of_image(None, (32, 32), otherwise="1") != key_of_image(None, (32, 32), otherwise="2")


def test_distinct_things_are_numbered_as_they_are_first_met() -> None:
    found = find_distinct(pa.array([b"b", None, b"a", b"b", b"\0", b"c", b"a"], pa.binary()))
    assert found.row_of.tolist() == [0, -1, 1, 0, 2, 3, 1]
    assert found.first.tolist() == [0, 2, 4, 5]
    assert found.keys.to_pylist() == [b"b", b"a", b"\0", b"c"]
    assert found.rows_between(1, 5) == range(1, 3)
