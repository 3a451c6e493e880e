"""Pairs of a model's own images, by hand."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pair_files import config
from PIL import Image

from ds_dpo.data.reading.open_source import open_source
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.evaluation.results import ImageRow, ModelRow, PromptRow, Results, ScorerRow
from ds_dpo.feedback.pairs.forming import form_pairs
from ds_dpo.feedback.pairs.writing import write_pairs


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def results(scores, *, folder: Path | None = None, seeds: int = 3) -> Results:
    """scores: (model, prompt, seed) -> (good, bad), of scorers of which higher and lower is better."""
    images = []
    for number, ((model, prompt, seed), (good, bad)) in enumerate(scores.items()):
        path, content = f"images/{model}/{prompt}_{seed}.png", png(number)
        if folder is not None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        found = {"good": good, "bad": bad}
        images.append(ImageRow(model=model, prompt=prompt, seed=seed, path=path, sha256=digest, scores=found))
    return Results(
        evaluation="one",
        models=[ModelRow(label=label, source=label) for label in dict.fromkeys(key[0] for key in scores)],
        scorers=[
            ScorerRow(name="good", higher_is_better=True, record={}),
            ScorerRow(name="bad", higher_is_better=False, record={}),
        ],
        prompts=[PromptRow(prompt=f"prompt {number}", prompt_set="set") for number in range(2)],
        images=images,
        comparisons=[],
        settings={"seeds": seeds},
    )


# good has the deviation 2 over the six images, bad 4
SCORES = {
    ("tuned", 0, 10): (0.0, 0.0),
    ("tuned", 0, 11): (4.0, 8.0),
    ("tuned", 0, 12): (4.0, 0.0),
    ("tuned", 1, 13): (0.0, 8.0),
    ("tuned", 1, 14): (4.0, 8.0),
    ("tuned", 1, 15): (0.0, 0.0),
}


def seeds_of(formation):
    return [(pair.chosen.seed, pair.rejected.seed, pair.margin, pair.confidence) for pair in formation.pairs]


def test_best_and_worst_are_by_the_mean_of_scores_in_units_of_their_deviation() -> None:
    # means of good / 2 and -bad / 4: prompt 0: 0, 0, 1; prompt 1: -1, 0, 0
    found = form_pairs(results(SCORES), rule="best_worst")
    assert seeds_of(found) == [(12, 11, 1, 0.75), (14, 13, 1, 0.75)]
    assert (found.unscored_images, found.undecided) == (0, 0)
    assert found.pairs[0].prompt == "prompt 0"


def test_all_pairs_leave_out_equal_scores_and_small_margins() -> None:
    found = form_pairs(results(SCORES), rule="all")
    assert seeds_of(found) == [(12, 10, 1, 0.75), (12, 11, 1, 0.75), (14, 13, 1, 0.75), (15, 13, 1, 0.75)]
    assert found.undecided == 2
    assert form_pairs(results(SCORES), rule="all", least_margin=1.01).undecided == 6


def test_the_best_image_meets_the_other_model_s_of_its_seed() -> None:
    scores = {("base", prompt, seed): (1.0, 4.0) for _, prompt, seed in SCORES} | SCORES
    found = form_pairs(results(scores), rule="against", against="base")
    # deviations over all twelve images: 1.5 and 8**0.5; of prompt 1, seed 14 has 4 / 1.5 - 8**0.5 < 0, seed 15 has 0
    assert [(one.chosen.model, one.chosen.seed, one.rejected.model, one.rejected.seed) for one in found.pairs] == [
        ("tuned", 12, "base", 12),
        ("tuned", 15, "base", 15),
    ]


def test_an_image_without_a_score_is_in_no_pair_and_counted() -> None:
    scores = SCORES | {("tuned", 0, 12): (None, 0.0)}
    found = form_pairs(results(scores), rule="all")
    assert found.unscored_images == 1
    assert 12 not in {seed for pair in found.pairs for seed in (pair.chosen.seed, pair.rejected.seed)}


@pytest.mark.parametrize(
    ("options", "seeds", "message"),
    [
        ({"rule": "best_worst"}, 1, "--pairs best_worst: --seeds 1 draws one image of each prompt"),
        ({"rule": "all"}, 1, "--pairs all: --seeds 1"),
        ({"rule": "against"}, 3, "needs two models, one of them named by --against; there are tuned"),
        ({"rule": "against", "against": "tuned"}, 3, "needs two models"),
    ],
)
def test_rules_that_lack_something_are_refused(options, seeds, message) -> None:
    with pytest.raises(ConfigError, match=message):
        form_pairs(results(SCORES, seeds=seeds), **options)


def test_written_pairs_are_read_as_they_are_and_name_their_noise(tmp_path) -> None:
    found = form_pairs(results(SCORES, folder=tmp_path), rule="all")
    path = tmp_path / "pairs.parquet"
    write_pairs(path, found.pairs, folder=tmp_path, noise_shape=(4, 2, 2))
    data = config(path, cache_dir=str(tmp_path / "cache"), confidence="target")
    source = open_source(data, say=lambda line: None, in_file_order=True)
    assert len(source) == 4
    for index, pair in enumerate(found.pairs):
        record = source.read(index)
        assert record.prompt == pair.prompt
        assert record.chosen == (tmp_path / pair.chosen.path).read_bytes()
        assert record.rejected == (tmp_path / pair.rejected.path).read_bytes()
        assert record.target_probability == pair.confidence
    for row in pq.read_table(path).to_pylist():
        for place in (0, 1):
            noise = torch.randn((4, 2, 2), generator=torch.Generator().manual_seed(row[f"seed_{place}"]))
            assert np.frombuffer(row[f"noise_{place}"], "<f4").tolist() == noise.ravel().tolist()
    assert b"C,H,W = 4,2,2" in pq.read_schema(path).metadata[b"noise"]


@pytest.mark.parametrize("change", ["missing", "changed"])
def test_an_image_that_is_not_the_scored_one_is_refused(tmp_path, change) -> None:
    found = form_pairs(results(SCORES, folder=tmp_path), rule="best_worst")
    path = tmp_path / found.pairs[0].chosen.path
    path.unlink() if change == "missing" else path.write_bytes(png(99))
    with pytest.raises(DataError, match=r"0_12\.png (cannot be read|has changed)"):
        write_pairs(tmp_path / "pairs.parquet", found.pairs, folder=tmp_path, noise_shape=(4, 2, 2))
    assert not (tmp_path / "pairs.parquet").exists()
