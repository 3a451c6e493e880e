"""Scores of validation images during training: the policy against the model that it started from, on the same noise."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError, ScorerError, cut
from ds_dpo.evaluation.pages.picture import to_picture
from ds_dpo.evaluation.scorers.choice import ScorerChoice, read_choices
from ds_dpo.evaluation.scorers.opening import is_judge, open_scorer
from ds_dpo.evaluation.scorers.scorer import Scorer
from ds_dpo.evaluation.statistics.win_rate import outcomes
from ds_dpo.outside import parse_json
from ds_dpo.process.say import Say
from ds_dpo.run_folder.metrics import MetricsWriter, cut_metrics


def validation_choices(config: RunConfig) -> Sequence[ScorerChoice]:
    """Return the scorers that a run asks for, none if it draws no images. Raises ConfigError for an unknown one."""
    try:
        choices = read_choices(config.validation.scorers)
    except ConfigError as error:
        raise ConfigError(f"validation.scorers: {error}") from error
    source, _, name = (config.cadence.keep_best or "").partition(".")
    names = [choice.name for choice in choices]
    if source == "validation" and name not in names:
        would_fit = ", ".join(f"validation.{each}" for each in names) or "one of validation.scorers, which is empty,"
        raise ConfigError(
            f"cadence.keep_best {cut(config.cadence.keep_best or '')} is no scorer of this run; {would_fit} would fit"
        )
    return choices if config.cadence.sample_every_steps is not None else ()


def open_validation_scorers(choices: Sequence[ScorerChoice], device: torch.device) -> list[Scorer]:
    """Load the scorers onto a device. Raises ScorerError, also for one that compares pairs."""
    scorers: list[Scorer] = []
    for choice in choices:
        scorer = open_scorer(choice, str(device))
        if is_judge(scorer):
            raise ScorerError(
                f"validation.scorers: {choice.name} compares two images; a scorer that gives each image a number is "
                "needed"
            )
        scorers.append(scorer)  # type: ignore[arg-type]
    return scorers


class ValidationScores:
    """Scores each drawing of a run, and writes means and win rates over step 0; for rank 0 only."""

    def __init__(
        self,
        path: Path,
        scorers: Sequence[Scorer],
        *,
        prompts: Sequence[str],
        last_step: int,
        writer: MetricsWriter | None,
        say: Say,
    ) -> None:
        """Continue after last_step, 0 for a new run; later lines of an earlier start move aside.

        prompts: of each image of a drawing. writer: TensorBoard's.
        """
        self._path, self._scorers, self._prompts = path, scorers, list(prompts)
        self._writer, self._say = writer, say
        cut_metrics(path, last_step=last_step or -1)

    def has(self, step: int) -> bool:
        """Return whether a step has a line."""
        return any(line["step"] == step for line in self._lines())

    def __call__(self, images: Tensor, *, step: int) -> None:
        """Score images (N, 3, X, Y) in 0..1 and write a line.

        A scorer that fails is named in the log and gives no numbers: training goes on.
        """
        started = time.monotonic()
        pictures = [to_picture(image) for image in images]
        first = {} if step == 0 else self._scores_of_start()
        line: dict[str, Any] = {"step": step, "prompts": self._prompts, "scorers": {}}
        scalars: dict[str, float] = {}
        for scorer in self._scorers:
            scores = self._score(scorer, pictures)
            if scores is None:
                continue
            found = summary(scores, first.get(scorer.name), higher_is_better=scorer.higher_is_better)
            record = {
                "higher_is_better": scorer.higher_is_better,
                "record": dict(scorer.record),
                "images": [_finite(score) for score in scores.tolist()],
            }
            line["scorers"][scorer.name] = {**found, **record}
            scalars |= {f"validation/{scorer.name}_{name}": value for name, value in found.items() if value is not None}
        line["seconds"] = round(time.monotonic() - started, 3)
        self._write(line)
        if self._writer is not None:
            self._writer.write_scalars(scalars, step=step)
        self._say(describe(line))

    def _score(self, scorer: Scorer, pictures: Sequence[Image.Image]) -> NDArray[np.float64] | None:
        size = scorer.images_at_once
        try:
            parts = [
                scorer.score(pictures[start : start + size], self._prompts[start : start + size])
                for start in range(0, len(pictures), size)
            ]
        except ScorerError as error:
            self._say(f"warning: validation images are not scored by {scorer.name}: {error}")
            return None
        return np.concatenate(parts)

    def _scores_of_start(self) -> Mapping[str, NDArray[np.float64]]:
        """Return the scores of step 0 by scorer; only those of the same prompts and the same scorer can be compared."""
        try:
            (start,) = [line for line in self._lines() if line["step"] == 0]
            if start["prompts"] != self._prompts:
                return {}
            return {
                scorer.name: np.array(
                    [math.nan if one is None else one for one in start["scorers"][scorer.name]["images"]], dtype=float
                )
                for scorer in self._scorers
                if start["scorers"].get(scorer.name, {}).get("record") == json.loads(json.dumps(dict(scorer.record)))
            }
        # no line of step 0, or one that another program has changed: there is nothing to compare with
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _lines(self) -> list[dict[str, Any]]:
        try:
            return [parse_json(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return []

    def _write(self, line: Mapping[str, Any]) -> None:
        # a run that went back to an earlier step draws steps again, whose lines move aside
        cut_metrics(self._path, last_step=line["step"] - 1)
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def summary(
    scores: NDArray[np.float64], start: NDArray[np.float64] | None, *, higher_is_better: bool
) -> dict[str, float | None]:
    """Return mean, and win_rate over the scores of the start, (N,) both; None for what no image has a score for.

    A tie counts half; images without both scores are left out.
    """
    known = scores[~np.isnan(scores)]
    found: dict[str, float | None] = {"mean": float(known.mean()) if len(known) else None, "win_rate": None}
    if start is not None and len(start) == len(scores):
        difference = (scores - start) * (1 if higher_is_better else -1)
        both = difference[~np.isnan(difference)]
        found["win_rate"] = float(outcomes(both).mean()) if len(both) else None
    return found


def describe(line: Mapping[str, Any]) -> str:
    """Return a line for the log."""
    parts = []
    for name, found in line["scorers"].items():
        mean = "no score" if found["mean"] is None else f"{found['mean']:.4g}"
        rate = "" if found["win_rate"] is None else f", better than at step 0 on {found['win_rate']:.0%} of the images"
        parts.append(f"{name} {mean}{rate}")
    return f"validation images, step {line['step']}: " + ("; ".join(parts) or "no scorer gave scores")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
