"""The miniature's reward as a scorer: measured from pixels and caption alone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.errors import ScorerError, cut
from ds_dpo.evaluation.scorers.batches import score_in_batches
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.settings import Settings, settings_of
from ds_dpo.miniature.reward import measure
from ds_dpo.miniature.world import IMAGE_SIZE


class RewardSettings(Settings):
    """measure: the reward, or what it leaves out: the mean of one clean object, its shape and the background."""

    measure: Literal["reward", "faithful"] = "reward"


class MiniatureReward:
    """The reward, 0 to 2, or faithful, 0 to 1: see ds_dpo/miniature/reward.py. It is computed on the host."""

    higher_is_better = True

    def __init__(self, choice: ScorerChoice, device: str) -> None:
        self.name = choice.name
        settings = settings_of(choice, RewardSettings)
        self.images_at_once, self._measure = settings.images_at_once, settings.measure
        other = {} if settings.measure == "reward" else {"measure": settings.measure}
        self.record = {"kind": choice.kind, **other, "versions": {"ds_dpo": version("ds_dpo")}}

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float64]:
        """Return the rewards, (N,). Raises ScorerError for images of another size and prompts of another world."""
        return score_in_batches(images, prompts, self._score, at_once=self.images_at_once)

    def _score(self, images: list[Image.Image], prompts: list[str]) -> NDArray[np.float64]:
        side = IMAGE_SIZE
        other = next((image for image in images if image.size != (side, side)), None)
        if other is not None:
            raise ScorerError(
                f"scorer {self.name}: an image has {other.width} x {other.height} pixels; the miniature's reward "
                f"measures images of {side} x {side} alone: draw with the miniature, or take another scorer"
            )
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
        try:
            found = measure(pixels, prompts)
        except ValueError as error:
            raise ScorerError(
                f"scorer {self.name}: {cut(str(error))}; take the miniature's prompts, or another scorer"
            ) from error
        if self._measure == "reward":
            return found.reward.double().numpy()
        return torch.stack([found.valid, found.shape & found.valid, found.background]).double().mean(0).numpy()
