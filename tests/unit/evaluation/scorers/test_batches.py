"""Scores batch by batch: whatever a batch does, each image keeps its own score."""

import numpy as np
import pytest
import torch
from PIL import Image

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.batches import score_in_batches
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.opening import open_scorer


def test_scores_keep_their_places_and_odd_images_have_none() -> None:
    sizes: list[int] = []

    def widths(images: list[Image.Image], prompts: list[str]) -> np.ndarray:
        assert all(image.mode == "RGB" for image in images)
        assert [f"{image.width}" for image in images] == prompts
        sizes.append(len(images))
        return np.array([np.inf if image.width == 4 else image.width for image in images], dtype=np.float64)

    images = [Image.new(mode, (width, 2)) for width, mode in ((1, "L"), (0, "RGB"), (3, "RGBA"), (4, "RGB"), (5, "1"))]
    scores = score_in_batches(images, ["1", "0", "3", "4", "5"], widths, at_once=3)
    assert np.array_equal(scores, [1, np.nan, 3, np.nan, 5], equal_nan=True)
    assert sizes == [3, 1]
    with pytest.raises(ValueError, match="shorter"):
        score_in_batches(images, ["1"], widths, at_once=3)


def test_a_device_without_memory_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object) -> np.ndarray:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    with pytest.raises(ScorerError, match=r"a batch of 2 images does not fit .*smaller images_at_once"):
        score_in_batches([Image.new("RGB", (2, 2))] * 2, ["", ""], no_memory, at_once=8)
    monkeypatch.setattr("ds_dpo.evaluation.scorers.miniature_reward.MiniatureReward.__init__", no_memory)
    with pytest.raises(ScorerError, match=r"scorer reward: its weights do not fit the free memory of cuda:1") as caught:
        open_scorer(ScorerChoice(name="reward", kind="reward"), "cuda:1")
    assert "\n" not in str(caught.value)
