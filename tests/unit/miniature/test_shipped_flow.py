"""The flow miniature that comes with the package: its size, what its base draws, and its pairs."""

from pathlib import Path

import pytest
import torch
from pyarrow import parquet

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.load import load_config
from ds_dpo.miniature.kinds import FLOW_KIND, load_parts, sample
from ds_dpo.miniature.pairs import decode_jpeg
from ds_dpo.miniature.reward import measure
from ds_dpo.miniature.world import PROMPTS, TEST_PROMPTS, TRAIN_PROMPTS
from ds_dpo.planning.recipes import far_from_recipes, recipes_like

CONFIG = load_config(["--config", "miniature_flow"]).config
MODEL = Path(resolve_asset(CONFIG.model.pretrained))
PAIRS = Path(resolve_asset(CONFIG.data.dataset))


def test_it_has_at_most_6_mb() -> None:
    assert sum(path.stat().st_size for path in MODEL.parent.rglob("*") if path.is_file()) <= 6e6


def test_its_base_draws_clean_objects_whose_colour_is_often_wrong() -> None:
    images = sample(load_parts(FLOW_KIND, MODEL), list(PROMPTS), seed=1)
    found = measure(images, list(PROMPTS))
    assert found.valid.float().mean().item() >= 0.9
    assert found.background.float().mean().item() >= 0.95
    assert 0.2 <= found.colour_right.float().mean().item() <= 0.6


@pytest.mark.parametrize(
    ("split", "prompts", "rows"),
    [
        ("train", TRAIN_PROMPTS, FLOW_KIND.rows_per_prompt),
        ("validation_unique", TRAIN_PROMPTS, 1),
        ("test_unique", TEST_PROMPTS, 1),
    ],
)
def test_its_pairs_are_of_their_prompts_and_the_preferred_image_has_the_larger_reward(
    split: str, prompts: tuple[str, ...], rows: int
) -> None:
    table = parquet.read_table(PAIRS / "data" / f"{split}-00000-of-00001.parquet").to_pylist()
    assert sorted(row["caption"] for row in table) == sorted(prompts * rows)
    assert {row["model_0"] for row in table} == {"ds_dpo/miniature_flow"}
    labelled = [row for row in table if row["are_different"]]
    assert len(table) - len(labelled) == pytest.approx(len(table) / 12, abs=1)
    captions = [row["caption"] for row in labelled]
    first, second = (
        measure(torch.stack([decode_jpeg(row[column]) for row in labelled]), captions).reward
        for column in ("jpg_0", "jpg_1")
    )
    chosen_is_first = torch.tensor([row["label_0"] == 1 for row in labelled])
    assert torch.all(torch.where(chosen_is_first, first - second, second - first) >= 0)


def test_its_preset_is_its_recipe() -> None:
    assert [recipe.source for recipe in recipes_like(CONFIG)] == ["docs/miniature_flow_seeds.md"]
    assert far_from_recipes(CONFIG) == []
