"""What a round's evaluation says: figures over the first model and over the last round, and whether it fell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_dpo.config.documents import read_json
from ds_dpo.errors import DataError
from ds_dpo.evaluation.results import Comparison, Results
from ds_dpo.evaluation.results_file import load_results
from ds_dpo.evaluation.run.compare import ALL, Scope, compare_models
from ds_dpo.evaluation.run.tables import markdown_table
from ds_dpo.feedback.rounds.folder import BASE, label_of

FIGURES = ("n", "win_rate", "low", "high", "mean_difference", "mean_low", "mean_high", "p_value")
EFFECTS = ("diversity", "saturation", "contrast", "brightness", "blank", "black")
SUMMARY_NAME = "summary.json"


def judged(evaluation: Path, number: int) -> dict[str, Any]:
    """Return what rounds.json says of a round's model, from the folder of the evaluation.

    Raises DataError or ConfigError for an evaluation that lacks it.
    """
    results = load_results(evaluation)
    label, last = label_of(number), label_of(number - 1)
    return {
        **of_model(evaluation, label),
        "over_base": _figures(results, label, BASE),
        "over_last": _figures(results, label, last),
    }


def of_model(evaluation: Path, label: str) -> dict[str, Any]:
    """Return the mean scores and the side effects of a model of the evaluation. Raises as `judged` does."""
    path = evaluation / SUMMARY_NAME
    models = read_json(path, dict).get("models")
    facts = models.get(label) if isinstance(models, dict) else None
    if not isinstance(facts, dict):
        raise DataError(f"{path} has no model {label}; remove the folder, and run the same command again")
    scores = facts.get("scores") or {}
    return {
        "scores": {name: figures["mean"] for name, figures in scores.items()},
        "side_effects": {name: facts.get(name) for name in EFFECTS},
    }


def _figures(results: Results, label: str, against: str) -> dict[str, dict[str, Any]]:
    """Return the figures of a model against another one over all prompts, by scorer."""
    found = compare_models(
        [label],
        against,
        results.scorers,
        [Scope(ALL, None, frozenset(range(len(results.prompts))))],
        results.prompts,
        results.images,
    )
    return {each.scorer: _row(each) for each in found}


def _row(comparison: Comparison) -> dict[str, Any]:
    return {name: getattr(comparison, name) for name in FIGURES}


def why_it_fell(round_: Mapping[str, Any], scorer: str | None, least_fall: float | None) -> str | None:
    """Return why a round counts as a fall of the held-out scorer, None if it does not.

    It fell if it gave no numbers, and if its mean is lower than the last round's or the first model's: by more than
    least_fall, or, if that is None, by more than the 95 % interval of the difference.
    """
    if scorer is None:
        return None
    for place, words in (("over_last", "the last round"), ("over_base", "the first model")):
        figures = round_[place].get(scorer)
        if figures is None:
            return f"{scorer} gave no numbers to compare with {words}"
        difference, high = figures["mean_difference"], figures["mean_high"]
        if (high < 0) if least_fall is None else (difference < -least_fall):
            interval = f"95 % {figures['mean_low']:.4g} to {high:.4g}"
            return f"{scorer} is worse than that of {words} by {-difference:.4g} ({interval})"
    return None


def summary_text(record: Mapping[str, Any]) -> str:
    """Return summary.md: a row for each round and scorer, one for each round's side effects, and how it stands."""
    rounds: Sequence[Mapping[str, Any]] = record["rounds"]
    scores = [["round", "pairs", "scorer", "mean", "wins over base (95 %)", "wins over last round (95 %)"]]
    effects = [["round", *EFFECTS]]
    base = record.get("base")
    if base is not None:
        scores += [[BASE, "", name, f"{mean:.4g}", "", ""] for name, mean in base["scores"].items() if mean is not None]
        effects.append([BASE, *map(_number, base["side_effects"].values())])
    for each in rounds:
        for name, mean in each["scores"].items():
            over = [_wins(each[place].get(name)) for place in ("over_base", "over_last")]
            scores.append([str(each["round"]), str(each["pairs"]["pairs"]), name, _number(mean), *over])
        effects.append([str(each["round"]), *map(_number, each["side_effects"].values())])
    held_out = record["held_out"]
    parts = [
        "# Rounds",
        f"State: {record['state']}. Best: {record['best']}."
        + (f" The held-out scorer is {held_out}." if held_out is not None else ""),
    ]
    if rounds:
        parts += [markdown_table(scores), markdown_table(effects)]
    return "\n\n".join(parts) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _wins(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    return f"{figures['win_rate']:.1%} ({figures['low']:.1%} to {figures['high']:.1%})"
