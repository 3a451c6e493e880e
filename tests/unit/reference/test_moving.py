"""The reference that moves at every step, against its closed form, and its guard."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ds_dpo.engine.follower import Follower
from ds_dpo.engine.layout import EngineLayout, Part
from ds_dpo.engine.moving_average import MovingAverage
from ds_dpo.errors import ReferenceChangedError
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.reference.moving import MovingReference
from ds_dpo.reference.residency import RESIDENCIES
from ds_dpo.storage.state_files import write_files
from ds_dpo.zero_shards.layout import place_cut_group

SHAPES = {"0.weight": (2, 3), "1.weight": (2, 2)}  # the bias of neither is trained


class EngineStandIn:
    """What of an engine a moving reference needs: masters as ZeRO 2 holds them on one rank, and the average."""

    def __init__(self, policy: nn.Module) -> None:
        self._policy = policy
        self.average: MovingAverage

    def masters(self) -> list[Tensor]:
        return [torch.cat([self._policy.get_parameter(name).detach().float().flatten() for name in SHAPES])]

    def follow(self, module: nn.Module, *, decay: float) -> Follower:
        self.average = MovingAverage(self.masters(), decay=decay, kind="reference")
        placements = place_cut_group(SHAPES, group=0, part_sizes=[10], paddings=None)
        parts = [
            Part(name="0.weight", start=0, numel=6, group=0, offset=0),
            Part(name="1.weight", start=0, numel=4, group=0, offset=6),
        ]
        layout = EngineLayout(masters=self.masters(), placements=placements, parts=parts)
        return Follower(module, average=self.average, layout=layout, device=torch.device("cpu"))


class Run:
    """A policy of fp32 masters, a reference in any dtype, and what moves it."""

    def __init__(self, *, decay: float, dtype: torch.dtype = torch.float32, residency: str = "replicated") -> None:
        self.policy = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.fill_(1.0)
        kept = RESIDENCIES[residency]
        assert kept is not None
        self.reference: FrozenCopy = kept.copy(self.policy, predict_by_unet, dtype, torch.device("cpu"))
        self.engine = EngineStandIn(self.policy)
        self.moving = MovingReference(
            self.reference,
            engine=self.engine,  # type: ignore[arg-type]
            policy=self.policy,
            decay=decay,
        )

    def train(self, *weights: float) -> None:
        """Set all the policy's weights, as an update does that is applied."""
        for step, weight in enumerate(weights, start=1):
            with torch.no_grad():
                for parameter in self.policy.parameters():
                    parameter.fill_(weight)
            self.engine.average.update(self.engine.masters())
            assert self.moving.after_step(step, {}) == {}

    def weight(self, name: str = "1.weight") -> float:
        (value,) = self.reference.module.get_parameter(name).unique().tolist()
        return float(value)


@pytest.mark.parametrize("residency", ["replicated", "cpu"])
def test_it_moves_by_the_closed_form_at_each_step(residency: str) -> None:
    run = Run(decay=0.75, residency=residency)
    found = []
    for weight in (5.0, -3.0, 9.0):
        run.train(weight)
        found.append(run.weight())
        # the module computes with the new weights: row sums of the last layer, whose bias of 1 does not move
        (output,) = run.reference.module(torch.zeros(3)).unique().tolist()
        assert output == 2 * run.weight() * 1.0 + 1.0
    # 3/4 + 5/4 = 2, 3/4 x 2 - 3/4 = 3/4, 3/4 x 3/4 + 9/4 = 2.8125
    assert found == [2.0, 0.75, 2.8125]
    assert run.weight("0.bias") == 1.0, "a weight that is not trained stays"


def test_changes_that_16_bits_cannot_hold_add_up() -> None:
    """Near 1 bf16 has steps of 2^-7; one update moves the reference by 2^-10, which alone would round to nothing."""
    run = Run(decay=1 - 2**-6, dtype=torch.bfloat16)
    run.train(1 + 2**-4)
    assert run.weight() == 1.0
    run.train(*[1 + 2**-4] * 11)
    # 1 + 2^-4 (1 - (63/64)^12) = 1.0108: nearer to 1 + 2^-7 = 1.0078 than to 1 + 2^-6
    assert run.weight() == 1 + 2**-7


def test_a_resumed_reference_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, begun, resumed = (Run(decay=0.9, dtype=torch.bfloat16) for _ in range(3))
    whole.train(1.5, 1.25, 3.0, 2.0)
    begun.train(1.5, 1.25)
    write_files([begun.engine.average.file(0)], tmp_path)
    resumed.engine.average.load(tmp_path, 0)
    resumed.moving.restore(begun.moving.state(), tmp_path)
    assert resumed.weight() == begun.weight()
    resumed.train(3.0, 2.0)
    assert resumed.weight() == whole.weight()
    assert torch.equal(resumed.engine.average.groups[0], whole.engine.average.groups[0])


def test_a_weight_that_something_else_changes_ends_the_run_before_it_is_saved() -> None:
    run = Run(decay=0.5, dtype=torch.bfloat16)
    assert run.moving.files() == []
    run.train(2.0)
    assert run.moving.files() == []
    run.reference.module.get_parameter("0.weight").detach().view(torch.uint8)[0, 0] ^= 1
    for check in (run.moving.require_unchanged, run.moving.files):
        with pytest.raises(ReferenceChangedError, match=r"no longer the average that they follow \(rank 0\)"):
            check()
