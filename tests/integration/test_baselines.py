"""Every objective's loss curve is the committed one, so that a change which moves all runs alike is seen.

tests/baselines/renew.py writes the curves again, for a change that is meant to move them. `scripts/test.sh --fast`
takes the curve of dpo alone from here: two launches of two ranks, of which the second resumes.
"""

import pytest
from baseline_cases import OBJECTIVES, read_baselines, train_all, train_in_two_halves
from invariance_cases import STEPS

from ds_dpo.objectives.losses import OBJECTIVES as TABLE

pytestmark = pytest.mark.launch
# Of a loss. Another processor takes other kernels, which round fp32 in another order: without vector instructions
# (ATEN_CPU_CAPABILITY=default, SSE in MKL and oneDNN) the curve that moves most, of ipo, moves by 3e-5. A learning rate
# that is a thousandth larger moves that of dpo by 9e-4.
TOLERANCE = 1e-4
# The loss of linear is the difference of two errors of less than 1, and a thousandth of them: it rounds as they do.
ROUNDING = 2**-23
BASELINES = read_baselines()


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    return train_all(tmp_path_factory.mktemp("runs"))


def test_each_objective_has_a_line_that_moves():
    assert list(BASELINES) == list(OBJECTIVES)
    assert BASELINES.keys() == TABLE.keys()
    for name, losses in BASELINES.items():
        assert len(losses) == STEPS
        assert max(losses) - min(losses) > 10 * TOLERANCE * max(map(abs, losses)), name


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_curve_is_the_committed_one(curves, name):
    assert curves[name] == pytest.approx(BASELINES[name], rel=TOLERANCE, abs=ROUNDING)


@pytest.mark.slow
def test_a_rate_that_is_a_thousandth_larger_is_seen(curves):
    assert curves["control"] != pytest.approx(BASELINES["dpo"], rel=5 * TOLERANCE, abs=0)


def test_two_ranks_that_resume_follow_the_committed_curve(tmp_path):
    assert train_in_two_halves(tmp_path / "run") == pytest.approx(BASELINES["dpo"], rel=TOLERANCE, abs=0)
    assert f"resumed from step {STEPS // 2}" in (tmp_path / "run" / "log.txt").read_text()
