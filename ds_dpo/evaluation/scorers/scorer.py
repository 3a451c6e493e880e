"""What a scorer is: a number for each image and its prompt, or a preference between two images of one prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Scorer(Protocol):
    """Gives each image a number.

    name: column of the scores, such as pickscore. higher_is_better: False if a lower score is the better one.
    images_at_once: number of images that one call of `score` should get. record: what the scores depend on, as JSON
    values: kind, source, versions of libraries, SHA-256 of weights. Scores with equal records can be compared.
    """

    name: str
    higher_is_better: bool
    images_at_once: int
    record: Mapping[str, object]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Return the score of each RGB image for its prompt, (N,); a score that cannot be given is NaN.

        Raises ScorerError if the scorer itself has failed.
        """
        ...


class PairJudge(Protocol):
    """Says which of two images of one prompt is better. name, images_at_once, record: as in Scorer."""

    name: str
    images_at_once: int
    record: Mapping[str, object]

    def prefer(
        self, images: Sequence[Image.Image], rivals: Sequence[Image.Image], prompts: Sequence[str]
    ) -> NDArray[np.float64]:
        """Return the probability that each image is better than its rival, (N,) in 0..1; NaN if it gave no answer.

        Raises ScorerError if the judge itself has failed.
        """
        ...
