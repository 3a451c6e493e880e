"""Image files into square tensors: decoded without trust, converted to RGB, resized, mirrored, cropped.

Legend: X,Y pixels of the training square.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ds_dpo.data.source import RawImage
from ds_dpo.errors import DataError

# decoders that only decode; Pillow has others, such as EPS, that start programs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 2**26  # 8192 x 8192; a few kilobytes of PNG may claim far more and fill a host's memory
MAX_FILE_BYTES = 2**28


@dataclass(frozen=True, kw_only=True)
class Square:
    """An image as it is trained on. pixels: (3, X, Y) fp32 in [-1, 1].

    original_size: (height, width) of the file, upright. corner: (top, left) of the crop, in pixels after resizing.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    corner: tuple[int, int]


def decode_rgb(raw: RawImage | None) -> Image.Image:
    """Return the first frame, upright, in RGB, transparency laid on white. Colour profiles are not applied.

    Raises DataError for what is not a whole image of FORMATS, or claims more than MAX_PIXELS.
    """
    opened = raw if isinstance(raw, Image.Image) else io.BytesIO(_file_bytes(raw))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bytes that decode all the same; what does not is an error below
            image = opened if isinstance(opened, Image.Image) else Image.open(opened, formats=FORMATS)
            _check_size(image)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DataError(f"not an image; {', '.join(FORMATS)} would fit") from None
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error and more on torn files
    except Exception as error:
        raise DataError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def cut_square(
    image: Image.Image, *, resolution: int, is_flipped: bool, crop_fractions: tuple[float, float] | None
) -> Square:
    """Resize the shorter side to the resolution, mirror, and crop a square.

    crop_fractions: top and left in [0, 1) of what the crop may move; None: the centre. Mirrored before cropping, so
    that the corner is that of the image as it is seen. An image of that size already is not resampled. Raises
    DataError where the longer side would exceed MAX_PIXELS.
    """
    width, height = image.size
    resized = _resize_shorter_side(image, resolution)
    if is_flipped:
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    spare = (resized.height - resolution, resized.width - resolution)
    if crop_fractions is None:
        top, left = round(spare[0] / 2), round(spare[1] / 2)
    else:
        top, left = (int(fraction * (room + 1)) for fraction, room in zip(crop_fractions, spare, strict=True))
    square = resized.crop((left, top, left + resolution, top + resolution))
    bytes_XYC = torch.from_numpy(np.array(square))  # np.array: torch needs a writable copy
    pixels = bytes_XYC.permute(2, 0, 1).float().div_(127.5).sub_(1).contiguous()
    return Square(pixels=pixels, original_size=(height, width), corner=(top, left))


def _resize_shorter_side(image: Image.Image, resolution: int) -> Image.Image:
    shorter, longer = min(image.size), max(image.size)
    if shorter == resolution:
        return image
    resized_longer = resolution * longer // shorter
    if resolution * resized_longer > MAX_PIXELS:
        raise DataError(f"{image.width} x {image.height} is too long and thin to have its shorter side at {resolution}")
    size = (resolution, resized_longer) if image.width < image.height else (resized_longer, resolution)
    # bilinear over the whole footprint: the authors' transforms.Resize; Lanczos overshoots at hard edges
    return image.resize(size, Image.Resampling.BILINEAR)


def _file_bytes(raw: Mapping[str, Any] | bytes | None) -> bytes:
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
    # a dataset may name any path: a device or a pipe would never end
    if not path.is_file():
        raise DataError(f"no bytes in the row, and its path {path} is not a file here")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _check_size(image: Image.Image) -> None:
    """Look at the size that the header claims, before anything of that size is allocated."""
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"claims {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
    if min(image.size) == 0:
        raise DataError(f"has no pixels: {image.width} x {image.height}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip all that is brighter than 255 of 65535
        scaled = np.round(np.asarray(image).astype(np.float32) / 257)
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"mode {image.mode} (32-bit) does not say which value is white; 8 or 16 bits would fit")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
