"""Held-out evaluation and the watchdog in real runs: two ranks in one launch, one rank in another."""

import json
import re

import forked
import pytest
from own_pairs_page import make_example
from test_training import ENVIRONMENT, ROOT, arguments, curve, launch, metrics, zero_stage

pytestmark = pytest.mark.launch
HELD_OUT = {"held_out__every_steps": 2, "held_out__split": "validation_unique", "held_out__num_pairs": 3}
# far too fast, so that the preferred images' error rises at once
TOO_FAST = {"learning_rate": "2e-3", "schedule__name": "constant_with_warmup", "schedule__decay_steps": "none"}
WATCH = {
    **HELD_OUT,
    **TOO_FAST,
    "max_train_steps": 6,
    "watchdog__max_rise": 1,  # step 2 is below, step 4 far above
    "watchdog__patience": 1,
    "watchdog__max_interventions": 1,
    "cadence__save_every_steps": 1,
    "cadence__keep_checkpoints": 1,
}

# step 2 is the best: the error rises from there on
BEST = {"cadence__keep_best": "held_out.chosen_difference"}

RATES = [0, 1e-3, 2e-3, 2e-3, 1e-3, 1e-3]  # two steps of warm-up, then half from step 5 on


def case(out, name, *, stage=2, micro=4, **settings):
    return arguments(
        out / name,
        deepspeed_config=f"zero{stage}_fp32_cpu",
        micro_batch_pairs=micro,
        **{"pairs_per_step": 8, "max_train_steps": 4, **settings},
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("held_out")
    two_ranks = [
        case(out, "plain"),
        case(out, "judged", **HELD_OUT),
        case(out, "judged_3", stage=3, micro=2, **HELD_OUT),
        case(out, "resumed", max_train_steps=2, **HELD_OUT),
        case(out, "resumed", **HELD_OUT),
        case(out, "sft", objective__type="sft", max_train_steps=2, **HELD_OUT),
        case(out, "lowered", **WATCH, **BEST, watchdog__action="lower_rate"),
        case(out, "rolled_3", stage=3, **WATCH, watchdog__action="roll_back"),
        case(out, "rolled_2", **WATCH, watchdog__action="roll_back"),
        case(out, "rolled_2", **{**WATCH, "max_train_steps": 7}, watchdog__action="roll_back"),
    ]
    launch(sorted(two_ranks, key=zero_stage), out, ranks=2)
    launch([case(out, "one_rank", micro=8, **HELD_OUT), own_pairs(out)], out, ranks=1)
    return out


def own_pairs(out):
    """The README's example of own pairs, on the miniature: a folder of PNGs, a CSV, and a held-out share."""
    path = make_example("A folder of PNGs and a CSV", out)
    path.write_text(path.read_text().replace("base: sdxl_pickapic", "base: miniature"))
    options = {"held_out__every_steps": 2, "objective__beta": 500, "max_train_steps": 2, "data__cache_dir": out / "c"}
    return [*case(out, "own", micro=8, **options, config=path)]


def evaluations(run):
    return [json.loads(line) for line in (run / "evaluation" / "held_out.jsonl").read_text().splitlines()]


def test_evaluation_leaves_training_as_it_was(runs):
    timed = {"pairs_per_second", "step_seconds", "data_seconds", "peak_memory_gib"}
    plain, judged = (
        [{name: value for name, value in line.items() if name not in timed} for line in metrics(runs / name)]
        for name in ("plain", "judged")
    )
    assert plain == judged


@pytest.mark.parametrize("name", ["judged_3", "one_rank"])
def test_numbers_are_the_same_for_any_ranks_stage_and_micro_batch(runs, name):
    wanted, found = evaluations(runs / "judged"), evaluations(runs / name)
    assert [line["step"] for line in found] == [0, 2, 4]
    assert [line["pairs"] for line in found] == [3, 3, 3]
    for quantity in ("policy_chosen_error", "policy_rejected_error"):
        assert found[0]["overall"][quantity] == pytest.approx(wanted[0]["overall"][quantity], abs=1e-6)
        # the runs themselves differ in last bits after updates
        assert found[2]["overall"][quantity] == pytest.approx(wanted[2]["overall"][quantity], abs=1e-4)
    for mine, other in zip(found[0]["deciles"], wanted[0]["deciles"], strict=True):
        assert mine["timesteps"] == other["timesteps"]
        assert mine["policy_chosen_error"] == pytest.approx(other["policy_chosen_error"], abs=1e-6)


def test_start_is_compared_with_itself_and_then_left(runs):
    lines = evaluations(runs / "judged")
    assert lines[0]["overall"]["margin"] == lines[0]["overall"]["chosen_difference"] == [0, 0, 0]
    assert lines[0]["overall"]["accuracy"][0] == 0.5
    assert lines[0]["overall"]["loss"][0] == pytest.approx(0.6931472)
    assert 0 != abs(lines[2]["overall"]["margin"][0]) < 1e-2
    assert lines[0]["start_chosen_error"] == pytest.approx(lines[0]["overall"]["policy_chosen_error"][0])
    assert 0.01 < lines[0]["start_chosen_error"] < 0.15  # the shipped base's


def test_resumed_run_is_judged_as_an_uninterrupted_one(runs):
    resumed, whole = evaluations(runs / "resumed"), evaluations(runs / "judged")
    assert [{**line, "seconds": 0} for line in resumed] == [{**line, "seconds": 0} for line in whole]


def test_objective_without_a_reference_is_compared_with_its_start(runs):
    first, last = evaluations(runs / "sft")
    assert first["overall"]["policy_chosen_error"] == evaluations(runs / "judged")[0]["overall"]["policy_chosen_error"]
    assert last["overall"]["chosen_difference"][0] == pytest.approx(
        last["overall"]["policy_chosen_error"][0] - first["overall"]["policy_chosen_error"][0]
    )
    assert "loss" not in last["overall"]


def test_own_pairs_are_trained_on_but_for_the_share_that_is_evaluated(runs):
    assert "80 rows, 3 held out, 77 pairs of 77 prompts" in log(runs / "own")
    assert "held out: " in log(runs / "own")
    assert [(line["step"], line["pairs"]) for line in evaluations(runs / "own")] == [(0, 3), (2, 3)]
    assert len(metrics(runs / "own")) == 2


def log(run):
    return (run / "log.txt").read_text()


def test_the_best_checkpoint_is_kept_and_marked_and_its_rise_changes_nothing_else(runs):
    checkpoints = runs / "lowered" / "checkpoints"
    differences = {line["step"]: line["overall"]["chosen_difference"][0] for line in evaluations(runs / "lowered")}
    best = min((step for step in differences if step > 0), key=differences.__getitem__)
    assert best == 2
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_00000002", "step_00000006"]
    mark = json.loads((checkpoints / "best.json").read_text())
    assert mark == {
        "checkpoint": "step_00000002",
        "metric": "held_out.chosen_difference",
        "step": 2,
        "value": differences[2],
    }


def test_lowered_rate_stays_lowered(runs):
    assert curve(runs / "lowered", "learning_rate") == pytest.approx(RATES)
    assert "watchdog, step 4: " in log(runs / "lowered")
    assert "the learning rate is multiplied by 0.5 (0.5 in all" in log(runs / "lowered")


@pytest.mark.parametrize("stage", [2, 3])
def test_rolled_back_run_goes_on_from_before_the_rise_with_new_pairs_at_a_lower_rate(runs, stage):
    run = runs / f"rolled_{stage}"
    assert re.search(r"watchdog, step 4: .*rolled back from step 4 to \S*step_00000002\n", log(run))
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    # steps 3 and 4, done twice: the second time with the pairs that follow those seen so far
    assert [line["pairs_seen"] for line in lines[:6]] == [8, 16, 40, 48, 56, 64]
    assert [line["learning_rate"] for line in lines[2:]] == pytest.approx([1e-3] * (len(lines) - 2))
    aside = [json.loads(line)["step"] for line in (run / "metrics.rolled_back.jsonl").read_text().splitlines()]
    assert aside == [3, 4]
    left, kept = (
        {
            line["step"]: line["overall"]["chosen_difference"][0]
            for line in map(json.loads, path.read_text().splitlines())
        }
        for path in (run / "evaluation" / "held_out.rolled_back.jsonl", run / "evaluation" / "held_out.jsonl")
    )
    assert left.keys() == {4}
    assert kept.keys() >= {0, 2, 4, 6}
    assert kept[4] < 0.8 * left[4]


def test_checkpoints_of_the_rise_are_set_aside_and_what_was_good_is_not_pruned_before(runs):
    """One checkpoint is kept; step 2's was still there at step 4, as the newest before the row."""
    folders = sorted(path.name for path in (runs / "rolled_3" / "checkpoints").iterdir() if path.is_dir())
    assert folders == ["step_00000003.rolled_back", "step_00000006"]


def test_run_resumed_after_a_roll_back_keeps_what_was_learnt_from_it(runs):
    lines = metrics(runs / "rolled_2")
    assert "resumed from step 6, 64 pairs seen" in log(runs / "rolled_2")
    assert log(runs / "rolled_2").count("rolled back from step") == 1
    assert (lines[6]["step"], lines[6]["pairs_seen"]) == (7, 72)
    assert lines[6]["learning_rate"] == pytest.approx(1e-3)


def test_stopped_run_is_saved_and_says_so(tmp_path):
    run = tmp_path / "run"
    options = case(tmp_path, "run", micro=8, **{**WATCH, "watchdog__action": "stop"})
    done = forked.run([str(ROOT / "ds_dpo" / "train.py"), *options], env=ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 2
    (stopped,) = re.findall(r"stopped at step (\d+), which is saved", done.stderr)
    assert (run / "checkpoints" / f"step_{int(stopped):08d}" / "manifest.json").exists()
    assert metrics(run)[-1]["step"] == int(stopped) == 4
