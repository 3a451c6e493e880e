"""Runs whose policy starts from another run's weights while the reference stays: one launch on two ranks."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.storage.manifest import read_manifest
from ds_dpo.zero_shards.reader import open_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from launching import curve, launch, spell

pytestmark = pytest.mark.launch
BETA = 500
SETTINGS = {
    "config": "miniature",
    "deepspeed_config": "zero2_fp32_cpu",
    "pairs_per_step": 2,
    "micro_batch_pairs": 1,
    "objective.beta": BETA,
    "learning_rate": 1e-3,
    "schedule.name": "constant_with_warmup",
    "schedule.warmup_steps": 1,  # the first update has the rate 0: the first checkpoint has the weights of the start
    "max_train_steps": 1,
    "cadence.sample_every_steps": "none",
}
LORA = {"adapter.type": "lora", "adapter.rank": 2, "reference.residency": "adapter"}
HELD_OUT = {"held_out.every_steps": 1, "held_out.split": "validation_unique", "held_out.num_pairs": 2}
PART = {"model.train": "*.attn2.*"}
STARTS = {
    "from_1": {"deepspeed_config": "zero1_bf16", **PART},
    "from_2": {"reference.residency": "cpu", "ema.decay": 0.5, **HELD_OUT},
    "from_3": {"deepspeed_config": "zero3_fp32_cpu", "reference.residency": "zero3", **PART},
}


def case(out, name, **settings):
    given = {text.replace("__", "."): value for text, value in settings.items()}
    return spell({**SETTINGS, "output_dir": out / name, **given})


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("starts")
    other, lora = out / "other", out / "lora"
    cases = [
        case(out, "other", max_train_steps=2),
        case(out, "lora", max_train_steps=2, **LORA),
        case(out, "plain"),
        case(out, "moved", model__denoiser_init=other, **HELD_OUT),
        *(case(out, name, **{"model.policy_init": other, **each}) for name, each in STARTS.items()),
        case(out, "from_lora", **{"model.policy_init": lora, **LORA, "deepspeed_config": "zero3_fp32_cpu"}),
    ]
    # ZeRO-3 replaces torch's linear for the rest of a process
    cases.insert(-2, [f"--move={other}={out / 'gone'}"])
    cases.insert(-2, case(out, "from_2", model__policy_init=other, max_train_steps=2, **STARTS["from_2"]))
    cases.insert(-2, [f"--move={out / 'gone'}={other}"])
    launch(cases, out, ranks=2, program="policy_start_cases.py")
    return out


def checkpoint(run):
    """The newest checkpoint of a run that others start from, the first one of those."""
    return run / "checkpoints" / ("step_00000002" if run.name in ("other", "lora") else "step_00000001")


def firsts(run):
    """The pairs of the first step by their ids, each with its quantities."""
    found = {}
    for rank in (0, 1):
        first = json.loads((run / f"first_{rank}.json").read_text())
        (pair,) = first.pop("pair_ids")
        found[pair] = {name: values[0] for name, values in first.items()}
    return found


@pytest.mark.parametrize("name", STARTS)
def test_the_policy_starts_from_the_other_runs_masters_to_the_bit(out, name):
    other, own = open_checkpoint(checkpoint(out / "other")), open_checkpoint(checkpoint(out / name))
    assert set(own.parameters) == set(other.parameters)
    is_frozen = {key: placement.is_frozen for key, placement in own.parameters.items()}
    assert any(is_frozen.values()) == ("model.train" in STARTS[name])
    for key in own.parameters:
        expected = other.read(key)
        if is_frozen[key] and name == "from_1":  # the module alone has it, in bf16
            expected = expected.bfloat16().float()
        assert torch.equal(own.read(key), expected), key


def test_a_moving_average_begins_with_them(out):
    other, own = open_checkpoint(checkpoint(out / "other")), open_checkpoint(checkpoint(out / "from_2"))
    assert all(torch.equal(own.read(key, "ema"), other.read(key)) for key in own.parameters)


def test_the_first_loss_follows_from_the_errors_of_both_models(out):
    """Two other runs on the same pairs have their errors: one from the base, one whose reference is moved as well."""
    base, other = firsts(out / "plain"), firsts(out / "moved")
    found = firsts(out / "from_2")
    assert set(found) == set(base) == set(other)
    for pair, own in found.items():
        chosen, rejected = (
            other[pair][f"policy_{image}_error"] - base[pair][f"policy_{image}_error"]
            for image in ("chosen", "rejected")
        )
        for image in ("chosen", "rejected"):
            assert own[f"policy_{image}_error"] == other[pair][f"policy_{image}_error"]
            assert own[f"reference_{image}_error"] == pytest.approx(base[pair][f"policy_{image}_error"], rel=1e-5)
        expected = math.log1p(math.exp(BETA / 2 * (chosen - rejected)))
        assert own["loss"] == pytest.approx(expected, rel=1e-3)
        assert abs(own["loss"] - math.log(2)) > 1e-3
    assert curve(out / "from_2")[0] == pytest.approx(sum(each["loss"] for each in found.values()) / 2, rel=1e-6)
    assert curve(out / "moved")[0] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("name", ["from_1", "from_3"])
def test_the_reference_stays_the_base_in_other_layouts_too(out, name):
    tolerance = 0.05 if name == "from_1" else 1e-4  # bf16
    for pair, own in firsts(out / name).items():
        for side, run in (("reference", "plain"), ("policy", "moved")):
            for image in ("chosen", "rejected"):
                expected = firsts(out / run)[pair][f"policy_{image}_error"]
                assert own[f"{side}_{image}_error"] == pytest.approx(expected, rel=tolerance)


def test_an_adapter_goes_on_from_another_runs_and_its_base_stays(out):
    other, own = open_checkpoint(checkpoint(out / "lora")), open_checkpoint(checkpoint(out / "from_lora"))
    assert set(own.parameters) == set(other.parameters)
    assert all(torch.equal(own.read(key), other.read(key)) for key in own.parameters)
    assert any(own.read(key).abs().max() > 0 for key in own.parameters if ".lora_B." in key)
    base = firsts(out / "plain")
    for pair, found in firsts(out / "from_lora").items():
        for image in ("chosen", "rejected"):
            assert found[f"reference_{image}_error"] == pytest.approx(base[pair][f"policy_{image}_error"], rel=1e-5)
            assert found[f"policy_{image}_error"] != found[f"reference_{image}_error"]


def test_held_out_pairs_are_compared_with_the_reference_from_the_first_evaluation(out):
    lines = (out / "from_2" / "evaluation" / "held_out.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["step"] == 0
    assert first["start_step"] == 0
    moved = json.loads((out / "moved" / "evaluation" / "held_out.jsonl").read_text().splitlines()[0])
    assert moved["overall"]["chosen_difference"][0] == 0
    assert first["overall"]["chosen_difference"][0] != 0


def test_the_preflight_compares_both_with_the_references_weights(out):
    log = (out / "from_2" / "log.txt").read_text()
    same = log.index("preflight: policy and reference predict exactly the same (largest difference 0)")
    assert same < log.index(f"policy: starts from model.policy_init {checkpoint(out / 'other')}")
    assert "the reference stays ds_dpo://assets/miniature/model" in log


def test_a_run_resumes_without_the_weights_that_it_started_from(out):
    run = out / "from_2"
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == [1, 2]
    first, second = (read_manifest(path).run for path in sorted((run / "checkpoints").glob("step_*")))
    assert first["config"]["model.policy_init"] == str(checkpoint(out / "other"))
    assert first["config"] == second["config"]
    assert first["models"]["policy"] == second["models"]["policy"]
    assert len(first["models"]["policy"]) == 64


def test_the_base_of_a_run_is_the_miniature_and_the_other_run_is_not(out):
    """Otherwise the tests above would compare equal weights."""
    unet = UNet2DConditionModel.from_pretrained(resolve_asset("ds_dpo://assets/miniature/model/unet"))
    other, plain = open_checkpoint(checkpoint(out / "other")), open_checkpoint(checkpoint(out / "plain"))
    for key, tensor in unet.state_dict().items():
        assert torch.equal(plain.read(key), tensor.float())
    assert any(not torch.equal(other.read(key), tensor.float()) for key, tensor in unet.state_dict().items())
