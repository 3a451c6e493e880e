"""Pages of validation images: the policy beside what the run started from, also after a resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.evaluation.pages.validation_pages import ValidationPages

RED, GREEN, BLUE = (torch.eye(3)[number][:, None, None].expand(3, 32, 32) for number in range(3))


def config(*options: str) -> RunConfig:
    prompts = ["--validation.prompts", "a", "b", "--validation.seeds", "0"]
    return load_config(["--config", "miniature", *prompts, *options]).config


def tiles(path: Path) -> list[str]:
    """Return the colours along a line through the first row of tiles, repeats left out."""
    page = np.array(Image.open(path))
    names = {(255, 0, 0): "red", (0, 255, 0): "green", (0, 0, 255): "blue"}
    rows = [[names.get(tuple(map(int, pixel)), "") for pixel in row] for row in page]
    row = max(rows, key=lambda each: sum(map(bool, each)))
    met = [name for before, name in zip(["", *row], row, strict=False) if name and name != before]
    return met


def both(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second])


def test_policy_stands_beside_the_start_which_a_resumed_run_reads_again(tmp_path: Path) -> None:
    said: list[str] = []
    pages = ValidationPages(tmp_path, config(), say=said.append)
    pages.write(both(RED, RED), step=0)
    pages.write(both(GREEN, GREEN), step=5)
    assert tiles(tmp_path / "step_00000000.png") == ["red"]
    assert tiles(tmp_path / "step_00000005.png") == ["red", "green"]
    resumed = ValidationPages(tmp_path, config(), say=said.append)
    resumed.write(both(BLUE, BLUE), step=10)
    assert tiles(tmp_path / "step_00000010.png") == ["red", "blue"]
    assert said == []


@pytest.mark.parametrize("options", [["--guidance_scale", "3"], ["--num_inference_steps", "5"]])
def test_images_of_other_settings_are_not_taken_for_the_reference(tmp_path: Path, options: list[str]) -> None:
    said: list[str] = []
    ValidationPages(tmp_path, config(), say=said.append).write(both(RED, RED), step=0)
    changed = ValidationPages(tmp_path, config(*options), say=said.append)
    for step in (5, 10):
        changed.write(both(BLUE, BLUE), step=step)
    assert tiles(tmp_path / "step_00000010.png") == ["blue"]
    assert len(said) == 1
    assert "validation pages show no reference" in said[0]
