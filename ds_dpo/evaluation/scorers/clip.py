"""PickScore and CLIP score: how well an image and its prompt agree in the space of a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.evaluation.scorers.batches import score_in_batches
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.clip_model import CLIP_FILES, PACKAGES, PROCESSOR, clip_weights, load_clip
from ds_dpo.evaluation.scorers.settings import Settings, settings_of
from ds_dpo.evaluation.scorers.weights import find_folder, record_of


class ClipScore:
    """100 x max(cosine, 0), the CLIPScore of https://arxiv.org/abs/2104.08718 with the factor of later papers."""

    higher_is_better = True
    processor_source: str | None = None  # None: the processor is beside the weights

    def __init__(self, choice: ScorerChoice, device: str) -> None:
        assert choice.source is not None  # the table has a default
        settings = settings_of(choice, Settings)
        self.name = choice.name
        self.images_at_once = settings.images_at_once
        folder = find_folder(choice.source, scorer=choice.name, patterns=CLIP_FILES)
        self.clip = load_clip(folder, self._processor_folder(folder), device, scorer=choice.name)
        self.record = record_of(choice, weights=clip_weights(folder), packages=PACKAGES)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float64]:
        return score_in_batches(images, prompts, self._score, at_once=self.images_at_once)

    def _score(self, images: list[Image.Image], prompts: list[str]) -> NDArray[np.float64]:
        return self._from_cosines(self.clip.cosines(images, prompts).numpy())

    def _from_cosines(self, cosines: NDArray[np.float64]) -> NDArray[np.float64]:
        return 100 * np.where(cosines < 0, 0, cosines)  # keeps NaN

    def _processor_folder(self, weights: Path) -> Path:
        if self.processor_source is None or (weights / "preprocessor_config.json").is_file():
            return weights
        return find_folder(self.processor_source, scorer=self.name, patterns=PROCESSOR)


class PickScore(ClipScore):
    """exp(logit_scale) x cosine, https://arxiv.org/abs/2305.01569; its page gives weights without a processor."""

    processor_source = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _from_cosines(self, cosines: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.clip.logit_scale * cosines
