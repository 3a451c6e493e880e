"""HPSv2.1: a CLIP ViT-H/14 of open_clip, tuned on human choices, run by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ds_dpo.evaluation.scorers.batches import score_in_batches
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.clip_model import PACKAGES, PROCESSOR, ClipModel, load_processor
from ds_dpo.evaluation.scorers.open_clip_weights import clip_from_open_clip
from ds_dpo.evaluation.scorers.settings import Settings, settings_of
from ds_dpo.evaluation.scorers.weights import find_file, find_folder, read_tensors, record_of

WEIGHTS_FILES = ("HPS_v2.1_compressed.pt", "hpsv21.safetensors")


class HpsSettings(Settings):
    """processor: folder or hub id of the tokenizer; that beside the weights if there is one."""

    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HpsScore:
    """100 x cosine, as tables of papers show it; https://arxiv.org/abs/2306.09341."""

    higher_is_better = True

    def __init__(self, choice: ScorerChoice, device: str) -> None:
        assert choice.source is not None  # the table has a default
        settings = settings_of(choice, HpsSettings)
        self.name = choice.name
        self.images_at_once = settings.images_at_once
        weights = find_file(choice.source, WEIGHTS_FILES, scorer=choice.name)
        folder = self._processor_folder(weights.parent, choice, settings)
        tokenizer, processor = load_processor(folder, scorer=choice.name)
        place = f"scorer {choice.name}: {weights}"
        model = clip_from_open_clip(read_tensors(weights, scorer=choice.name), tokenizer, place=place)
        self._side = model.config.vision_config.image_size
        self._clip = ClipModel(model, tokenizer, processor, device)
        self._clip.try_out(place)
        self.record = record_of(choice, weights=[weights], packages=PACKAGES)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float64]:
        return score_in_batches(images, prompts, self._score, at_once=self.images_at_once)

    def _score(self, images: list[Image.Image], prompts: list[str]) -> NDArray[np.float64]:
        return 100 * self._clip.cosines([whole_in_square(image, self._side) for image in images], prompts).numpy()

    @staticmethod
    def _processor_folder(beside: Path, choice: ScorerChoice, settings: HpsSettings) -> Path:
        if "processor" not in choice.settings and (beside / "preprocessor_config.json").is_file():
            return beside
        return find_folder(settings.processor, scorer=choice.name, patterns=PROCESSOR)


def whole_in_square(image: Image.Image, side: int) -> Image.Image:
    """Return all of an image in a square of that side, with black beside it, as HPSv2 was trained to see images."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    resized = image if scale == 1 else image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side))
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square
