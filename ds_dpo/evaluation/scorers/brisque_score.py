"""BRISQUE: how natural the statistics of an image's pixels are, without its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.errors import ScorerError, cut
from ds_dpo.evaluation.scorers.batches import score_in_batches
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.extras import require_packages
from ds_dpo.evaluation.scorers.settings import Settings, settings_of
from ds_dpo.evaluation.scorers.table import EVAL_EXTRA
from ds_dpo.evaluation.scorers.weights import record_of

PACKAGES = ("brisque", "numpy", "scipy", "scikit-image", "opencv-python-headless", "libsvm-official")


class BrisqueScore:
    """The PyPI package brisque with its own weights; about 0 for a clean photograph, 100 for a ruined one.

    Source: Mittal et al., No-Reference Image Quality Assessment in the Spatial Domain, 2012.
    """

    higher_is_better = False

    def __init__(self, choice: ScorerChoice, device: str) -> None:
        self.name = choice.name
        self.images_at_once = settings_of(choice, Settings).images_at_once
        package = require_packages(choice.name, "brisque")[0]
        self._brisque = _fixed(package.BRISQUE)(url=False)
        self._try_out()
        models = Path(str(package.__file__)).parent / "models"
        self.record = record_of(choice, weights=[models / "svm.txt", models / "normalize.pickle"], packages=PACKAGES)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float64]:
        return score_in_batches(images, prompts, self._score, at_once=self.images_at_once)

    def _score(self, images: list[Image.Image], prompts: list[str]) -> NDArray[np.float64]:
        return np.array([self._score_one(np.asarray(image)) for image in images])

    def _score_one(self, pixels: NDArray[np.uint8]) -> float:
        try:
            return self._measure(pixels)
        except Exception:  # OpenCV and scipy raise each their own on an image of a few pixels
            return float("nan")

    def _measure(self, pixels: NDArray[np.uint8]) -> float:
        with np.errstate(all="ignore"):  # an image of one colour has no variance to divide by
            return float(self._brisque.score(pixels))

    def _try_out(self) -> None:
        """Score an image of noise: packages that do not fit each other fail on every image."""
        try:
            self._measure(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        except Exception as error:
            raise ScorerError(
                f"scorer {self.name}: the package brisque fails ({type(error).__name__}: {cut(str(error))}); install "
                f"versions that fit each other by {EVAL_EXTRA}"
            ) from error


def _fixed(brisque: Any) -> Any:
    class Fixed(brisque):
        """brisque 0.2.0 calls float() on arrays of one value, which numpy 2.4 refuses."""

        def scale_features(self, features: Any) -> Any:
            return super().scale_features([float(np.asarray(feature).ravel()[0]) for feature in features])

    return Fixed
