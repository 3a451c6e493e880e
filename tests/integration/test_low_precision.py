"""Real runs in bf16 and fp16: every objective stays finite, and an update that overflows costs that update alone."""

import json
import math

import pytest
from launching import ROOT, curve, launch, metrics, spell, zero_stage

from ds_dpo.config.objectives import OBJECTIVE_SECTIONS

pytestmark = pytest.mark.launch
STEPS, STOP_AT = 8, 3
COMMON = {
    "config": "miniature",
    "max_train_steps": STEPS,
    "batch.pairs_per_step": 2,
    "batch.micro_batch_pairs": 1,
    "schedule.decay_steps": 20,
    "schedule.warmup_steps": 0,
    "cadence.sample_every_steps": "none",
}
QUIET_SCALE_POWER, LOUD_SCALE_POWER = 4, 18


def scaled_settings(folder, name, *, scale_power):
    """Write the shipped fp16 settings with another first loss scale; returns the file."""
    settings = json.loads((ROOT / "ds_configs" / "zero2_fp16.json").read_text())
    settings["fp16"]["initial_scale_power"] = scale_power
    file = folder / f"zero2_fp16_{name}.json"
    file.write_text(json.dumps(settings))
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    quiet = scaled_settings(out, "quiet", scale_power=QUIET_SCALE_POWER)
    loud = scaled_settings(out, "loud", scale_power=LOUD_SCALE_POWER)
    cases = []
    for precision, settings in {"bf16": "zero2_bf16", "fp16": quiet}.items():
        for objective, section in OBJECTIVE_SECTIONS.items():
            own = {"objective.type": objective, "deepspeed_config": settings, "max_train_steps": 3}
            if "beta" in section.model_fields:
                own["objective.beta"] = 0.5 if objective == "dspo" else 500  # dspo's is its target's shift, too
            cases.append(spell({**COMMON, "output_dir": out / f"{objective}_{precision}", **own}))
    cases.append(spell({**COMMON, "output_dir": out / "quiet", "deepspeed_config": quiet}))
    cases.append(spell({**COMMON, "output_dir": out / "loud", "deepspeed_config": loud}))
    for steps in (STOP_AT, STEPS):
        own = {"output_dir": out / "resumed", "deepspeed_config": loud, "max_train_steps": steps}
        cases.append(spell({**COMMON, **own}))
    launch(sorted(cases, key=zero_stage), out, ranks=1)
    return out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("objective", OBJECTIVE_SECTIONS)
def test_every_objective_trains_without_a_number_that_is_not_finite(runs, objective, precision):
    lines = metrics(runs / f"{objective}_{precision}")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {line["skipped_steps"] for line in lines} == {0}, "an update that is left out tries nothing"


def skipped(run):
    """Steps whose update was left out."""
    return [line["step"] for line in metrics(run) if "gradient_norm" not in line]


def test_overflowing_updates_are_left_out_and_counted(runs):
    assert skipped(runs / "quiet") == []
    assert set(curve(runs / "quiet", "skipped_steps")) == {0}
    left_out = skipped(runs / "loud")
    assert left_out[: STOP_AT + 1] == list(range(1, STOP_AT + 2)), "the run that stops must stop between overflows"
    assert len(left_out) <= STEPS - 2, "some updates must be applied"
    counts = [sum(other <= step for other in left_out) for step in range(1, STEPS + 1)]
    assert curve(runs / "loud", "skipped_steps") == counts
    # the shipped hysteresis of 2 lets the first one pass; each further one halves the scale
    assert curve(runs / "loud", "loss_scale") == [2.0 ** (LOUD_SCALE_POWER - max(count - 1, 0)) for count in counts]


def test_an_overflow_leaves_weights_and_learning_rate_as_they_were(runs):
    lines = metrics(runs / "loud")
    applied = [line for line in lines if "gradient_norm" in line]
    untouched = lines[: int(applied[0]["step"])]
    assert {line["chosen_difference"] for line in untouched} == {0.0}
    assert [line["loss"] for line in untouched] == pytest.approx([math.log(2)] * len(untouched), abs=1e-7)
    assert lines[len(untouched)]["chosen_difference"] != 0.0
    rates = [line["learning_rate"] for line in applied]
    assert rates == curve(runs / "quiet", "learning_rate")[: len(rates)]
    assert len(set(rates)) == len(rates)


def test_an_overflow_leaves_the_order_of_data_as_it_was(runs):
    """The frozen reference's errors of a step tell its pairs, timesteps and noise: they know nothing of updates."""
    for name in ("reference_chosen_error", "reference_rejected_error"):
        loud, quiet = curve(runs / "loud", name), curve(runs / "quiet", name)
        assert loud == pytest.approx(quiet, abs=1e-6)
        assert len({round(value, 4) for value in quiet}) == STEPS, "steps that are alike compare nothing"
    assert curve(runs / "loud", "pairs_seen") == curve(runs / "quiet", "pairs_seen")


def test_a_run_that_stops_between_overflows_goes_on_as_if_it_had_not(runs):
    for name in ("loss", "loss_scale", "skipped_steps", "learning_rate", "reference_chosen_error"):
        assert curve(runs / "resumed", name) == curve(runs / "loud", name)
