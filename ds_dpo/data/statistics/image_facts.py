"""Facts about a pair's images, after decoding them as training does."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image

from ds_dpo.data.images import FORMATS, MAX_PIXELS, cut_image, decode_rgb, file_bytes
from ds_dpo.data.source import PairRecord, RawImage
from ds_dpo.data.statistics.duplicates import DIGEST_BYTES
from ds_dpo.errors import DataError

NO_FILE = "no file"  # for an image that its dataset returns decoded


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """Facts about one image.

    digest: of the file's bytes. size: (height, width) in pixels, upright. format, mode: before conversion to RGB.
    scale: factor by which training resizes the image; it is enlarged above 1.
    """

    digest: bytes
    size: tuple[int, int]
    format: str
    mode: str
    scale: float


PairFacts = tuple[ImageFacts, ImageFacts] | str


def facts_of_pair(record: PairRecord, *, training_size: tuple[int, int]) -> PairFacts:
    """Return facts about the chosen and the rejected image, or the reason why training could not use one of them."""
    facts = []
    for side, raw in (("chosen", record.chosen), ("rejected", record.rejected)):
        try:
            facts.append(facts_of_image(raw, training_size=training_size))
        except DataError as error:
            return f"{side} image: {error}"
    return facts[0], facts[1]


def facts_of_image(raw: RawImage | None, *, training_size: tuple[int, int]) -> ImageFacts:
    """Decode an image completely and return facts about it. Raises DataError if training could not use it."""
    if isinstance(raw, Image.Image):
        kind, mode = NO_FILE, raw.mode
        content = f"{raw.mode} {raw.width} {raw.height} ".encode() + raw.tobytes()
        upright = decode_rgb(raw)
    else:
        content = file_bytes(raw)
        upright = decode_rgb(content)
        with Image.open(io.BytesIO(content), formats=FORMATS) as stored:
            kind, mode = stored.format or "?", stored.mode
    scale = max(training_size[0] / upright.height, training_size[1] / upright.width)
    if scale * upright.height * scale * upright.width > MAX_PIXELS / 2:
        # refuses an image that is too long
        cut_image(upright, size=training_size, is_flipped=False, crop_fractions=None)
    return ImageFacts(
        digest=digest_of(content), size=(upright.height, upright.width), format=kind, mode=mode, scale=scale
    )


def digest_of(content: bytes) -> bytes:
    """Return 16 bytes that in practice only equal contents share. Source: RFC 7693 (BLAKE2b)."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
