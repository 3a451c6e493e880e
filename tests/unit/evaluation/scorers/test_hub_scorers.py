"""Scorers whose weights are on the hub: which files are downloaded, and what is recorded of them."""

import fnmatch
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_clip import PROMPTS, random_head, random_images, save_tiny_clip

from ds_dpo.evaluation.scorers.choice import read_choices
from ds_dpo.evaluation.scorers.opening import open_scorer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_WEIGHTS = ("pytorch_model.bin", "flax_model.msgpack", "open_clip_pytorch_model.bin")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with repositories; what is downloaded from them is laid out as in the hub's cache."""

    def target(repository: str) -> Path:
        return tmp_path / "cache" / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        for path in (tmp_path / repository).iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                hf_hub_download(repository, path.name)
        return str(target(repository))

    def hf_hub_download(repository: str, name: str) -> str:
        target(repository).mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(tmp_path / repository / name, target(repository) / name))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    return tmp_path


def save_whole_model(folder: Path) -> None:
    save_tiny_clip(folder)
    for name in OTHER_WEIGHTS:
        (folder / name).write_bytes(b"gigabytes")


def test_pickscore_s_processor_is_on_another_page(hub: Path) -> None:
    save_whole_model(hub / "laion" / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    weights = hub / "yuvalkirstain" / "PickScore_v1"
    save_whole_model(weights)
    expected = open_scorer(read_choices([f"pickscore={weights}"])[0], "cpu").score(random_images(3), PROMPTS)
    for path in weights.glob("*token*"):
        path.unlink()
    (weights / "preprocessor_config.json").unlink()
    scorer = open_scorer(read_choices(["pickscore"])[0], "cpu")
    assert np.array_equal(scorer.score(random_images(3), PROMPTS), expected)
    assert scorer.record["commit"] == COMMIT
    downloaded = {path.name for path in (hub / "cache").rglob("*")}
    assert not downloaded & set(OTHER_WEIGHTS)
    # none of the gigabytes of the model whose processor is taken
    assert len(list((hub / "cache").rglob("model.safetensors"))) == 1


def test_the_aesthetic_head_and_its_clip_are_downloaded(hub: Path) -> None:
    save_whole_model(hub / "openai" / "clip-vit-large-patch14")
    head = hub / "trl-lib" / "ddpo-aesthetic-predictor" / "aesthetic-model.pth"
    head.parent.mkdir(parents=True)
    torch.save(random_head(), head)
    scorer = open_scorer(read_choices(["aesthetic"])[0], "cpu")
    assert np.isfinite(scorer.score(random_images(3), PROMPTS)).all()
    assert set(scorer.record["sha256"]) == {"aesthetic-model.pth", "model.safetensors"}
    assert not {path.name for path in (hub / "cache").rglob("*")} & set(OTHER_WEIGHTS)
