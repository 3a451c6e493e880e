from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from zero_checkpoint import save_run

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import CheckpointError
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.start import checkpoint_start, pin_policy_start, pin_start


@pytest.fixture(scope="module")
def tuned() -> dict[str, Tensor]:
    """The miniature's UNet, each weight moved."""
    unet: Any = UNet2DConditionModel.from_pretrained(resolve_asset("ds_dpo://assets/miniature/model/unet"))
    return {name: tensor + 1 / 3 for name, tensor in unet.state_dict().items()}


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def earlier(tuned: dict[str, Tensor], tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 7 and 9."""
    checkpoint = save_run(tmp_path / "run", {name: tensor - 1 for name, tensor in tuned.items()}, base="x")
    later = save_run(tmp_path / "later", tuned, base="x", steps=9)
    later.rename(checkpoint.parent / later.name)
    return tmp_path / "run"


def run_config(start: Path) -> RunConfig:
    return load_config(["--config", "miniature", "--output_dir", "x", "--model.denoiser_init", str(start)]).config


def test_a_run_starts_from_the_masters_of_its_newest_checkpoint(tuned: dict[str, Tensor], earlier: Path) -> None:
    pinned = pin_start(run_config(earlier))
    newest = earlier / "checkpoints" / "step_00000009"
    assert pinned.model.denoiser_init == str(newest)
    assert pin_start(pinned) == pinned
    start = checkpoint_start(pinned.model)
    assert start is not None
    assert_same(dict(start), tuned)  # fp32, though the module was kept in bf16
    assert start.num_bytes() == 4 * sum(tensor.numel() for tensor in tuned.values())
    policy = load_denoiser(pinned.model, dtype=torch.float32, start=start)
    assert_same(policy.state_dict(), tuned)


def test_a_checkpoint_that_is_not_whole_is_passed_over_and_a_run_without_any_is_an_error(earlier: Path) -> None:
    checkpoints = earlier / "checkpoints"
    (checkpoints / "step_00000009" / "manifest.json").unlink()
    assert pin_start(run_config(earlier)).model.denoiser_init == str(checkpoints / "step_00000007")
    (checkpoints / "step_00000007" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"model.denoiser_init .*run: the run has no valid checkpoint; .*never comp"
    ):
        pin_start(run_config(earlier))


def test_a_start_that_is_no_checkpoint_is_left_to_the_models_part(tmp_path: Path) -> None:
    for start in (tmp_path, Path("owner/name")):
        config = run_config(start)
        assert pin_start(config) is config
        assert checkpoint_start(config.model) is None


def test_a_run_keeps_the_checkpoint_that_its_policy_started_from(earlier: Path, tmp_path: Path) -> None:
    def asked(start: Path) -> RunConfig:
        return load_config(["--config", "miniature", "--output_dir", "x", "--model.policy_init", str(start)]).config

    checkpoints = earlier / "checkpoints"
    older, newest = str(checkpoints / "step_00000007"), str(checkpoints / "step_00000009")
    new = pin_policy_start(asked(earlier), began_from=None)
    assert (new.model.policy_init, new.model.denoiser_init) == (newest, None)
    assert pin_policy_start(asked(earlier), began_from=older).model.policy_init == older  # it has trained on since
    assert pin_policy_start(asked(tmp_path / "other"), began_from=older) == asked(tmp_path / "other")  # refused later
    earlier.rename(tmp_path / "gone")
    assert pin_policy_start(asked(earlier), began_from=older).model.policy_init == older
    plain = run_config(tmp_path)
    assert pin_policy_start(plain, began_from=older) is plain
