"""Score images batch by batch, so that an image which cannot be scored costs its own score and no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.errors import ScorerError, cut

ScoreBatch = Callable[[list[Image.Image], list[str]], NDArray[np.float64]]


def score_in_batches(
    images: Sequence[Image.Image], prompts: Sequence[str], score: ScoreBatch, *, at_once: int
) -> NDArray[np.float64]:
    """Return the scores of RGB images, (N,); NaN for an image that has no pixels, and for a score that is not finite.

    score: gives (n,) for at most at_once complete images and their prompts. Raises ValueError if there is not one
    prompt an image.
    """
    scores = np.full(len(images), np.nan)
    decoded = [(place, image, prompt) for place, (image, prompt) in enumerate(zip(images, prompts, strict=True))]
    whole = [(place, rgb, prompt) for place, image, prompt in decoded if (rgb := as_rgb(image)) is not None]
    for start in range(0, len(whole), at_once):
        places, batch, texts = zip(*whole[start : start + at_once], strict=True)
        scores[list(places)] = _score_within_memory(score, list(batch), list(texts))
    return np.where(np.isfinite(scores), scores, np.nan)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether torch has no memory left on a device; this needs no torch."""
    return type(error).__name__ == "OutOfMemoryError"


def _score_within_memory(score: ScoreBatch, images: list[Image.Image], prompts: list[str]) -> NDArray[np.float64]:
    try:
        return score(images, prompts)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ScorerError(
            f"a batch of {len(images)} images does not fit the memory of the scorer's device ({cut(str(error))}); set "
            "a smaller images_at_once in a settings file (docs/scorers.md)"
        ) from error


def as_rgb(image: Image.Image) -> Image.Image | None:
    """Return an image with its pixels in RGB, or None if it has none: decoding first shows that a file is torn."""
    if min(image.size) == 0:
        return None
    try:
        image.load()
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
