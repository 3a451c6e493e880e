"""What training may change beside the scores: saturation, contrast, blank images, and how much seeds differ."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.data.images import decode_rgb

LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601
BLANK_CONTRAST = 0.01
BLACK_BRIGHTNESS = 0.02
DIVERSITY_PROMPTS = 200  # the first of a set; their images are read once more
DIVERSITY_PIXELS = 64  # largest side
THREADS = 4


@dataclass(frozen=True)
class Look:
    """How an image looks, each 0 to 1.

    saturation: of HSV, mean over pixels. contrast: standard deviation over pixels, root mean square of the channels.
    brightness: mean of luma.
    """

    saturation: float
    contrast: float
    brightness: float

    @property
    def is_blank(self) -> bool:
        """Whether all pixels are nearly the same."""
        return self.contrast < BLANK_CONTRAST

    @property
    def is_black(self) -> bool:
        """Whether it is blank and black, as a pipeline's safety checker or an overflow leaves it."""
        return self.is_blank and self.brightness < BLACK_BRIGHTNESS


@dataclass(frozen=True, kw_only=True)
class SideEffects:
    """Means over the images of a model. blank, black: shares. diversity: see diversity_of."""

    saturation: float
    contrast: float
    brightness: float
    blank: float
    black: float
    diversity: float | None


def look_of(pixels: NDArray[np.uint8]) -> Look:
    """Measure an image (X, Y, 3)."""
    values = pixels.astype(np.float32) / 255
    largest, smallest = values.max(-1), values.min(-1)
    saturation = np.divide(largest - smallest, largest, out=np.zeros_like(largest), where=largest > 0)
    flat = values.reshape(-1, 3).astype(np.float64)
    contrast = np.sqrt(flat.var(0).mean())
    return Look(float(saturation.astype(np.float64).mean()), float(contrast), float(flat.mean(0) @ LUMA))


def side_effects(looks: Sequence[Look], diversity: float | None) -> SideEffects:
    """Return the means of a model's images; there must be at least one."""
    means = {name: float(np.mean([getattr(look, name) for look in looks])) for name in Look.__dataclass_fields__}
    return SideEffects(
        **means,
        blank=float(np.mean([look.is_blank for look in looks])),
        black=float(np.mean([look.is_black for look in looks])),
        diversity=diversity,
    )


def diversity_of(images_of_prompts: Sequence[Sequence[Path]]) -> float | None:
    """Return how much images of a prompt differ: root mean square over pixels, mean over pairs, then over prompts.

    Of the first 200 prompts, with images reduced to 64 px. 0: all are equal. None: no prompt has two images.
    """
    several = [paths for paths in images_of_prompts[:DIVERSITY_PROMPTS] if len(paths) > 1]
    if not several:
        return None
    with ThreadPoolExecutor(THREADS) as threads:
        return float(np.mean([*threads.map(_mean_distance, several)]))


def _mean_distance(paths: Sequence[Path]) -> float:
    images = [_small(path) for path in paths]
    distances = [float(np.sqrt(np.square(one - other).mean())) for one, other in combinations(images, 2)]
    return float(np.mean(distances))


def _small(path: Path) -> NDArray[np.float64]:
    image = decode_rgb(path.read_bytes())
    if max(image.size) > DIVERSITY_PIXELS:
        image.thumbnail((DIVERSITY_PIXELS, DIVERSITY_PIXELS), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64) / 255
