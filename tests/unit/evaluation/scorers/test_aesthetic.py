"""LAION's aesthetic head on a tiny random CLIP, against its layers applied one by one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clip import NUMBERS_OF_LAYERS, random_head, random_images, save_tiny_clip
from transformers import CLIPImageProcessorPil, CLIPModel

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.opening import open_scorer

WIDTH = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_clip(tmp_path / "clip", projection=WIDTH)
    return tmp_path / "clip"


def opened(source: Path, **settings: object):
    return open_scorer(ScorerChoice(name="look", kind="aesthetic", source=str(source), settings=settings), "cpu")


def test_scores_are_the_layers_on_the_normalised_embedding(folder: Path, tmp_path: Path) -> None:
    head, images = random_head(), random_images(5)
    torch.save(head, folder / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(head, tmp_path / "head.pth")
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embedding = CLIPModel.from_pretrained(folder).eval().get_image_features(pixel_values=pixels).pooler_output
    states = (embedding / embedding.norm(dim=-1, keepdim=True)).double()
    for number in NUMBERS_OF_LAYERS:
        states = states @ head[f"layers.{number}.weight"].double().T + head[f"layers.{number}.bias"].double()
    expected = states[:, 0].numpy()
    assert expected.std() > 0.1
    beside, apart = opened(folder), opened(tmp_path / "head.pth", clip=str(folder))
    for scorer in (beside, apart):
        np.testing.assert_allclose(scorer.score(images, [""] * 5), expected, rtol=1e-6, atol=1e-6)
    assert set(beside.record["sha256"]) == {"sac+logos+ava1-l14-linearMSE.pth", "model.safetensors"}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (random_head(16), "does not fit the CLIP model, whose embedding has 24 numbers"),
        ({"weight": torch.ones(3)}, "is no aesthetic head"),
        ({name: value for name, value in random_head().items() if name != "layers.4.bias"}, "is no aesthetic head"),
        ({"layers.0.weight": torch.ones(3), "layers.0.bias": torch.ones(1)}, "does not fit"),
        ([1, 2, 3], "something else than tensors"),
    ],
)
def test_another_head_is_refused(head: object, message: str, folder: Path) -> None:
    torch.save(head, folder / "aesthetic-model.pth")
    with pytest.raises(ScorerError, match=message):
        opened(folder)


def test_a_torn_head_is_refused(folder: Path) -> None:
    torch.save(random_head(), folder / "aesthetic-model.pth")
    content = (folder / "aesthetic-model.pth").read_bytes()
    (folder / "aesthetic-model.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ScorerError, match="cannot be read as weights alone"):
        opened(folder)
