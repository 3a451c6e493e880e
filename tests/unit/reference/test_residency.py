"""The watch over a reference's weights, and the reference that follows the policy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ds_dpo.errors import CheckpointError, ReferenceChangedError
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.reference import FrozenCopy, PolicyWithoutAdapter
from ds_dpo.reference.refresh import ReferenceRefresh
from ds_dpo.reference.residency import ReferenceWatch
from ds_dpo.storage.state_files import write_files


class EngineStandIn:
    """What of an engine a refresh needs."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy

    def copy_weights_to(self, module: nn.Module) -> None:
        module.load_state_dict(self._policy.state_dict())


class Run:
    """A policy, its copy, and a refresh after every second step."""

    def __init__(self) -> None:
        self.policy = nn.Linear(3, 2)
        self.reference = FrozenCopy(self.policy, predict=predict_by_unet, dtype=torch.float32, device="cpu")
        self.watch = ReferenceWatch(self.reference, policy=self.policy)
        self.lines: list[str] = []
        self.refresh = ReferenceRefresh(
            self.reference,
            engine=EngineStandIn(self.policy),
            watch=self.watch,
            every_steps=2,
            say=self.lines.append,
        )

    def train(self, *steps: int) -> None:
        for step in steps:
            with torch.no_grad():
                self.policy.weight.fill_(step)
            assert self.refresh.after_step(step, {}) == {}


def flip_a_bit(tensor: Tensor) -> None:
    tensor.detach().view(torch.uint8)[0, 0] ^= 1


def test_one_flipped_bit_of_the_reference_is_told() -> None:
    run = Run()
    run.watch.require_unchanged()
    flip_a_bit(run.reference.module.weight)
    with pytest.raises(ReferenceChangedError, match=r"have changed while the policy was trained \(rank 0: checksum"):
        run.watch.require_unchanged()
    run.watch.accept()
    run.watch.require_unchanged()


def test_memory_shared_with_the_policy_is_found_before_training() -> None:
    run = Run()
    run.reference.module.weight.data = run.policy.weight.data
    with pytest.raises(AssertionError, match="shares storage with the policy: weight"):
        ReferenceWatch(run.reference, policy=run.policy)


def test_a_base_that_is_trained_beside_its_adapter_is_told() -> None:
    policy = nn.ModuleDict({"base": nn.Linear(1, 1), "lora_A": nn.Linear(1, 1)})
    watch = ReferenceWatch(PolicyWithoutAdapter(policy, predict=predict_by_unet), policy=policy)
    with torch.no_grad():
        policy["lora_A"].weight.add_(1)
    watch.require_unchanged()
    with torch.no_grad():
        policy["base"].weight.add_(1)
    with pytest.raises(ReferenceChangedError):
        watch.require_unchanged()


def test_the_reference_follows_at_every_second_step() -> None:
    run = Run()
    start = run.reference.module.weight.clone()
    run.train(1)
    assert torch.equal(run.reference.module.weight, start)
    run.train(2, 3)
    assert (run.reference.module.weight == 2).all()
    run.train(4)
    assert (run.reference.module.weight == 4).all()
    assert [line.split()[-1] for line in run.lines] == ["2", "4"]
    assert not run.reference.module.weight.requires_grad
    run.watch.require_unchanged()


def test_a_change_between_two_refreshes_is_not_covered_up() -> None:
    run = Run()
    run.train(1)
    flip_a_bit(run.reference.module.weight)
    with pytest.raises(ReferenceChangedError):
        run.train(2)


def test_a_checkpoint_brings_the_reference_back(tmp_path: Path) -> None:
    run = Run()
    run.train(1, 2, 3)
    write_files(run.refresh.files(), tmp_path)
    assert (load_file(tmp_path / "reference.safetensors")["weight"] == 2).all()
    resumed = Run()
    resumed.refresh.restore(run.refresh.state(), tmp_path)
    assert torch.equal(resumed.reference.module.weight, run.reference.module.weight)
    assert torch.equal(resumed.reference.module.bias, run.reference.module.bias)
    resumed.watch.require_unchanged()


def unfitting() -> Iterator[tuple[dict[str, Tensor], str]]:
    good = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    yield {**good, "more": torch.zeros(1)}, "tensors are not those"
    yield {"weight": good["weight"]}, "tensors are not those"
    yield {**good, "bias": torch.zeros(3)}, r"bias is torch.float32 \(3,\), the reference's is torch.float32 \(2,\)"
    yield {**good, "bias": torch.zeros(2).bfloat16()}, "bias is torch.bfloat16"


@pytest.mark.parametrize(("tensors", "message"), unfitting())
def test_weights_of_another_reference_are_refused(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, tmp_path / "reference.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Run().refresh.restore({}, tmp_path)


def test_a_missing_or_torn_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Run().refresh.restore({}, tmp_path)
    (tmp_path / "reference.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Run().refresh.restore({}, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_files(Run().refresh.files(), tmp_path / "nowhere")
