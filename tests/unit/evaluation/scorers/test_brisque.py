"""BRISQUE on photographs that scikit-image ships, and on what it cannot measure."""

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.opening import open_scorer

pytestmark = pytest.mark.slow
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def opened():
    return open_scorer(ScorerChoice(name="brisque", kind="brisque"), "cpu")


def photo(name: str) -> Image.Image:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(0).normal(0, 25, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=5)
    return Image.open(content)


def test_degraded_photos_rank_below_their_originals() -> None:
    scorer = opened()
    assert not scorer.higher_is_better
    right = 0
    for name in PHOTOS:
        original = photo(name)
        images = [original, original.filter(ImageFilter.GaussianBlur(2)), noisy(original), jpeg(original)]
        clean, *degraded = scorer.score(images, [""] * 4)
        right += sum(score > clean for score in degraded)
    assert right >= 14


def test_what_cannot_be_measured_is_nan_and_harms_no_other() -> None:
    usual = photo("chelsea.png").resize((96, 96))
    scorer = opened()
    scores = scorer.score([usual, Image.new("RGB", (1, 1)), usual], [""] * 3)
    assert np.isnan(scores[1])
    assert scores[0] == scores[2]
    assert np.isfinite(scores[0])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "brisque", None)
    with pytest.raises(ScorerError, match=r"package brisque .* pip install 'ds_dpo\[eval\]'"):
        opened()
