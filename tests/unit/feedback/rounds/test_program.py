"""The rounds as a state machine, with programs that only leave their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_votes import vote_file
from small_rounds import STEPS, Stages, option, rounds_config

from ds_dpo.errors import ConfigError, DataError
from ds_dpo.evaluation.results_file import load_results
from ds_dpo.feedback.rounds.program import StageError, prepare, run_rounds
from ds_dpo.feedback.rounds.voting import pairs_of_votes

pytestmark = pytest.mark.slow
IN_A_ROUND = ("draw", "train", "consolidate", "evaluate")


def run(
    folder: Path, stages: Stages, *, files: list[Path] | None = None, lines: list[str] | None = None, **changes: Any
) -> str:
    said = lines if lines is not None else []
    prepared = prepare(rounds_config(folder, **changes), say=said.append)
    return run_rounds(prepared, votes=files or [], say=said.append, call=stages)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "rounds.json").read_text())
    return found


def test_each_round_draws_from_the_last_model_and_trains_on_from_it(tmp_path: Path) -> None:
    stages, lines = Stages(), []
    assert run(tmp_path, stages, lines=lines) == "done"
    assert stages.calls == [(name, number) for number in (1, 2, 3) for name in IN_A_ROUND]
    draws, trainings = stages.commands[0::4], stages.commands[1::4]
    out = tmp_path / "out"
    first = "ds_dpo://assets/miniature/model"
    assert [option(words, "model") for words in draws] == [first, *(f"{out}/round_0{n}/model" for n in (1, 2))]
    # 2 prompts of 4 images each
    assert [int(option(words, "first_seed")) for words in draws] == [10**9, 10**9 + 8, 10**9 + 16]
    assert [option(words, "model.policy_init") for words in trainings] == [
        "",
        *(f"{out}/round_0{n}/run" for n in (1, 2)),
    ]
    assert [option(words, "data.dataset") for words in trainings] == [
        f"{out}/round_0{n}/pairs/pairs.parquet" for n in (1, 2, 3)
    ]
    assert [option(words, "seed") for words in trainings] == ["0", "1", "2"]
    assert not any("denoiser_init" in word for words in trainings for word in words)
    found = record(tmp_path)
    assert (found["state"], found["best"], found["held_out"]) == ("done", "round_03", "brisque")
    assert [each["steps"] for each in found["rounds"]] == [STEPS] * 3
    # clip grows by 1 a round on every image
    second = found["rounds"][1]
    assert (second["over_base"]["clip"]["mean_difference"], second["over_last"]["clip"]["mean_difference"]) == (2, 1)
    assert second["over_base"]["clip"]["win_rate"] == 1
    assert second["side_effects"]["diversity"] == 0.5
    summary = (out / "summary.md").read_text()
    assert "| 2 | 5 | clip | 2 | 100.0% (" in summary
    again = Stages()
    assert run(tmp_path, again) == "done"
    assert again.calls == []
    with pytest.raises(ConfigError, match="--votes: no round waits for votes"):
        run(tmp_path, again, files=[tmp_path / "votes.jsonl"])


def test_a_reference_that_follows_is_the_last_model(tmp_path: Path) -> None:
    stages = Stages()
    run(tmp_path, stages, reference="following", rounds=2)
    for words, last in zip(stages.commands[1::4], ["", f"{tmp_path}/out/round_01/run"], strict=True):
        assert option(words, "model.denoiser_init") == last
        assert option(words, "model.policy_init") == ""


@pytest.mark.parametrize(
    ("brisque", "least_fall", "last", "best"),
    [
        ((30, 29, 33, 20), None, 2, "round_01"),  # worse than the last round, beyond its interval
        ((30, 30.1, 30.2, 30.3), None, 3, "round_03"),  # within the interval
        ((30, 30.1, 30.2, 30.3), 0.15, 2, "round_01"),  # by 0.2 over the base
        ((30, 31, 31, 31), 2, 3, "round_03"),
        ((30, 40, 30, 30), 5, 1, "base"),
    ],
)
def test_a_fall_of_the_held_out_scorer_ends_the_rounds(
    tmp_path: Path, brisque: tuple[float, ...], least_fall: float | None, last: int, best: str
) -> None:
    stages = Stages(brisque=brisque)
    state = run(tmp_path, stages, evaluation={"least_fall": least_fall})
    found = record(tmp_path)
    assert stages.calls[-1] == ("evaluate", last)
    assert found["best"] == best
    is_stopped = best != "round_03"
    assert state == found["state"] == ("stopped" if is_stopped else "done")
    assert (found["rounds"][-1]["fell"] is not None) == is_stopped
    again = Stages()
    assert run(tmp_path, again, evaluation={"least_fall": least_fall}) == state
    assert again.calls == []


def test_a_kill_in_any_stage_repeats_that_stage_alone(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = Stages()
    run(tmp_path / "whole", whole, rounds=2)
    expected = (tmp_path / "whole" / "out" / "rounds.json").read_text()
    for place in range(1, len(whole.calls) + 1):
        folder = tmp_path / f"killed_{place}"
        folder.mkdir()
        killed, rerun = Stages(dies=place), Stages()
        with pytest.raises(KeyboardInterrupt):
            run(folder, killed, rounds=2)
        run(folder, rerun, rounds=2)
        assert killed.calls[: place - 1] + rerun.calls == whole.calls
        assert (folder / "out" / "rounds.json").read_text() == expected


def test_a_program_that_fails_or_ends_early_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"round 1, training: its program ended with status 1; its message is above"):
        run(tmp_path, Stages(fails=2))
    early = Stages()
    early.stops_at = 3
    with pytest.raises(StageError, match="round 1, training: ended at step 3 of 4; the same command goes on"):
        run(tmp_path, early)
    assert early.calls == [("train", 1)]
    assert run(tmp_path, Stages()) == "done"


@pytest.mark.parametrize("damage", ["", "[]", '{"format": 2, "rounds": []}', '{"format": 1, "rounds": [{"round": 1}]}'])
def test_a_damaged_record_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    run(tmp_path, Stages(), rounds=1)
    (tmp_path / "out" / "rounds.json").write_text(damage)
    with pytest.raises(ConfigError, match=r"rounds.json") as refused:
        run(tmp_path, Stages(), rounds=1)
    assert "\n" not in str(refused.value)


def test_other_settings_are_refused_by_name_and_more_rounds_continue(tmp_path: Path) -> None:
    run(tmp_path, Stages(), rounds=1)
    options = {"config": "miniature", "options": {"max_train_steps": STEPS, "learning_rate": 1e-3}}
    for changes, message in (
        ({"images_per_prompt": 6}, "images_per_prompt: 4 -> 6"),
        ({"reference": "following"}, "reference: 'fixed' -> 'following'"),
        ({"evaluation": {"held_out": None}}, "evaluation.held_out: 'brisque' -> None"),
        ({"run": options}, r"run: optimizer.learning_rate: 0.0002 -> 0.001"),
    ):
        stages = Stages()
        with pytest.raises(ConfigError, match=f"holds other rounds, which differ in\n  {message}"):
            run(tmp_path, stages, **{"rounds": 1, **changes})
        assert stages.calls == []
    more = Stages()
    assert run(tmp_path, more, rounds=2, launch={"ranks": 2}) == "done"
    assert more.calls == [(name, 2) for name in IN_A_ROUND]
    with pytest.raises(ConfigError, match="rounds 1: 2 rounds are finished; give that number or more"):
        run(tmp_path, Stages(), rounds=1)


# ---- people's votes ----


def votes_on(folder: Path, number: int, labels: list[float], name: str = "votes.jsonl") -> Path:
    """Vote on the first pairs of a round's page; label 1 prefers the side `first`."""
    results = load_results(folder / "out" / f"round_{number:02d}")
    sides: dict[tuple[int, int], dict[str, Any]] = {}
    for image in results.images:
        sides.setdefault((image.prompt, image.seed), {})[image.model] = image
    rows = []
    for label, pair in zip(labels, sides.values(), strict=False):
        row: dict[str, Any] = {"rater": "Anna", "evaluation": results.evaluation, "label": label}
        for side, model in enumerate(("first", "second")):
            row |= {f"model_{side}": model, f"image_{side}": pair[model].path, f"sha256_{side}": pair[model].sha256}
        rows.append(row)
    return vote_file(folder / name, *rows)


def test_a_round_waits_for_votes_and_goes_on_with_them(tmp_path: Path) -> None:
    stages, lines = Stages(), []
    assert run(tmp_path, stages, scorers=["human"], rounds=1, lines=lines) == "waiting for votes of round 1"
    assert stages.calls == [("draw", 1)]
    assert record(tmp_path)["state"] == "waiting for votes of round 1"
    page = tmp_path / "out" / "round_01" / "page.html"
    assert page.is_file()
    assert any(f"open {page}" in line for line in lines)
    # 2 prompts of 4 images are 4 pairs: first, second, a tie, first
    votes = votes_on(tmp_path, 1, [1, 0, 0.5, 1])
    second = run(tmp_path, stages, scorers=["human"], rounds=2, files=[votes])
    assert second == "waiting for votes of round 2"  # which are other ones
    assert stages.calls[1:] == [("draw", 1), ("train", 1), ("consolidate", 1), ("evaluate", 1), ("draw", 2)]
    rows = pq.read_table(tmp_path / "out" / "round_01" / "pairs" / "pairs.parquet").to_pylist()
    drawn = load_results(tmp_path / "out" / "round_01" / "pairs")
    seeds = {image.sha256: image.seed for image in drawn.images}
    chosen = [row["image_0_uid"] if row["label_0"] == 1 else row["image_1_uid"] for row in rows]
    # the couples are images 0 and 1, and 2 and 3, of each prompt; of the first the left one, of the second the right
    assert [(row["caption"], seeds[uid]) for row, uid in zip(rows, chosen, strict=True)] == [
        ("a red circle", 0),
        ("a red circle", 3),
        ("a blue square", 2),
    ]
    found = record(tmp_path)["rounds"][0]
    assert found["labels_by"] == ["human"]
    assert found["pairs"] == {"pairs": 3, "prompts": 2, "undecided": 1, "rule": "votes"}


def test_votes_may_stand_in_for_one_round_and_belong_to_its_page(tmp_path: Path) -> None:
    named = tmp_path / "later.jsonl"
    changes: dict[str, Any] = {"votes": {2: str(named)}, "rounds": 2}
    assert run(tmp_path, Stages(), **changes) == "waiting for votes of round 2"
    votes_on(tmp_path, 2, [1, 1, 0, 0], name=named.name)
    good = named.read_text()
    named.write_text(good.replace(json.loads(good.splitlines()[0])["evaluation"], "evaluation of round 1"))
    with pytest.raises(DataError, match=r"later.jsonl, line 1 is a vote of evaluation 'evaluation of round 1'"):
        run(tmp_path, Stages(), **changes)
    named.write_text(good)
    stages = Stages()
    assert run(tmp_path, stages, **changes) == "done"
    assert [each["labels_by"] for each in record(tmp_path)["rounds"]] == [["clip"], ["human"]]
    even = votes_on(tmp_path, 2, [0.5])
    (tmp_path / "out" / "round_02" / "pairs" / "pairs.json").unlink()
    place = tmp_path / "out" / "round_02"
    model = prepare(rounds_config(tmp_path, **changes), say=print).run.model
    with pytest.raises(DataError, match="no pair is left; raters are even on all 1 of them"):
        pairs_of_votes(place, place / "pairs", [even], model=model, say=print)
