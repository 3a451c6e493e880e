"""From votes to comparisons by people, and to their agreement: what `scripts/evaluate.py --votes` prints and keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.comparison import comparison_of
from ds_dpo.evaluation.results import Comparison, Results
from ds_dpo.evaluation.statistics.paired import compare_paired
from ds_dpo.evaluation.votes.agreement import Agreement, cohen, fleiss
from ds_dpo.evaluation.votes.vote_files import LeftOut, Vote, Votes, read_votes
from ds_dpo.storage.replace import replace_file

HUMAN = "human"  # in the place of a scorer's name
ALL = "all"
VOTES_NAME = "votes.json"
MOST_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class HumanResults:
    """What people say of an evaluation.

    comparisons: as of a scorer named human; n counts votes, the difference of a vote is 1, 0 or -1. raters: number of
    votes of each. between_raters: each two of them on the pairs that both voted on. fleiss_kappa: over the
    fleiss_pairs pairs with several votes, all raters together; None if undefined. with_scorers: each scorer against
    all votes, without ties of either.
    """

    evaluation: str
    comparisons: Sequence[Comparison]
    raters: Mapping[str, int]
    between_raters: Sequence[Agreement]
    fleiss_pairs: int
    fleiss_kappa: float | None
    with_scorers: Sequence[Agreement]
    left_out: Sequence[LeftOut]


def human_comparisons(results: Results, files: Sequence[Path]) -> HumanResults:
    """Compare the models of an evaluation by the votes of files. Raises DataError as `read_votes` does."""
    read = read_votes(results, files)
    by_rater: dict[str, dict[tuple[str, str], float]] = {}
    for vote in read.votes:
        by_rater.setdefault(vote.rater, {})[vote.pair] = vote.label
    by_pair: dict[tuple[str, str], list[float]] = {}
    for outcomes in by_rater.values():
        for pair, outcome in outcomes.items():
            by_pair.setdefault(pair, []).append(outcome)
    num_pairs, kappa = fleiss(list(by_pair.values()))
    return HumanResults(
        evaluation=results.evaluation,
        comparisons=list(_comparisons(results, read)),
        raters={rater: len(outcomes) for rater, outcomes in by_rater.items()},
        between_raters=[_of_raters(one, other, by_rater) for one, other in combinations(by_rater, 2)],
        fleiss_pairs=num_pairs,
        fleiss_kappa=kappa,
        with_scorers=[
            _with_scorer(scorer.name, 1 if scorer.higher_is_better else -1, read.votes) for scorer in results.scorers
        ],
        left_out=read.left_out,
    )


def save_human(human: HumanResults, folder: Path) -> Path:
    """Write DIR/votes.json whole or not at all, and return its path. Raises ConfigError if it cannot be written."""
    path = folder / VOTES_NAME
    try:
        replace_file(path, json.dumps(asdict(human), indent=1) + "\n", sync=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another folder") from error
    return path


def agreement_rows(human: HumanResults) -> list[list[str]]:
    """Return a table for people: its titles, and a row for each two raters and for each scorer."""
    rows = [["agreement of", "with", "pairs", "same outcome", "Cohen's kappa"]]
    for each in (*human.between_raters, *human.with_scorers):
        rows.append([each.one, each.other, str(each.n), _share(each.same), _kappa(each.kappa)])
    return rows


def remarks(human: HumanResults) -> list[str]:
    """Return lines on what the tables do not show: votes by rater, Fleiss' kappa, rows that do not count."""
    lines = ["votes: " + ", ".join(f"{count} of {rater}" for rater, count in human.raters.items())]
    if len(human.raters) > 2:
        lines.append(f"Fleiss' kappa of all raters: {_kappa(human.fleiss_kappa)} over {human.fleiss_pairs} pairs")
    if human.left_out:
        lines.append(f"{len(human.left_out)} rows do not count:")
        lines += [f"  {row.file}, line {row.line} {row.reason}" for row in human.left_out[:MOST_NAMED]]
        if len(human.left_out) > MOST_NAMED:
            lines.append(f"  and {len(human.left_out) - MOST_NAMED} more, which {VOTES_NAME} names")
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _kappa(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _of_raters(one: str, other: str, by_rater: Mapping[str, Mapping[tuple[str, str], float]]) -> Agreement:
    common = [pair for pair in by_rater[one] if pair in by_rater[other]]
    own, theirs = [by_rater[one][pair] for pair in common], [by_rater[other][pair] for pair in common]
    return cohen(own, theirs, (one, other))


def _with_scorer(name: str, sign: int, votes: Sequence[Vote]) -> Agreement:
    labels, judged = [], []
    for vote in votes:
        scores = [image.scores.get(name) for image in vote.images]
        if vote.label != 0.5 and scores[0] is not None and scores[1] is not None and scores[0] != scores[1]:
            labels.append(vote.label)
            judged.append(float(sign * (scores[0] - scores[1]) > 0))
    return cohen(judged, labels, (name, HUMAN))


# ---- comparisons ----


def _comparisons(results: Results, read: Votes) -> Iterator[Comparison]:
    """Yield a comparison for each two models with votes, and each set and category of at least two prompts."""
    of_models: dict[tuple[str, str], list[tuple[int, float]]] = {}
    directions = {(each.model, each.against) for each in results.comparisons}
    for vote in read.votes:
        model, against = vote.images[0].model, vote.images[1].model
        is_turned = (against, model) in directions
        key, label = ((against, model), 1 - vote.label) if is_turned else ((model, against), vote.label)
        of_models.setdefault(key, []).append((vote.images[0].prompt, label))
    for (model, against), votes in of_models.items():
        for prompts, category in _scopes(results, [prompt for prompt, _ in votes]):
            inside = [
                (results.prompts[prompt].prompt, label)
                for prompt, label in votes
                if prompts in (ALL, results.prompts[prompt].prompt_set)
                and category in (None, results.prompts[prompt].category)
            ]
            if len({prompt for prompt, _ in inside}) > 1:  # an interval resamples prompts
                yield _compare(inside, model=model, against=against, prompts=prompts, category=category)


def _scopes(results: Results, prompts: Sequence[int]) -> list[tuple[str, str | None]]:
    """Return each set and category that has a vote, and all sets together if there are several."""
    rows = [results.prompts[prompt] for prompt in prompts]
    sets = list(dict.fromkeys(row.prompt_set for row in rows))
    scopes: list[tuple[str, str | None]] = []
    for name in sets:
        categories = dict.fromkeys(row.category for row in rows if row.prompt_set == name and row.category is not None)
        scopes += [(name, None), *((name, category) for category in categories)]
    return scopes if len(sets) == 1 else [*scopes, (ALL, None)]


def _compare(
    votes: Sequence[tuple[str, float]], *, model: str, against: str, prompts: str, category: str | None
) -> Comparison:
    labels = np.array([label for _, label in votes])
    figures = compare_paired(labels, 1 - labels, [prompt for prompt, _ in votes])
    return comparison_of(figures, model=model, against=against, scorer=HUMAN, prompts=prompts, category=category)
