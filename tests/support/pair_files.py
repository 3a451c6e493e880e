"""Small images, rows and sources for the tests of this folder."""

import io

import numpy as np
from PIL import Image

from ds_dpo.config.data import DataConfig
from ds_dpo.data.keyed_hash import id_of
from ds_dpo.data.source import BadRowError, PairRecord


def picture(number=0, *, width=20, height=16):
    """An image whose pixels tell its number and have no symmetry."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def row(number=0, *, label_0=1.0, **changes):
    """A row with the columns of Pick-a-Pic that are read, and one that is not."""
    return {
        "caption": f"prompt {number}",
        "jpg_0": file_of(picture(2 * number)),
        "jpg_1": file_of(picture(2 * number + 1)),
        "label_0": label_0,
        "label_1": None,
        "ranking_id": 100 + number,
        "image_0_uid": f"left-{number}",
        "image_1_uid": f"right-{number}",
    } | changes


def config(dataset="unused", **fields):
    return DataConfig.model_validate({"dataset": str(dataset), "resolution": 16, "workers": 0, **fields})


class ListedPairs:
    """Pairs 0..N-1 in memory; those in `bad` have no caption, those in `torn` a torn image."""

    description = "pairs of a test"

    def __init__(self, *bucket_sizes, bucket_shapes=((16, 16),), bad=(), torn=()):
        self.bucket_sizes, self.bucket_shapes = bucket_sizes, bucket_shapes
        self.bad, self.torn = frozenset(bad), frozenset(torn)

    def __len__(self):
        return sum(self.bucket_sizes)

    def read(self, index):
        uid = f"row {index}"
        if index in self.bad:
            raise BadRowError(uid, "no caption")
        return PairRecord(
            prompt=f"prompt {index}",
            chosen=picture(2 * index),
            rejected=b"torn" if index in self.torn else picture(2 * index + 1),
            pair_id=id_of(uid),
            uid=uid,
        )
