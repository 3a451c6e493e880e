"""A run goes on from its checkpoint on other ranks, at another ZeRO stage: with the same state and the same curve.

One launch each of two, four and one rank: every run's first steps are trained in the first, and it is resumed in the
others. What is resumed is compared tensor by tensor with what was saved, and curves with those of uninterrupted runs.
"""

import json

import numpy as np
import pytest
import torch
from invariance_cases import residuals
from launching import ROOT, curve, launch, metrics, spell, zero_stage

from ds_dpo.zero_shards.files import AVERAGE_KINDS
from ds_dpo.zero_shards.reader import open_checkpoint

pytestmark = pytest.mark.launch
RANKS, STEPS = (2, 4, 1), 3  # so many steps on each of these
MICRO_BATCH_PAIRS = {2: 1, 4: 1, 1: 4}  # accumulation: 2, 1, 1
COMMON = {
    "config": "miniature",
    "data.max_rows": 100,
    "batch.pairs_per_step": 4,
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 20,
    "cadence.log_every_steps": STEPS,
    "cadence.keep_checkpoints": 5,
    "cadence.sample_every_steps": "none",
}
# what the runs of a curve have in common; between them all that a checkpoint keeps beside the weights
GROUPS: dict[str, dict[str, object]] = {
    "dpo": {"ema.decay": 0.9, "reference.ema_decay": 0.8},
    "kto": {
        "objective.type": "kto",
        "objective.beta": 500,
        "objective.undesirable_weight": 0.02,
        "reference.refresh_every_steps": 5,
        "model.freeze": "*.attn1.*",
    },
    "lora": {
        "adapter.type": "lora",
        "adapter.rank": 4,
        "optimizer.learning_rate": 1e-2,
        "ema.decay": 0.9,
        "objective.target_gradient_factor": 0.3,
        "objective.gap_decay": 0.8,
        "watchdog.action": "lower_rate",
        "watchdog.max_rise": 1e-9,
        "watchdog.window_steps": 1,
        "watchdog.patience": 1,
        "watchdog.max_interventions": 1,
    },
}
# run -> its group, and DeepSpeed's settings on 2, 4 and 1 ranks
CURVES: dict[str, tuple[str, tuple[str, str, str]]] = {
    "dpo_232": ("dpo", ("zero2_fp32_cpu", "zero3_fp32_cpu", "zero2_fp32_cpu")),
    "dpo_other_settings": ("dpo", ("zero2_shuffled", "zero3_sub_groups", "zero1_offload")),
    "kto_313": ("kto", ("zero3_fp32_cpu", "zero1_fp32_cpu", "zero3_fp32_cpu")),
    "lora_323": ("lora", ("zero3_fp32_cpu", "zero2_fp32_cpu", "zero3_fp32_cpu")),
}
# 16 bit drifts apart within steps: only what is saved and what is resumed are compared
LOW_PRECISION: dict[str, tuple[str, tuple[str, str, str]]] = {
    "bf16_213": ("dpo", ("zero2_bf16", "zero1_bf16", "zero3_bf16_offload")),
    "fp16_232": ("dpo", ("zero2_fp16_loud", "zero3_fp16_loud", "zero2_fp16_loud")),
}
RUNS = {**CURVES, **LOW_PRECISION}
OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
# name -> a shipped file, and what is another in it
SETTINGS: dict[str, tuple[str, dict[str, dict[str, object]]]] = {
    "zero2_shuffled": ("zero2_fp32_cpu", {"zero_optimization": {"round_robin_gradients": True}}),
    "zero3_sub_groups": ("zero3_fp32_cpu", {"zero_optimization": {"sub_group_size": 20000}}),
    "zero1_offload": ("zero1_fp32_cpu", {"zero_optimization": OFFLOAD}),
    # some of the miniature's weights are above the threshold
    "zero3_bf16_offload": ("zero3_bf16", {"zero_optimization": {**OFFLOAD, "stage3_param_persistence_threshold": 500}}),
    # the first updates overflow, and one after the first resume
    "zero2_fp16_loud": ("zero2_fp16", {"fp16": {"initial_scale_power": 15}}),
    "zero3_fp16_loud": ("zero3_fp16", {"fp16": {"initial_scale_power": 15}}),
}
PEAKS = {"lora": 1e-2, "dpo": 2e-4}
QUANTITIES = ("fp32", "exp_avg", "exp_avg_sq", "ema", "reference")
RESUMES = [(name, step) for name in RUNS for step in (STEPS, 2 * STEPS)]


def settings_file(out, name):
    """Return what to give as deepspeed_config: a shipped name, or a file written for this test."""
    if name not in SETTINGS:
        return name
    base, changes = SETTINGS[name]
    content = json.loads((ROOT / "ds_configs" / f"{base}.json").read_text())
    for section, values in changes.items():
        content[section] |= values
    file = out / f"{name}.json"
    file.write_text(json.dumps(content))
    return file


def starts(out, place):
    """Spell what is started on RANKS[place] ranks; on one rank also the runs that are never interrupted."""
    found = []
    for name, (group, settings) in RUNS.items():
        own = {"output_dir": out / name, "deepspeed_config": settings_file(out, settings[place])}
        own |= {"batch.micro_batch_pairs": MICRO_BATCH_PAIRS[RANKS[place]], "max_train_steps": STEPS * (place + 1)}
        found.append(spell({**COMMON, **GROUPS[group], **own}))
    for group, options in GROUPS.items() if RANKS[place] == 1 else ():
        own = {"output_dir": out / group, "deepspeed_config": "zero2_fp32_cpu"}
        own |= {"batch.micro_batch_pairs": MICRO_BATCH_PAIRS[1], "max_train_steps": STEPS * len(RANKS)}
        found.append(spell({**COMMON, **options, **own}))
    return sorted(found, key=zero_stage)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for place, ranks in enumerate(RANKS):
        launch(starts(out, place), out, ranks=ranks, program="elastic_cases.py")
    return out


@pytest.mark.parametrize(("name", "step"), RESUMES)
def test_what_is_resumed_is_what_was_saved(runs, name, step):
    """Each master weight, state of the optimizer and average, frozen weights, and what moves beside them."""
    saved = open_checkpoint(runs / name / "checkpoints" / f"step_{step:08d}")
    live = open_checkpoint(runs / name / "resaved" / f"step_{step:08d}")
    assert (saved.world_size, live.world_size) == {STEPS: (2, 4), 2 * STEPS: (4, 1)}[step]
    kept = [quantity for quantity in QUANTITIES if has(saved, quantity)]
    assert kept == [quantity for quantity in QUANTITIES if has(live, quantity)] == expected_quantities(name)
    is_adapter = RUNS[name][0] == "lora"
    for parameter, placement in saved.parameters.items():
        for quantity in ["fp32"] if placement.is_frozen else kept:
            assert torch.equal(saved.read(parameter, quantity), live.read(parameter, quantity)), (parameter, quantity)
    assert is_adapter or saved.parameters.keys() == live.parameters.keys()
    for kind in AVERAGE_KINDS:
        if saved.has_average(kind):
            assert saved.average_updates(kind) == live.average_updates(kind)
    assert {k: float(v) for k, v in saved.optimizer.scalars.items()} == {
        k: float(v) for k, v in live.optimizer.scalars.items()
    }
    before, after = saved.training(), live.training()
    for field in ("global_steps", "skipped_steps", "global_samples", "rates", "schedule"):
        assert getattr(before, field) == getattr(after, field), field
    if name.startswith("fp16"):
        assert before.loss_scaler == after.loss_scaler


def has(checkpoint, quantity):
    return quantity == "fp32" or checkpoint.has_average(quantity) or quantity in checkpoint.optimizer.elementwise


def expected_quantities(name):
    options = GROUPS[RUNS[name][0]]
    kinds = {"ema": "ema.decay", "reference": "reference.ema_decay"}
    return ["fp32", "exp_avg", "exp_avg_sq", *(kind for kind, field in kinds.items() if field in options)]


@pytest.mark.parametrize(("name", "step"), RESUMES)
def test_every_rank_computes_with_the_masters_rounding(runs, name, step):
    saved = open_checkpoint(runs / name / "checkpoints" / f"step_{step:08d}")
    ranks = {STEPS: 4, 2 * STEPS: 1}[step]
    for rank in range(ranks):
        weights = torch.load(runs / name / "resaved" / f"module_{step}_{rank}.pt", weights_only=True)
        compared = [parameter for parameter in saved.parameters if parameter in weights]
        assert len(compared) == len(saved.parameters)
        for parameter in compared:
            expected = saved.read(parameter).to(weights[parameter].dtype)
            assert torch.equal(weights[parameter], expected), parameter


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_that_of_a_run_that_never_stopped(runs, name):
    found = residuals(runs / name, runs / CURVES[name][0])
    assert found.are_rounding, found
    for quantity in ("learning_rate", "pairs_seen", "reference_chosen_error"):
        assert curve(runs / name, quantity) == pytest.approx(curve(runs / CURVES[name][0], quantity), rel=1e-4)


@pytest.mark.parametrize(("group", "quantity"), [("kto", "baseline"), ("lora", "beta")])
def test_a_statistic_goes_on(runs, group, quantity):
    expected = curve(runs / group, quantity)
    assert expected[STEPS] != expected[0], "what it starts from is not what it goes on from"
    for name, (of, _) in CURVES.items():
        if of == group:
            assert curve(runs / name, quantity) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_runs_do_what_is_to_be_carried(runs):
    """A rate that the watchdog lowered before a resume, a reference refreshed, updates that overflowed."""
    for group in GROUPS:
        losses = curve(runs / group)
        assert max(losses) - min(losses) > 0.01, "a curve that does not move compares nothing"
    rates, plain = (np.array(curve(runs / group, "learning_rate")) / peak for group, peak in PEAKS.items())
    assert rates[0] == plain[0]
    assert rates[STEPS:] == pytest.approx(plain[STEPS:] / 2), "lowered once, before the first resume"
    skipped = curve(runs / "fp16_232", "skipped_steps")
    assert 0 < skipped[STEPS - 1] < skipped[-1] < STEPS * 2, "some updates overflow before and after a resume"
    assert np.all(np.diff(curve(runs / "fp16_232", "loss_scale")) <= 0)


def test_the_log_says_what_was_saved_and_what_this_start_has(runs):
    log = (runs / "dpo_232" / "log.txt").read_text()
    assert log.count("was saved by 2 rank(s) at ZeRO stage 2, but this start has 4 rank(s) at ZeRO stage 3") == 1
    assert log.count("was saved by 4 rank(s) at ZeRO stage 3, but this start has 1 rank(s) at ZeRO stage 2") == 1
    assert [line["step"] for line in metrics(runs / "dpo_232")] == list(range(1, 3 * STEPS + 1))
