"""Numbers of previous whole steps: worked out by hand, the same for every cut of a step, and kept by checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_step import ElementwiseUNet, only, random_pairs, step_of

from ds_dpo.config.objective_section import ObjectiveSection
from ds_dpo.config.objectives import AlphaConfig, DpoConfig, KtoConfig, SdpoConfig
from ds_dpo.objectives.losses import OBJECTIVES, with_terms
from ds_dpo.objectives.statistics import AutomaticBeta, KtoBaseline, MeanProbability, ObjectiveStatistic
from ds_dpo.run_folder.metrics import METRICS, StepSums

KTO = KtoConfig(beta=200)
AUTOMATIC = DpoConfig(beta=100, target_gradient_factor=0.2, beta_min=1, beta_max=1e6, gap_decay=0.5)
ALPHA = AlphaConfig(beta=200)
SAFEGUARDED = SdpoConfig(beta=100, target_gradient_factor=0.3, beta_min=1, beta_max=1e6)


def statistic_of(config: ObjectiveSection) -> ObjectiveStatistic:
    kind = OBJECTIVES[config.type].statistic
    assert kind is not None
    statistic = kind.of(config)
    assert statistic is not None
    return statistic


def gaps(*values: float) -> list[dict[str, float]]:
    return [{"absolute_margin": value} for value in values]


def betas_after(statistic: ObjectiveStatistic, steps: list[dict[str, float]]) -> list[float]:
    """What each step used, as it is logged, and what the next one would use."""
    used = [statistic.after_step(number, metrics)["beta"] for number, metrics in enumerate(steps, start=1)]
    return [*used, statistic.options()["beta"]]


def test_kto_s_baseline_is_the_mean_of_the_step_before_and_never_below_0() -> None:
    baseline = KtoBaseline()
    assert baseline.options() == {"baseline": 0}
    # g is minus the difference: means 0.01 and 0.03, so 0.02
    assert baseline.after_step(1, {"chosen_difference": -0.01, "rejected_difference": -0.03}) == {"baseline": 0}
    assert baseline.options() == {"baseline": pytest.approx(0.02)}
    logged = baseline.after_step(2, {"chosen_difference": math.nan, "rejected_difference": 0.0})
    assert logged == {"baseline": pytest.approx(0.02)}
    assert baseline.options() == {"baseline": pytest.approx(0.02)}, "what is not finite leaves it as it was"
    baseline.after_step(3, {"chosen_difference": 0.05, "rejected_difference": -0.01})
    assert baseline.options() == {"baseline": 0}


def test_alpha_s_mean_probability_is_that_of_the_step_before() -> None:
    mean = MeanProbability()
    assert mean.options() == {"mean_probability": 0.5}, "policy and reference are equal in the first step"
    assert mean.after_step(1, {"label_probability": 0.625}) == {"mean_probability": 0.5}
    assert mean.after_step(2, {"label_probability": math.nan}) == {"mean_probability": 0.625}
    assert mean.options() == {"mean_probability": 0.625}, "what is not finite leaves it as it was"


def test_automatic_beta_gives_the_mean_gap_its_gradient_factor() -> None:
    beta = statistic_of(DpoConfig(beta=500, target_gradient_factor=0.2, gap_decay=0.5))
    start, untrained, first, second = betas_after(beta, gaps(0.0, 0.004, 0.008))
    assert start == untrained == 500, "a gap of 0, that of the first step, says nothing"
    for found, mean_gap in ((first, 0.004), (second, 0.5 * 0.004 + 0.5 * 0.008)):
        assert found == pytest.approx(2 * math.log(0.8 / 0.2) / mean_gap)
        # the pair that is told apart by the mean gap: u = beta/2 gap, and sigmoid(-u) is the factor
        assert 1 / (1 + math.exp(found / 2 * mean_gap)) == pytest.approx(0.2)


def test_automatic_beta_stays_within_its_bounds_and_forgets_what_is_not_finite() -> None:
    within = {"target_gradient_factor": 0.2, "gap_decay": 0.0}
    assert betas_after(statistic_of(DpoConfig(beta=500, **within)), gaps(1e-9, 1.0, 0.004)) == [
        500,
        5000,
        50,
        pytest.approx(2 * math.log(4) / 0.004),
    ]
    narrow = statistic_of(DpoConfig(beta=500, beta_min=400, beta_max=600, **within))
    assert betas_after(narrow, gaps(1e-9, 1.0, math.nan, math.inf)) == [500, 600, 400, 400, 400]


def test_a_fixed_beta_has_no_statistic() -> None:
    assert AutomaticBeta.of(DpoConfig(beta=500)) is None


def trace(
    config: ObjectiveSection,
    cut: int,
    *,
    steps: int = 6,
    resume_after: int | None = None,
) -> list[dict[str, float]]:
    """Train on 4 pairs a step, cut into micro-batches of so many; returns each step's metrics."""
    policy, reference, statistic = ElementwiseUNet(1), ElementwiseUNet(1), statistic_of(config)
    # the further term lets all errors fall, so that kto's baseline is not 0 throughout
    objective = with_terms(OBJECTIVES[config.type], sft_weight=100.0, anchor_weight=0.0)
    rows = []
    for number in range(steps):
        if number == resume_after:
            kept = json.loads(json.dumps(statistic.state()))  # as a checkpoint has it
            statistic = statistic_of(config)
            statistic.restore(kept, Path())
        step = step_of(objective, config.loss_options(), policy=policy, reference=reference, statistic=statistic)
        whole, sums = random_pairs(4, seed=number), StepSums()
        for first in range(0, 4, cut):
            output = step(only(whole, slice(first, first + cut)))
            sums.add(output.pair_quantities)
            (output.loss * cut / 4).backward()
        with torch.no_grad():
            assert policy.weight.grad is not None
            policy.weight -= 0.2 * policy.weight.grad / policy.weight.grad.norm()
        policy.weight.grad = None
        means, _ = sums.reduce(counters={})
        rows.append({**means, **statistic.after_step(number + 1, means)})
        assert rows[-1].keys() <= METRICS.keys()
    return rows


def assert_same(first: list[dict[str, float]], second: list[dict[str, float]], *, rel: float) -> None:
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-8)


@pytest.mark.parametrize(
    ("config", "name"), [(KTO, "baseline"), (AUTOMATIC, "beta"), (SAFEGUARDED, "beta"), (ALPHA, "mean_probability")]
)
def test_a_run_is_the_same_however_its_steps_are_cut(config: ObjectiveSection, name: str) -> None:
    whole = trace(config, cut=4)
    assert len({row[name] for row in whole}) > 3, "the statistic must move for the test to see anything"
    for cut in (2, 1):
        assert_same(trace(config, cut=cut), whole, rel=1e-4)


@pytest.mark.parametrize("config", [KTO, AUTOMATIC, SAFEGUARDED, ALPHA])
def test_a_resumed_run_goes_on_with_what_it_had(config: ObjectiveSection) -> None:
    assert trace(config, cut=2, resume_after=3) == trace(config, cut=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"beta_min": 100},
            "objective.beta_min 100 has no effect on a fixed beta; also set objective.target_gradient_factor",
        ),
        ({"gap_decay": 0.5}, "objective.gap_decay 0.5 has no effect"),
        (
            {"target_gradient_factor": 0.2, "beta_min": 900},
            "objective.beta 500, at which automatic beta starts, must be",
        ),
        ({"target_gradient_factor": 0.2, "beta_max": 90}, "must be from beta_min 50 to beta_max 90"),
        ({"target_gradient_factor": 0.5}, "less than 0.5"),
    ],
)
def test_options_that_do_not_fit_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DpoConfig(beta=500, **fields)
