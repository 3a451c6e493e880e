"""PickScore and CLIP score on a tiny random CLIP, against the formula on the model's own hidden states."""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import IMAGE_SIDE, PROMPTS, random_images, save_tiny_clip
from transformers import CLIPModel

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.opening import open_scorer
from ds_dpo.miniature.models import byte_pair_tables, make_tokenizer, token_ids
from ds_dpo.miniature.world import PROMPTS as WORLD

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    save_tiny_clip(path)
    return path


def opened(kind: str, folder: Path, **settings: object):
    return open_scorer(ScorerChoice(name=kind, kind=kind, source=str(folder), settings=settings), "cpu")


def cosines_by_hand(model: CLIPModel, images: list[Image.Image], prompts: list[str]) -> np.ndarray:
    """From the towers' last states on: pooling, projection, cosine."""
    ids = token_ids(make_tokenizer(pad_token="<|endoftext|>"), prompts)
    pixels = torch.stack([_pixels(image) for image in images])
    with torch.no_grad():
        text_states = model.text_model(input_ids=ids).last_hidden_state
        ends = (ids == model.config.text_config.eos_token_id).int().argmax(1)
        text = text_states[torch.arange(len(ids)), ends] @ model.text_projection.weight.T
        first = model.vision_model(pixel_values=pixels).last_hidden_state[:, 0]
        vision = model.vision_model.post_layernorm(first) @ model.visual_projection.weight.T
    return torch.cosine_similarity(vision.double(), text.double()).numpy()


def _pixels(image: Image.Image) -> torch.Tensor:
    scale = IMAGE_SIDE / min(image.size)
    wide, high = (max(IMAGE_SIDE, int(side * scale)) for side in image.size)
    resized = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - IMAGE_SIDE) // 2, (high - IMAGE_SIDE) // 2
    cut = np.asarray(resized.crop((left, top, left + IMAGE_SIDE, top + IMAGE_SIDE)), dtype=np.float32) / 255
    return torch.from_numpy((cut - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


def test_scores_are_the_formula_on_the_model(folder: Path) -> None:
    model = CLIPModel.from_pretrained(folder).eval()
    images, prompts = random_images(6), [PROMPTS[place % 3] for place in range(6)]
    cosines = cosines_by_hand(model, images, prompts)
    assert cosines.std() > 0.01
    assert (cosines < 0).any()
    assert (cosines > 0).any()
    clip, pickscore = opened("clip", folder), opened("pickscore", folder)
    np.testing.assert_allclose(clip.score(images, prompts), [100 * max(c, 0) for c in cosines], atol=1e-6 * 100)
    scale = math.exp(model.logit_scale.item())
    np.testing.assert_allclose(pickscore.score(images, prompts) / scale, cosines, atol=1e-6)
    assert clip.higher_is_better
    assert pickscore.higher_is_better


def test_a_tokenizer_may_be_in_the_files_of_earlier_versions(folder: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "clip"
    save_tiny_clip(earlier)
    (earlier / "tokenizer.json").unlink()
    vocabulary, merges = byte_pair_tables(sorted({word for prompt in WORLD for word in prompt.split()}))
    (earlier / "vocab.json").write_text(json.dumps(vocabulary))
    (earlier / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    images = random_images(3)
    assert np.array_equal(opened("clip", earlier).score(images, PROMPTS), opened("clip", folder).score(images, PROMPTS))


def test_a_score_depends_neither_on_the_batch_nor_on_a_broken_neighbour(folder: Path, tmp_path: Path) -> None:
    images, prompts = random_images(5), [*PROMPTS, *PROMPTS[:2]]
    whole = opened("pickscore", folder).score(images, prompts)
    torn = tmp_path / "torn.png"
    random_images(1)[0].save(torn)
    torn.write_bytes(torn.read_bytes()[:60])
    images[2] = Image.open(torn)
    scores = opened("pickscore", folder, images_at_once=2).score(images, prompts)
    assert np.isnan(scores[2])
    np.testing.assert_allclose(np.delete(scores, 2), np.delete(whole, 2), atol=1e-4)


def test_threads_that_resize_images_for_an_accelerator_change_nothing(folder: Path) -> None:
    images, prompts = random_images(5), [*PROMPTS, *PROMPTS[:2]]
    scorer = opened("clip", folder)
    expected = scorer.score(images, prompts)
    with ThreadPoolExecutor(3) as threads:
        scorer.clip._map = threads.map
        assert np.array_equal(scorer.score(images, prompts), expected)


def test_the_record_names_versions_and_weights(folder: Path) -> None:
    record = opened("clip", folder).record
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert record["sha256"] == {"model.safetensors": digest}
    assert record["kind"] == "clip"
    assert record["versions"]["torch"].startswith("2.")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _take_another_processor(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace("28", "32"))


def _spoil_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _spoil_the_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "cannot be loaded"),
        (_drop_a_weight, "lacks 1 weights of a CLIP model, such as visual_projection.weight"),
        (_drop_the_tokenizer, "tokenizer"),
        (_take_another_processor, "do not fit each other .*32"),
        (_spoil_the_weights, "its weights give nan for an image of one colour"),
        (_spoil_the_config, "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no config.json with model"),
    ],
)
def test_damaged_models_end_in_one_line(damage, message: str, tmp_path: Path) -> None:
    save_tiny_clip(tmp_path / "clip")
    damage(tmp_path / "clip")
    with pytest.raises(ScorerError, match=message) as caught:
        opened("clip", tmp_path / "clip")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("scorer clip: ")


def test_a_source_that_is_neither_a_folder_nor_on_the_hub_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ScorerError, match="is neither a file nor a folder here"):
        opened("clip", tmp_path / "missing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ScorerError, match="clip=FOLDER"):
        opened("clip", Path("nobody/nothing"))
