"""Turn untrusted image files into tensors of one size: decode, convert to RGB, resize, mirror, crop.

Legend: X,Y pixels of the training image. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError, features
from torch import Tensor

from ds_dpo.data.source import RawImage
from ds_dpo.errors import DataError

# decoders that only decode, as far as Pillow was built with them; some others, such as EPS, start programs
FEATURES = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(name for name in FEATURES if features.check(FEATURES[name])))
MAX_PIXELS = 2**26  # 8192 x 8192; a few kilobytes of PNG may claim far more and fill a host's memory
MAX_FILE_BYTES = 2**28
# EXIF's values of orientation, and what makes such an image upright
UPRIGHT: Mapping[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED_ORIENTATIONS = (5, 6, 7, 8)  # those that swap height and width


@dataclass(frozen=True, kw_only=True)
class CutImage:
    """An image cut to its training size. pixels: (3, X, Y) fp32 in [-1, 1].

    original_size: of the file's image, upright. corner: (top, left) of the crop, in pixels after resizing.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    corner: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        height, width = self.pixels.shape[1:]
        return height, width


def decode_rgb(raw: RawImage | None) -> Image.Image:
    """Return the first frame, upright, in RGB, with white behind transparent pixels. Ignores colour profiles.

    Raises DataError if it is not a complete image in one of FORMATS, or claims more than MAX_PIXELS.
    """
    with _decoding(raw) as image:
        image.load()
        method = UPRIGHT.get(_orientation(image))
        return _to_rgb(image if method is None else image.transpose(method))


def read_size(raw: RawImage | None) -> tuple[int, int]:
    """Return the height and width of decode_rgb's image, from the file's header alone.

    Raises DataError like decode_rgb, as far as the header shows it; a torn file may still have a size.
    """
    content = raw if isinstance(raw, Image.Image) else file_bytes(raw)
    with _decoding(content) as image:
        is_early = image.format == "PNG" and isinstance(content, bytes) and not _has_late_metadata(content)
        # Pillow rotates a TIFF when it opens it, but keeps the tag until it is decoded
        is_turned = image.format != "TIFF" and _orientation(image, is_early=is_early) in TURNED_ORIENTATIONS
        return (image.width, image.height) if is_turned else (image.height, image.width)


def cut_image(
    image: Image.Image, *, size: tuple[int, int], is_flipped: bool, crop_fractions: tuple[float, float] | None
) -> CutImage:
    """Resize until the image just covers the size, with its aspect ratio kept; then mirror it and crop it to the size.

    crop_fractions: top and left position of the crop in [0, 1) of the spare pixels; None is the centre. Mirroring comes
    before cropping, so the corner is that of the image as trained on. An image that already just covers the size is not
    resampled. Raises DataError if the resized image would exceed MAX_PIXELS.
    """
    height, width = size
    resized = _resize_to_cover(image, size)
    if is_flipped:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    spare = (resized.height - height, resized.width - width)
    if crop_fractions is None:
        top, left = round(spare[0] / 2), round(spare[1] / 2)
    else:
        top, left = (int(fraction * (room + 1)) for fraction, room in zip(crop_fractions, spare, strict=True))
    cut = resized.crop((left, top, left + width, top + height))
    bytes_XYC = torch.from_numpy(np.array(cut))  # np.array: torch needs a writable copy
    pixels = bytes_XYC.permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()
    return CutImage(pixels=pixels, original_size=(image.height, image.width), corner=(top, left))


def _resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if height * image.width >= width * image.height:  # the image is wider than the size: its sides are cut off
        resized_height, resized_width = height, height * image.width // image.height
    else:
        resized_height, resized_width = width * image.height // image.width, width
    if resized_height * resized_width > MAX_PIXELS:
        raise DataError(
            f"{image.width} x {image.height} is too long and thin to be resized until it covers {width} x {height}"
        )
    # returns a copy if the size does not change. Bilinear over the whole footprint is the authors' transforms.Resize;
    # Lanczos overshoots at hard edges
    return image.resize((resized_width, resized_height), Image.Resampling.BILINEAR)


def _orientation(image: Image.Image, *, is_early: bool = False) -> Any:
    """Return EXIF's orientation, or None if there is none or its tags make no sense: the pixels are whole nevertheless.

    is_early: the tags of a PNG come before its pixels, which PngImageFile.getexif would decode first.
    """
    try:
        return (Image.Image.getexif(image) if is_early else image.getexif()).get(ExifTags.Base.Orientation)
    # struct.error, ValueError, TypeError, SyntaxError and more; tags are read one by one, as they are asked for
    except Exception:
        return None


@contextmanager
def _decoding(raw: RawImage | None) -> Iterator[Image.Image]:
    """Open an image of an allowed size; what decoding raises inside the block becomes a DataError."""
    opened = raw if isinstance(raw, Image.Image) else io.BytesIO(file_bytes(raw))
    try:
        with warnings.catch_warnings():
            # warnings are about bytes that decode nevertheless; bytes that do not are an error below
            warnings.simplefilter("ignore")
            image = opened if isinstance(opened, Image.Image) else Image.open(opened, formats=FORMATS)
            _check_header(image)
            yield image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(f"not an image; {', '.join(FORMATS)} would fit") from None
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on torn files
    except Exception as error:
        raise DataError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def file_bytes(raw: Mapping[str, Any] | bytes | None) -> bytes:
    """Return the bytes of an undecoded image; reads them from its path if the row has only a path.

    Raises DataError if there are none.
    """
    if isinstance(raw, Mapping):
        content, path = raw.get("bytes"), raw.get("path")
        raw = _read_image_file(Path(path)) if content is None and path is not None else content
    if raw is None:
        raise DataError("missing: the row has null instead of an image")
    if not isinstance(raw, bytes):
        raise DataError(f"{type(raw).__name__} instead of bytes, {{bytes, path}} or an image")
    if not raw:
        raise DataError("empty: 0 bytes")
    return raw


def _read_image_file(path: Path) -> bytes:
    # a dataset may name any path: reading a device or a pipe might never end
    if not path.is_file():
        raise DataError(f"no bytes in the row, and its path {path} is not a file here")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _check_header(image: Image.Image) -> None:
    """Check what the header claims, before memory of that size is allocated."""
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"claims {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    if min(image.size) == 0:
        raise DataError(f"has no pixels: {image.width} x {image.height}")
    if image.mode in ("I", "F"):
        raise DataError(f"mode {image.mode} (32-bit) does not say which value is white; 8 or 16 bits would fit")


def _has_late_metadata(png: bytes) -> bool:
    """Whether a PNG's orientation may come after its pixels, which the standard allows but few writers do."""
    tail = png[png.rfind(b"IDAT") :]
    return any(chunk in tail for chunk in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32)
        # Pillow's own conversion would clip everything brighter than 255 of 65535
        scaled = np.round(values / 257)
        if "transparency" in image.info:  # one gray value of a PNG
            scaled[values == image.info["transparency"]] = 255
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
