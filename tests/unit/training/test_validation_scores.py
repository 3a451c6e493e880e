"""Scores of validation images: means and win rates by hand, across resumes, roll-backs and scorers that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_dpo.config.load import load_config
from ds_dpo.errors import ConfigError, ScorerError
from ds_dpo.training import validation_scores
from ds_dpo.training.validation_scores import ValidationScores, open_validation_scorers, validation_choices

PROMPTS = ["a", "a", "b", "b"]


class Brightness:
    """Gives the brightness of each image, 0 to 255; NaN for a black one."""

    name, images_at_once = "bright", 3

    def __init__(self, *, higher_is_better: bool = True, version: str = "1") -> None:
        self.higher_is_better, self.record = higher_is_better, {"version": version}

    def score(self, images: Any, prompts: Any) -> np.ndarray:
        assert len(images) == len(prompts) <= 3
        values = np.array([np.asarray(image, dtype=float).mean() for image in images])
        return np.where(values == 0, np.nan, values)


class Failing(Brightness):
    name = "failing"

    def score(self, images: Any, prompts: Any) -> np.ndarray:
        raise ScorerError("scorer failing: the server is gone")


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[int, Any] = {}

    def write_scalars(self, scalars: Any, *, step: int) -> None:
        self.scalars[step] = dict(scalars)


def images(*levels: int) -> torch.Tensor:
    return torch.tensor(levels).div(255).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def scores(path: Path, *scorers: Any, last_step: int = 0, prompts: Any = PROMPTS) -> tuple[Any, Writer, list[str]]:
    writer, said = Writer(), []  # type: ignore[var-annotated]
    asked: Any = {"prompts": prompts, "last_step": last_step, "writer": writer, "say": said.append}
    return ValidationScores(path, scorers or (Brightness(),), **asked), writer, said


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "evaluation" / "validation.jsonl"


def test_means_and_win_rates_over_step_0_by_hand(path: Path) -> None:
    score, writer, said = scores(path)
    score(images(10, 20, 30, 40), step=0)
    score(images(20, 20, 10, 50), step=5)
    assert writer.scalars[0] == {"validation/bright_mean": pytest.approx(25)}
    # better, equal, worse, better
    assert writer.scalars[5] == {
        "validation/bright_mean": pytest.approx(25),
        "validation/bright_win_rate": 2.5 / 4,
    }
    assert [line["step"] for line in lines(path)] == [0, 5]
    assert lines(path)[1]["scorers"]["bright"]["images"] == pytest.approx([20, 20, 10, 50])
    assert said[-1] == "validation images, step 5: bright 25, better than at step 0 on 62% of the images"
    assert score.has(5)
    assert not score.has(6)


def test_a_lower_score_wins_where_lower_is_better_and_images_without_a_score_are_left_out(path: Path) -> None:
    score, writer, _ = scores(path, Brightness(higher_is_better=False))
    score(images(10, 20, 30, 0), step=0)
    score(images(5, 0, 40, 50), step=5)
    assert writer.scalars[5] == {
        "validation/bright_mean": pytest.approx((5 + 40 + 50) / 3),
        "validation/bright_win_rate": 0.5,
    }
    assert lines(path)[1]["scorers"]["bright"]["images"][1] is None


def test_a_resumed_run_compares_with_its_step_0_and_later_lines_move_aside(path: Path) -> None:
    score, _, _ = scores(path)
    for step in (0, 5, 10):
        score(images(10, 20, 30, 40), step=step)
    score, writer, _ = scores(path, last_step=5)
    assert [line["step"] for line in lines(path)] == [0, 5]
    score(images(11, 21, 31, 41), step=10)
    assert writer.scalars[10]["validation/bright_win_rate"] == 1
    # a roll-back within a run
    score(images(9, 9, 9, 9), step=5)
    assert [line["step"] for line in lines(path)] == [0, 5]
    assert lines(path)[1]["scorers"]["bright"]["win_rate"] == 0
    assert len(lines(path.with_suffix(".rolled_back.jsonl"))) == 3


@pytest.mark.parametrize(
    ("scorer", "prompts"), [(Brightness(version="2"), PROMPTS), (Brightness(), ["a", "a", "b", "c"])]
)
def test_scores_of_another_scorer_or_other_prompts_are_not_compared(path: Path, scorer: Any, prompts: Any) -> None:
    scores(path)[0](images(10, 20, 30, 40), step=0)
    score, writer, _ = scores(path, scorer, prompts=prompts, last_step=5)
    score(images(11, 21, 31, 41), step=10)
    assert writer.scalars[10] == {"validation/bright_mean": pytest.approx(26)}


def test_a_scorer_that_fails_is_named_and_the_others_give_their_numbers(path: Path) -> None:
    score, writer, said = scores(path, Failing(), Brightness())
    score(images(10, 20, 30, 40), step=0)
    assert writer.scalars[0] == {"validation/bright_mean": pytest.approx(25)}
    assert said[0] == ("warning: validation images are not scored by failing: scorer failing: the server is gone")


def config(*options: str) -> Any:
    return load_config(["--config", "miniature", *options]).config


def test_scorers_are_named_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choice.name for choice in validation_choices(config("--validation.scorers", "reward"))] == ["reward"]
    assert validation_choices(config("--cadence.sample_every_steps", "none")) == ()
    with pytest.raises(ConfigError, match=r"validation\.scorers: .*picscore"):
        validation_choices(config("--validation.scorers", "picscore"))
    for scorers, would_fit in (("reward", "validation.reward"), ("none", "one of validation.scorers, which is empty,")):
        with pytest.raises(
            ConfigError, match=rf"keep_best validation\.clip is no scorer of this run; {would_fit} would"
        ):
            validation_choices(config("--validation.scorers", scorers, "--cadence.keep_best", "validation.clip"))
    with pytest.raises(
        ConfigError, match=r"validation\.scorers reward has no effect without cadence\.sample_every_steps"
    ):
        config("--validation.scorers", "reward", "--cadence.sample_every_steps", "none")
    monkeypatch.setattr(validation_scores, "open_scorer", lambda choice, device: type("Judge", (), {"prefer": None})())
    with pytest.raises(ScorerError, match="reward compares two images"):
        open_validation_scorers(validation_choices(config("--validation.scorers", "reward")), torch.device("cpu"))
