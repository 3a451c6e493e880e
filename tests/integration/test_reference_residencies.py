"""References beside a policy of every ZeRO stage: shared by all ranks, the policy without its adapter, refreshed."""

import json
import math
import os
from pathlib import Path

import forked
import pytest
import torch
from references_worker import CASES, MOVING, MOVING_RESUMED, REFRESHED
from safetensors import safe_open

from ds_dpo.config.load import load_config
from ds_dpo.models.loading import load_denoiser
from ds_dpo.storage.manifest import verify_manifest
from ds_dpo.zero_shards.reader import open_checkpoint

pytestmark = pytest.mark.launch
HERE = Path(__file__).parent
NAMES = [f"{stage}_{precision}" for stage, precision in CASES]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What the worker left."""
    out = tmp_path_factory.mktemp("references")
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(HERE.parent.parent),
    }
    done = forked.run([str(HERE / "references_worker.py"), str(out)], env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def found(out):
    """What each rank saw of a shared reference, by case."""
    return [json.loads((out / f"{rank}.json").read_text())["shared"] for rank in (0, 1)]


@pytest.fixture(scope="module")
def adapters(out):
    """What each rank saw of a policy without its adapter, by case."""
    return [json.loads((out / f"{rank}.json").read_text())["adapter"] for rank in (0, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_reference_predicts_to_the_bit_as_a_whole_copy_and_as_the_fresh_policy(found, name):
    for rank in found:
        assert rank[name]["to_plain"] == 0
        assert rank[name]["to_policy"] == 0
        assert rank[name]["to_plain_after_training"] == 0
        assert rank[name]["to_policy_after_training"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_each_rank_holds_half_of_it_and_no_gradient(found, name):
    for rank in found:
        assert rank[name]["whole_elements"] == 0
        # a parameter of an odd number of elements is padded
        half = rank[name]["all_elements"] / 2
        assert half <= rank[name]["own_elements"] < 1.01 * half
        assert not rank[name]["requires_grad"]


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_on_one_rank_is_told_by_all(found, name):
    for rank in found:
        assert "weights have changed while the policy was trained (rank 1: checksum" in rank[name]["error"]


@pytest.mark.parametrize("name", NAMES)
def test_the_first_module_that_differs_is_found_in_sharded_models(found, adapters, name):
    """One bit of rank 1's part of the reference's first convolution is flipped; then an adapter has been trained."""
    for rank in (0, 1):
        before, flipped = found[rank][name]["first_difference"]
        assert before is None
        assert flipped.startswith("the first module that differs is conv_in (Conv2d): it reads the same values")
        assert "weights: its weight has other values in the policy than in the reference" in flipped
        fresh, trained = adapters[rank][name]["first_difference"]
        assert fresh is None
        assert trained.endswith("weights: its low-rank layers in the policy change its output")


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_without_its_adapter_stays_what_it_started_from_to_the_bit(adapters, name):
    for rank in adapters:
        assert rank[name]["to_plain"] == [0, 0, 0]
        # the first update has the rate 0 of a warm-up
        assert rank[name]["to_policy"][0] == 0
        assert rank[name]["to_policy"][-1] > 0
        assert rank[name]["trains"]


def steps_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("stage", "precision"), REFRESHED)
def test_a_refreshed_reference_is_the_policy_to_the_bit(out, stage, precision):
    steps = steps_of(out / f"whole_{stage}_{precision}")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        # after steps 2 and 4 both predict alike, as at the start; in between they do not
        is_alike = step["step"] in (1, 3, 5)
        assert (step["chosen_difference"] == 0 and step["rejected_difference"] == 0) == is_alike
        assert (step["loss"] == pytest.approx(math.log(2), abs=1e-7)) == is_alike


@pytest.mark.parametrize(("stage", "precision"), REFRESHED)
def test_a_resumed_run_goes_on_with_the_refreshed_reference(out, stage, precision):
    whole, resumed = (steps_of(out / f"{kind}_{stage}_{precision}") for kind in ("whole", "resumed"))
    assert [step["step"] for step in resumed] == [1, 2, 3, 4, 5]
    for one, other in zip(whole, resumed, strict=True):
        for quantity in ("loss", "chosen_difference", "rejected_difference"):
            assert one[quantity] == other[quantity]
    # step 4 was compared with the reference of step 2, which a checkpoint of step 3 has
    assert whole[3]["chosen_difference"] != 0


def test_the_references_weights_are_of_the_checkpoint_and_no_part_of_what_is_exported(out):
    stage, precision = REFRESHED[0]
    folder = out / f"whole_{stage}_{precision}" / "checkpoints" / "step_00000005"
    assert "reference.safetensors" in verify_manifest(folder).files
    checkpoint = open_checkpoint(folder)
    with safe_open(folder / "reference.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(checkpoint.parameters)
        # that of step 4, which training has left by one step
        assert any(
            (file.get_tensor(name) != checkpoint.read(name).to(torch.bfloat16)).any() for name in checkpoint.parameters
        )


def moving_name(stage, precision, residency):
    return f"{stage}_{precision}_{residency}"


@pytest.mark.parametrize("case", MOVING)
def test_a_moving_reference_is_the_average_of_itself_and_the_policy(out, case):
    """Of the miniature's own weights and the masters of each step, on two ranks, whatever divides them."""
    folders = [out / f"whole_{moving_name(*case)}" / "checkpoints" / f"step_{step:08d}" for step in range(1, 6)]
    start = load_denoiser(load_config(["--config", "miniature"]).config.model, dtype=torch.float32).state_dict()
    dtype = torch.bfloat16 if case[1] == "bf16" else torch.float32
    expected = {name: weight.to(dtype).double() for name, weight in start.items()}
    for folder in folders:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.parameters:
            expected[name] = 0.5 * expected[name] + 0.5 * checkpoint.read(name).double()
            found = checkpoint.read(name, "reference").double()
            assert torch.allclose(found, expected[name], rtol=1e-6, atol=1e-7), (folder.name, name)


@pytest.mark.parametrize("case", MOVING_RESUMED)
def test_a_resumed_run_goes_on_with_the_moving_reference_to_the_bit(out, case):
    whole, resumed = (steps_of(out / f"{kind}_{moving_name(*case)}") for kind in ("whole", "resumed"))
    assert [step["step"] for step in resumed] == [1, 2, 3, 4, 5]
    for one, other in zip(whole, resumed, strict=True):
        for quantity in ("loss", "chosen_difference", "rejected_difference", "reference_chosen_error"):
            assert one[quantity] == other[quantity]
    assert whole[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert all(step["chosen_difference"] != 0 for step in whole[1:])


def test_a_moving_reference_computes_the_same_wherever_its_weights_are(out):
    runs = [steps_of(out / f"whole_{moving_name(*case)}") for case in MOVING if case[:2] == (2, "fp32_cpu")]
    assert len(runs) == 3
    for quantity in ("loss", "reference_chosen_error", "reference_rejected_error"):
        first, *others = [[step[quantity] for step in steps] for steps in runs]
        assert all(other == first for other in others)
    assert len(set(first)) > 3
