"""Pages of validation images: the policy beside the reference, which is the policy before its first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ds_dpo.config.run import RunConfig
from ds_dpo.evaluation.pages.picture import save_file, save_png, to_picture, validation_grid
from ds_dpo.outside import parse_json
from ds_dpo.process.say import Say

REFERENCE_FOLDER, DRAWN_WITH = "reference", "drawn_with.json"


class ValidationPages:
    """Writes a page per drawing to the samples folder of a run; for rank 0 only.

    The reference's images are those of step 0, kept as samples/reference/NN.png. They are drawn once, and no reference
    needs to be loaded.
    """

    def __init__(self, folder: Path, config: RunConfig, *, say: Say) -> None:
        """Keep the settings of the drawing, which identify the reference's images when a run is resumed."""
        self._folder, self._say = folder, say
        self._prompts, self._seeds = config.validation.prompts, config.validation.seeds
        self._drawn_with = {
            **config.validation.model_dump(mode="json", exclude={"scorers"}),
            "resolution": config.data.resolution,
        }
        self._reference: Tensor | None = None
        self._has_looked = False

    def has(self, step: int) -> bool:
        """Return whether the page of a step exists."""
        return self._page(step).is_file()

    def _page(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}.png"

    def write(self, images: Tensor, *, step: int) -> None:
        """Write step_NNNNNNNN.png of images (prompts * seeds, 3, X, Y) in 0..1; those of step 0 become the reference's.

        Raises ConfigError if the folder cannot be written.
        """
        if step == 0:
            self._keep_reference(images)
        elif not self._has_looked:
            self._reference = self._read_reference(len(images))
        self._has_looked = True
        page = validation_grid(
            images,
            self._prompts,
            self._seeds,
            title=f"step {step}",
            reference=self._reference if step else None,
        )
        save_png(page, self._page(step))

    def _keep_reference(self, images: Tensor) -> None:
        folder = self._folder / REFERENCE_FOLDER
        for number, image in enumerate(images):
            save_png(to_picture(image), folder / f"{number:02d}.png")
        # written last: it shows that all images exist
        save_file(folder / DRAWN_WITH, json.dumps(self._drawn_with, indent=1).encode())
        self._reference = images

    def _read_reference(self, num_images: int) -> Tensor | None:
        """Return the reference's images of an earlier start, None if there are none with these prompts and settings."""
        folder = self._folder / REFERENCE_FOLDER
        try:
            drawn_with: Any = parse_json((folder / DRAWN_WITH).read_text(encoding="utf-8"))
            if drawn_with == self._drawn_with:
                return torch.stack([_read(folder / f"{number:02d}.png") for number in range(num_images)])
        except (OSError, ValueError):
            pass  # the same as if there were none
        self._say(f"validation pages show no reference: {folder} has no images with these prompts, seeds and settings")
        return None


def _read(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
