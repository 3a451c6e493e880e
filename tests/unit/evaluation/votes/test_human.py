import dataclasses
import json
from pathlib import Path

import pytest
from made_evaluation import made_results
from made_votes import vote_file, vote_row

from ds_dpo.errors import DataError
from ds_dpo.evaluation.results import PromptRow, Results
from ds_dpo.evaluation.votes.human import agreement_rows, human_comparisons, remarks, save_human


@pytest.fixture
def results() -> Results:
    return made_results(None, prompts=[f"prompt {number}" for number in range(6)])


def test_votes_of_two_raters(tmp_path: Path, results: Results) -> None:
    """Anna: wins on prompts 0 to 2, a tie on 3; Ben, who calls the base image 0: a win on 0, a loss on 1.

    (3 + 0.5 + 1 + 0) / 6 = 0.75 and (4 wins - 1 loss) / 6 = 0.5. Over prompts: 0, 2 are won, 1 and 3 are tied, so the
    sign test has 2 wins of 2: p = 2 / 2**2 = 0.5.
    """
    ours = [vote_row(results, prompt, label) for prompt, label in enumerate([1, 1, 1, 0.5])]
    theirs = [
        vote_row(results, prompt, label, rater="Ben", models=("base", "tuned")) for prompt, label in [(0, 0), (1, 1)]
    ]
    human = human_comparisons(
        results, [vote_file(tmp_path / "a.jsonl", *ours), vote_file(tmp_path / "b.jsonl", *theirs)]
    )
    assert human.raters == {"Anna": 4, "Ben": 2}
    whole = next(each for each in human.comparisons if each.category is None)
    assert (whole.model, whole.against, whole.scorer, whole.prompts) == ("tuned", "base", "human", "made")
    assert (whole.n, whole.num_prompts, whole.win_rate, whole.mean_difference) == (6, 4, 0.75, 0.5)
    assert whole.p_value == 0.5
    assert whole.low < 0.75 <= whole.high
    # categories alternate by prompt: 0 and 2 have the wins
    categories = {each.category: (each.n, each.win_rate) for each in human.comparisons if each.category is not None}
    assert categories == {"animals": (3, 1.0), "food & drink": (3, 0.5)}
    (between,) = human.between_raters
    # same on prompt 0 of prompts 0 and 1; Anna always says tuned, so chance gives 1/2 too
    assert (between.one, between.other, between.n, between.same, between.kappa) == ("Anna", "Ben", 2, 0.5, 0)
    # clip favours tuned on prompts 0 to 3: right for three of Anna's and one of Ben's, and a tie does not count
    with_clip, with_brisque = human.with_scorers
    assert (with_clip.one, with_clip.n, with_clip.same) == ("clip", 5, 0.8)
    # brisque, where lower is better, favours tuned on even prompts: Anna's 0 and 2, Ben's 0 and 1
    assert (with_brisque.one, with_brisque.n, with_brisque.same) == ("brisque", 5, 0.8)
    assert agreement_rows(human)[1] == ["Anna", "Ben", "2", "50.0%", "0.000"]
    assert remarks(human) == ["votes: 4 of Anna, 2 of Ben"]
    kept = json.loads(save_human(human, tmp_path).read_text())
    assert kept["comparisons"][0]["win_rate"] == 0.75
    assert kept["raters"] == {"Anna": 4, "Ben": 2}


def test_several_sets_are_compared_together_too(tmp_path: Path, results: Results) -> None:
    prompts = [PromptRow(prompt=row.prompt, prompt_set="ab"[place % 2]) for place, row in enumerate(results.prompts)]
    results = dataclasses.replace(results, prompts=prompts)
    file = vote_file(tmp_path / "a.jsonl", *(vote_row(results, prompt, prompt % 2) for prompt in range(4)))
    found = {each.prompts: each.win_rate for each in human_comparisons(results, [file]).comparisons}
    assert found == {"a": 0.0, "b": 1.0, "all": 0.5}


def test_rows_that_do_not_count_are_named(tmp_path: Path, results: Results) -> None:
    good = vote_row(results, 0, 1)
    whole = json.dumps(vote_row(results, 5, 1))
    file = vote_file(
        tmp_path / "a.jsonl",
        vote_row(results, 1, 0),
        good,
        {**good, "label": 2},
        {**good, "label": True},
        {**good, "rater": None},
        {**good, "sha256_1": "0" * 64},
        {**good, "image_0": "images/tuned/99999_0.png"},
        {**good, "image_0": results.images[0].path},
        {**good, "image_1": vote_row(results, 1, 0)["image_1"], "sha256_1": vote_row(results, 1, 0)["sha256_1"]},
        "[1]",
        vote_row(results, 1, 1),
        whole[: len(whole) // 2],
    )
    human = human_comparisons(results, [file])
    assert human.raters == {"Anna": 2}
    assert human.comparisons[0].win_rate == 1  # the second vote on prompt 1 counts
    reasons = {row.line: row.reason for row in human.left_out}
    assert sorted(reasons) == [1, 3, 4, 5, 6, 7, 8, 9, 10, 12]
    for line, words in {
        1: "Anna votes again on this pair later",
        3: "has label 2; 0, 0.5 or 1 would fit",
        4: "has label True",
        5: "has rater None",
        6: "has image_1 'images/base/00000_0.png', which has changed since the vote",
        7: "has image_0 'images/tuned/99999_0.png', which the evaluation lacks",
        8: "has image_0 'images/base/00000_0.png' of model base, not 'tuned'",
        9: "has two images that are no pair",
        10: "is [1]; an object of columns would fit",
        12: "is not JSON: damaged, or cut off",
    }.items():
        assert reasons[line].startswith(words)
    assert remarks(human)[1] == "10 rows do not count:"
    assert f"  {file}, line 12 is not JSON: damaged, or cut off" in remarks(human)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evaluation": "another"}, "line 1 is a vote of evaluation 'another', but this one is 'made-evaluation'"),
        ({"model_1": "sft"}, "line 1: model_1 is 'sft', which the evaluation lacks; it has base, tuned"),
        ({"sha256_0": "x"}, "no vote can be used; the first row: has image_0 'images/tuned/00000_0.png', which has"),
    ],
)
def test_files_that_do_not_belong_are_refused(
    tmp_path: Path, results: Results, change: dict[str, str], words: str
) -> None:
    file = vote_file(tmp_path / "a.jsonl", {**vote_row(results, 0, 1), **change})
    with pytest.raises(DataError) as raised:
        human_comparisons(results, [file])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, results: Results) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").touch()
    for name, words in {"none": "No such file", "bytes": "is not UTF-8 text", "empty": "no vote can be used"}.items():
        with pytest.raises(DataError, match=words):
            human_comparisons(results, [tmp_path / name])
