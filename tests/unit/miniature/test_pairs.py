"""The miniature's pairs are Pick-a-Pic v2's, column by column; a drawing stands in for the model's samples."""

import io
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ds_dpo.miniature import pairs
from ds_dpo.miniature.kinds import FLOW_KIND
from ds_dpo.miniature.reward import measure
from ds_dpo.miniature.world import TEST_PROMPTS, TRAIN_PROMPTS, draw

# As the dataset's own page states them (yuvalkirstain/pickapic_v2).
PICKAPIC_V2 = """are_different bool, best_image_uid string, caption string, created_at timestamp[ns], has_label bool,
    image_0_uid string, image_0_url string, image_1_uid string, image_1_url string, jpg_0 binary, jpg_1 binary,
    label_0 double, label_1 double, model_0 string, model_1 string, ranking_id int64, user_id int64,
    num_example_per_prompt int64, __index_level_0__ int64"""


def write(folder: Path, splits: dict[str, tuple[tuple[str, ...], int, int]]) -> dict[str, pyarrow.Table]:
    def sample(parts: object, prompts: list[str], *, seed: int) -> torch.Tensor:
        return draw(prompts, generator=torch.Generator().manual_seed(seed), right_colour_share=0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "load_parts", lambda kind, folder: None)
        patch.setattr(pairs, "sample", sample)
        patch.setattr(pairs, "SPLITS", splits)
        pairs.write_pairs(FLOW_KIND, Path("model"), folder, say=lambda line: None)
    return {split: parquet.read_table(folder / f"data/{split}-00000-of-00001.parquet") for split in splits}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pyarrow.Table]:
    splits = {"train": (TRAIN_PROMPTS[:15], 2, 1), "test_unique": (TEST_PROMPTS[:6], 1, 100)}
    return write(tmp_path_factory.mktemp("pairs"), splits)


def rows_of(tables: dict[str, pyarrow.Table]) -> list[dict[str, object]]:
    return [row for table in tables.values() for row in table.to_pylist()]


def rewards_of(row: dict[str, object]) -> tuple[float, float]:
    decoded = []
    for column in ("jpg_0", "jpg_1"):
        file = row[column]
        assert isinstance(file, bytes)
        image = Image.open(io.BytesIO(file))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))
        decoded.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    first, second = measure(torch.stack(decoded), [str(row["caption"])] * 2).reward.tolist()
    return first, second


def test_columns_are_pickapics(tables: dict[str, pyarrow.Table]) -> None:
    expected = [tuple(column.split()) for column in PICKAPIC_V2.replace("\n", " ").split(",")]
    for table in tables.values():
        assert [(field.name, str(field.type)) for field in table.schema] == expected


def test_the_label_is_the_image_of_higher_reward(tables: dict[str, pyarrow.Table]) -> None:
    labels = set()
    for row in rows_of(tables):
        first, second = rewards_of(row)
        labels.add(row["label_0"])
        assert row["label_1"] == 1 - row["label_0"]  # type: ignore[operator]
        if row["are_different"]:
            assert row["label_0"] == float(first > second)
            assert row["best_image_uid"] == row["image_0_uid" if first > second else "image_1_uid"]
        else:
            assert (row["label_0"], row["best_image_uid"]) == (0.5, "tie")
    assert labels == {0.0, 0.5, 1.0}, "either side wins now and then"


def test_ties_are_the_pairs_that_are_hard_to_tell(tables: dict[str, pyarrow.Table]) -> None:
    rows = rows_of(tables)
    ties = [row for row in rows if not row["are_different"]]
    assert len(ties) == len(rows) // pairs.TIE_EVERY == 3
    gaps = {is_tie: [] for is_tie in (True, False)}  # type: dict[bool, list[float]]
    for row in rows:
        first, second = rewards_of(row)
        gaps[not row["are_different"]].append(abs(first - second))
    # the nearest two of eight images, against the two furthest apart
    assert max(gaps[True]) < 0.1
    assert min(gaps[False]) > 0.5


def test_every_row_has_its_own_number_and_its_splits_prompts(tables: dict[str, pyarrow.Table]) -> None:
    assert [row["ranking_id"] for row in rows_of(tables)] == list(range(36))
    captions = {split: set(table.column("caption").to_pylist()) for split, table in tables.items()}
    assert captions == {"train": set(TRAIN_PROMPTS[:15]), "test_unique": set(TEST_PROMPTS[:6])}
    assert {row[side] for row in rows_of(tables) for side in ("model_0", "model_1")} == {"ds_dpo/miniature_flow"}


def test_the_same_model_gives_the_same_pairs(tmp_path: Path) -> None:
    splits = {"test_unique": (TEST_PROMPTS[:2], 1, 7)}
    assert write(tmp_path / "a", splits) == write(tmp_path / "b", splits)
