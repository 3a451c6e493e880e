"""The average is diffusers' EMAModel, on flat parts of the weights."""

from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel

from ds_dpo.engine.moving_average import MovingAverage
from ds_dpo.errors import CheckpointError
from ds_dpo.storage.state_files import write_files


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_it_follows_diffusers_average_of_the_same_weights(tmp_path: Path, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in (5, 3)]
    theirs, ours = EMAModel(weights, decay=decay), MovingAverage(weights, decay=decay)
    for _ in range(25):
        for weight in weights:
            weight.data += torch.randn(weight.shape, generator=generator)
        theirs.step(weights)
        ours.update(weights)
    write_files([ours.file(7)], tmp_path)
    saved = torch.load(tmp_path / "ema_rank_00007.pt", weights_only=True)
    assert (saved["format"], saved["decay"], saved["updates"]) == (1, decay, 25)
    for expected, found in zip(theirs.shadow_params, saved["flat_groups"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, weights[0].detach()[: len(found)])


def test_a_loaded_average_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    steps = [torch.tensor([float(step), -2.0 * step]) for step in range(1, 9)]
    whole, begun = (MovingAverage([torch.zeros(2)], decay=0.9) for _ in range(2))
    for step in steps:
        whole.update([step])
    for step in steps[:5]:
        begun.update([step])
    write_files([begun.file(0)], tmp_path)
    resumed = MovingAverage([torch.full((2,), 7.0)], decay=0.9)
    resumed.load(tmp_path, 0)
    for step in steps[5:]:
        resumed.update([step])
    assert torch.equal(whole.groups[0], resumed.groups[0])


def test_a_reference_s_average_keeps_its_decay_from_the_first_update_on() -> None:
    average = MovingAverage([torch.tensor([8.0])], decay=0.75, kind="reference")
    found = []
    for weight in (4.0, 0.0, 16.0):
        average.update([torch.tensor([weight])])
        found.append(average.groups[0].item())
    # 3/4 x 8 + 1/4 x 4, 3/4 x 7 + 0, 3/4 x 5.25 + 1/4 x 16
    assert found == [7.0, 5.25, 7.9375]


def test_a_missing_or_foreign_average_is_refused(tmp_path: Path) -> None:
    average = MovingAverage([torch.zeros(2)], decay=0.9)
    with pytest.raises(CheckpointError, match=r"ema_rank_00000.pt is missing: ema.decay 0.9 needs"):
        average.load(tmp_path, 0)
    of_reference = MovingAverage([torch.zeros(2)], decay=0.9, kind="reference")
    with pytest.raises(CheckpointError, match=r"reference_rank_00000.pt is missing: reference.ema_decay 0.9 needs"):
        of_reference.load(tmp_path, 0)
    write_files([MovingAverage([torch.zeros(3)], decay=0.9).file(0)], tmp_path)
    with pytest.raises(CheckpointError, match=r"format 1 with groups of \[\(3,\)\] does not fit"):
        average.load(tmp_path, 0)
