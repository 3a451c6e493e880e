"""LAION's aesthetic predictor, version 2: a few linear layers on the embedding of CLIP ViT-L/14."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.batches import score_in_batches
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.clip_model import CLIP_FILES, PACKAGES, clip_weights, load_clip
from ds_dpo.evaluation.scorers.settings import Settings, settings_of
from ds_dpo.evaluation.scorers.weights import find_file, find_folder, read_tensors, record_of

HEAD_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "head.safetensors")
LAYER = re.compile(r"layers\.(\d+)\.(weight|bias)")


class AestheticSettings(Settings):
    """clip: folder or hub id of the CLIP model; the head's own folder if it has one."""

    clip: str = "openai/clip-vit-large-patch14"


class AestheticScore:
    """The head of https://github.com/christophschuhmann/improved-aesthetic-predictor, without its dropout."""

    higher_is_better = True

    def __init__(self, choice: ScorerChoice, device: str) -> None:
        assert choice.source is not None  # the table has a default
        settings = settings_of(choice, AestheticSettings)
        self.name = choice.name
        self.images_at_once = settings.images_at_once
        head = find_file(choice.source, HEAD_FILES, scorer=choice.name)
        beside = (head.parent / "config.json").is_file() and "clip" not in choice.settings
        folder = head.parent if beside else find_folder(settings.clip, scorer=choice.name, patterns=CLIP_FILES)
        self._clip = load_clip(folder, folder, device, scorer=choice.name)
        tensors = read_tensors(head, scorer=choice.name)
        self._layers = _layers(tensors, self._clip.width, place=f"scorer {choice.name}: {head}")
        self.record = record_of(choice, weights=[head, *clip_weights(folder)], packages=PACKAGES)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> NDArray[np.float64]:
        return score_in_batches(images, prompts, self._score, at_once=self.images_at_once)

    @torch.no_grad()
    def _score(self, images: list[Image.Image], prompts: list[str]) -> NDArray[np.float64]:
        states = self._clip.embed_images(images).cpu().double()
        for weight, bias in self._layers:
            states = linear(states, weight, bias)
        return states[:, 0].numpy()


def _layers(tensors: Mapping[str, Tensor], width: int, *, place: str) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each linear layer in order, fp64. Raises ScorerError if they make no such head."""
    found = {
        (int(match[1]), match[2]): tensor.double()
        for name, tensor in tensors.items()
        if (match := LAYER.fullmatch(name)) is not None
    }
    numbers = sorted({number for number, _ in found})
    if not numbers or any((number, part) not in found for number in numbers for part in ("weight", "bias")):
        raise ScorerError(f"{place} is no aesthetic head: it has no layers.N.weight and layers.N.bias for each layer")
    layers = [(found[number, "weight"], found[number, "bias"]) for number in numbers]
    widths = [width, *(len(bias) for _, bias in layers)]
    shapes = [tuple(weight.shape) for weight, _ in layers]
    if widths[-1] != 1 or shapes != list(zip(widths[1:], widths[:-1], strict=True)):
        raise ScorerError(
            f"{place} does not fit the CLIP model, whose embedding has {width} numbers: its layers have the shapes "
            f"{', '.join(map(str, shapes))}; LAION's head needs CLIP ViT-L/14"
        )
    return layers
