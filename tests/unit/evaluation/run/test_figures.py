"""What is computed beside the scores: side effects, warnings, tables, who trained on what."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ds_dpo.evaluation.miniature.report import diversity
from ds_dpo.evaluation.results import Comparison, ImageRow, ScorerRow
from ds_dpo.evaluation.run.compare import find_warnings
from ds_dpo.evaluation.run.pace import Pace
from ds_dpo.evaluation.run.side_effects import diversity_of, look_of, side_effects
from ds_dpo.evaluation.run.tables import markdown_table, text_table
from ds_dpo.evaluation.run.trained_on import recorded_scorers


def flat(*colour: int) -> np.ndarray:
    return np.full((4, 4, 3), colour, dtype=np.uint8)


def test_looks_by_hand() -> None:
    black, white, red = look_of(flat(0, 0, 0)), look_of(flat(255, 255, 255)), look_of(flat(255, 0, 0))
    assert (black.saturation, black.contrast, black.brightness) == (0, 0, 0)
    assert (white.saturation, white.contrast, white.brightness) == (0, 0, pytest.approx(1))
    assert (red.saturation, red.contrast, red.brightness) == (1, 0, pytest.approx(0.299))
    assert [look.is_blank for look in (black, white, red)] == [True] * 3
    assert [look.is_black for look in (black, white, red)] == [True, False, False]
    halves = flat(0, 0, 0)
    halves[:2] = 255
    assert look_of(halves).contrast == pytest.approx(0.5)
    # red and green of the same luma are no blank image
    coloured = flat(255, 0, 0)
    coloured[:2] = (0, 130, 0)
    assert not look_of(coloured).is_blank
    effects = side_effects([black, white, red, look_of(halves)], 0.25)
    assert (effects.blank, effects.black, effects.diversity) == (0.75, 0.25, 0.25)
    assert (effects.saturation, effects.contrast) == (0.25, 0.125)


def test_diversity_is_that_of_the_miniature(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    paths = [tmp_path / f"{place}.png" for place in range(5)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    wanted = diversity(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, ["a", "a", "a", "b", "b"])
    assert diversity_of([paths[:3], paths[3:]]) == pytest.approx(wanted)
    assert diversity_of([paths[:1], paths[1:2]]) is None


def comparison(scorer: str, low: float, high: float, category: str | None = None) -> Comparison:
    figures = dict.fromkeys(("win_rate", "low", "high", "mean_difference", "median_difference", "p_value"), 0.5)
    names = {"model": "two", "against": "one", "scorer": scorer, "prompts": "p", "category": category}
    return Comparison(
        **names, **figures, n=2, num_prompts=2, mean_low=low, mean_high=high, adjusted_p_value=1, prompts_needed=None
    )


def test_scorers_that_disagree_for_certain_are_named() -> None:
    images = [ImageRow(model=m, prompt=0, seed=0, path=m, sha256=m, scores={"a": 1, "b": 1}) for m in ("one", "two")]
    scorers = [ScorerRow(name=name, higher_is_better=True, record={}) for name in ("a", "b")]

    def warned(*comparisons: Comparison) -> list[str]:
        return find_warnings(comparisons, scorers, images, trained_on=["c"])

    assert warned(comparison("a", 0.1, 0.2), comparison("b", -0.2, 0.1)) == []
    assert warned(comparison("a", 0.1, 0.2), comparison("b", -0.2, -0.1, category="x")) == []
    (line,) = warned(comparison("a", 0.1, 0.2), comparison("b", -0.2, -0.1))
    assert line.startswith("scorers disagree on two against one (p): better by a, worse by b")


def test_tables_are_even_and_names_of_others_are_escaped() -> None:
    rows = [["model", "n"], ["a|b <script>", "1"]]
    assert text_table(rows) == "model         n\na|b <script>  1"
    assert markdown_table(rows) == "| model | n |\n|---|---|\n| a\\|b \\<script> | 1 |"


def test_a_run_says_which_scorers_it_was_trained_on(tmp_path: Path) -> None:
    run, labels = tmp_path / "run", tmp_path / "labels.parquet"
    (run / "export").mkdir(parents=True)
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    config = f"data: {{dataset: {tmp_path / 'made' / 'pairs.parquet'}, labels: {labels}}}\n"
    (run / "config.yaml").write_text(config)
    pq.write_table(pa.table({"version": [json.dumps({"clip": {}, "pickscore": {}})]}), labels)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "pairs.json").write_text('{"scorers": {"reward": {}, "clip": {}}}')
    wanted = ["clip", "pickscore", "reward"]
    for name in (run, f"{run}@2", run / "export", run / "checkpoints" / "step_00000002"):
        assert recorded_scorers([str(name), "owner/name", str(tmp_path / "absent")]) == wanted
    labels.write_bytes(b"PAR1")
    assert recorded_scorers([str(run)]) == []


def test_a_long_part_says_how_far_it_is() -> None:
    said: list[str] = []
    clock = iter([0.0, 10.0, 40.0, 50.0, 80.0])
    pace = Pace("one: drew", total=8, say=said.append, clock=lambda: next(clock))
    for _ in range(4):
        pace.add(2)
    assert said == ["one: drew 4 of this rank's 8 images, 0.1/s, 0:00:40 left"]
