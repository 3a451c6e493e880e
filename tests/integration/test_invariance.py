"""One curve however a run is cut, computed or fed, and ln 2 at its first step wherever the reference lives.

One launch each of one, two and four ranks runs all cases; the tests look at what they left.
"""

import json
import math

import pytest
from invariance_cases import BASELINES, CASES, CONTROL, SOME_BLOCKS, STEP_ONE, make_caches, residuals
from launching import curve, launch, metrics, zero_stage

pytestmark = pytest.mark.launch
ALL = {**BASELINES, **CASES, "control": CONTROL, **STEP_ONE}
# what a checkpoint keeps of an objective's statistic shows as a metric
STATISTICS = {"kto": "baseline", "automatic_beta": "beta"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    make_caches(out, BASELINES["dpo"].arguments(out, "unused"))
    for ranks in (1, 2, 4):
        starts = [case.arguments(out, name) for name, case in ALL.items() if case.ranks == ranks]
        launch(sorted(starts, key=zero_stage), out, ranks=ranks)
    return out


@pytest.mark.parametrize("name", CASES)
def test_a_curve_is_its_baselines(runs, name):
    found = residuals(runs / name, runs / CASES[name].group)
    assert found.are_rounding, found


def test_recomputing_some_blocks_changes_no_bit(runs):
    name = "some_blocks_checkpointing"
    for quantity in ("loss", "gradient_norm", "chosen_difference"):
        assert curve(runs / name, quantity) == curve(runs / "dpo", quantity)
    assert f"gradient checkpointing: {SOME_BLOCKS} of 11 blocks" in (runs / name / "log.txt").read_text()
    free = (runs / "lora_2_ranks_zero3_checkpointing" / "log.txt").read_text()
    assert "gradient checkpointing: 0 of 11 blocks" in free
    assert "that are free for them" in free


@pytest.mark.parametrize("group", BASELINES)
def test_baselines_move(runs, group):
    losses = curve(runs / group)
    assert max(losses) - min(losses) > 0.01, "a curve that does not move compares nothing"


def test_a_rate_that_is_a_thousandth_larger_is_seen(runs):
    found = residuals(runs / "control", runs / "dpo")
    assert not found.are_rounding, found


@pytest.mark.parametrize("group", STATISTICS)
def test_a_statistic_moves_and_is_the_same_for_any_cut(runs, group):
    expected = curve(runs / group, STATISTICS[group])
    assert len(set(expected)) > 3
    for name, case in CASES.items():
        if case.group == group:
            assert curve(runs / name, STATISTICS[group]) == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", STEP_ONE)
def test_first_loss_is_ln_2(runs, name):
    (first,) = metrics(runs / name)
    allowed = 1e-4 if "cached" in name else 1e-7
    assert abs(first["loss"] - math.log(2)) <= allowed
    assert "cached" in name or first["chosen_difference"] == first["rejected_difference"] == 0


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if case.stage == 3 and case.ranks > 1])
def test_zero3_really_shards(runs, name):
    """Between passes no parameter is whole, and a rank's parts are its share: of a zero3 reference, too."""
    case = ALL[name]
    models = ["policy", *(["reference"] if case.options.get("reference.residency") == "zero3" else [])]
    held = json.loads((runs / name / "sharding.json").read_text())
    for found in (held[model] for model in models):
        assert found["whole"] == 0
        assert found["elements"] <= found["parts"] * case.ranks < 1.01 * found["elements"]
