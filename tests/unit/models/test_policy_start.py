"""What may be given as model.policy_init, and what is refused before the policy gets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zero_checkpoint import save_run, save_zero2

from ds_dpo.config.identity import compare_saved_identity, fingerprint, identity
from ds_dpo.config.load import load_config
from ds_dpo.config.models import ModelConfig
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.errors import CheckpointError, ConfigError, DsDpoError, ModelError
from ds_dpo.models.denoiser.adapters import add_adapter, is_of_adapter
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.policy_start import open_policy_start


@pytest.fixture
def policy(sdxl: ModelConfig) -> Any:
    return load_denoiser(sdxl, dtype=torch.float32)


@pytest.fixture
def adapted(sdxl: ModelConfig) -> Any:
    denoiser = load_denoiser(sdxl, dtype=torch.float32)
    add_adapter(denoiser, AdapterConfig(type="lora", rank=2), seed=0)
    return denoiser


def moved(policy: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() + 1 for name, tensor in policy.named_parameters()}


def save_lora(policy: Any, folder: Path, **changes: Any) -> Path:
    weights = {name: tensor.detach() + 1 for name, tensor in policy.named_parameters() if is_of_adapter(name)}
    checkpoint: Path = save_zero2(folder, weights)
    settings = {"r": 2, "lora_alpha": 2, "use_rslora": False, "use_dora": False}
    settings["target_modules"] = list(policy.peft_config["default"].target_modules)
    (checkpoint / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return checkpoint


def opened(sdxl: ModelConfig, policy: Any, start: Path, *, has_adapter: bool = False) -> Any:
    model = sdxl.model_copy(update={"policy_init": str(start)})
    return open_policy_start(model, policy, has_adapter=has_adapter)


def test_a_run_and_a_file_give_all_weights_in_their_own_precision(
    sdxl: ModelConfig, policy: Any, tmp_path: Path
) -> None:
    assert open_policy_start(sdxl, policy, has_adapter=False) is None
    weights = moved(policy)
    save_file(weights, tmp_path / "other.safetensors")
    for start in (save_run(tmp_path / "run", weights, base="x"), tmp_path / "other.safetensors"):
        found = opened(sdxl, policy, start)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
        assert found.source == f"model.policy_init {start}"


def test_a_lora_of_another_run_is_taken_without_the_weights_beneath(
    sdxl: ModelConfig, adapted: Any, tmp_path: Path
) -> None:
    found = opened(sdxl, adapted, save_lora(adapted, tmp_path / "lora"), has_adapter=True)
    own = {name: tensor for name, tensor in adapted.named_parameters() if is_of_adapter(name)}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], own[name] + 1) for name in own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_in.bias": None}, "lacks 1 tensors.*, such as conv_in.bias"),
        ({"more": torch.zeros(1)}, "policy_init .*has 1 tensors that do not belong to this policy, such as more"),
        ({"conv_in.bias": torch.zeros(3)}, r"policy_init .*has conv_in.bias of shape \(3,\), but this policy has"),
    ],
)
def test_weights_of_another_model_are_refused(
    sdxl: ModelConfig, policy: Any, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    weights = {name: tensor for name, tensor in {**moved(policy), **change}.items() if tensor is not None}
    starts = [save_zero2(tmp_path / "step_00000007", weights)]
    if "more" not in change:  # a file may have a VAE beside its UNet
        save_file(weights, tmp_path / "other.safetensors")
        starts.append(tmp_path / "other.safetensors")
    for start in starts:
        with pytest.raises(ModelError, match=message):
            opened(sdxl, policy, start)


def test_a_value_that_is_not_finite_is_named_when_it_is_read(sdxl: ModelConfig, policy: Any, tmp_path: Path) -> None:
    weights = moved(policy)
    weights["conv_in.bias"][0] = float("nan")
    save_file(weights, tmp_path / "other.safetensors")
    found = opened(sdxl, policy, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"model.policy_init .*tensor conv_in.bias has 1 NaN"):
        found["conv_in.bias"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "adapter has r 4, but this run's has 2; set adapter.rank to fit"),
        ({"lora_alpha": 8}, "adapter has lora_alpha 8, but this run's has 2; set adapter.alpha to fit"),
        ({"target_modules": ["to_q"]}, r"adapter has target_modules \['to_q'\], but .*; set adapter.targets to fit"),
        ({"use_dora": True}, "adapter has use_dora True, but this run's has False; set adapter.type to fit"),
    ],
)
def test_a_lora_of_another_kind_is_refused(
    sdxl: ModelConfig, adapted: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    start = save_lora(adapted, tmp_path / "lora", **changes)
    with pytest.raises(ModelError, match=message):
        opened(sdxl, adapted, start, has_adapter=True)


def test_a_lora_and_a_whole_denoiser_do_not_stand_in_for_each_other(
    sdxl: ModelConfig, policy: Any, adapted: Any, tmp_path: Path
) -> None:
    lora, whole = save_lora(adapted, tmp_path / "lora"), save_zero2(tmp_path / "whole", moved(policy))
    bare = save_lora(adapted, tmp_path / "bare")
    (bare / "adapter_config.json").unlink()
    for start, of, message, kind in (
        (lora, policy, "a run that trained a LoRA has no whole denoiser", ModelError),
        (whole, adapted, "not a checkpoint with a LoRA, but this run trains one", ModelError),
        (tmp_path / "none.safetensors", adapted, "not a checkpoint with a LoRA", ModelError),
        (tmp_path / "none.safetensors", policy, "model.policy_init .*none.safetensors", ModelError),
        (bare, adapted, "adapter_config.json", ConfigError),
    ):
        with pytest.raises(DsDpoError, match=message) as refused:
            opened(sdxl, of, start, has_adapter=of is adapted)
        assert isinstance(refused.value, kind)
    (lora / "mp_rank_00_model_states.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError):
        opened(sdxl, adapted, lora, has_adapter=True)


def test_it_is_part_of_a_runs_identity_and_unset_it_changes_none_of_earlier_ones() -> None:
    plain, other = (
        identity(load_config(["--config", "miniature", *words]).config, "bf16")
        for words in ([], ["--model.policy_init", "runs/other"])
    )
    assert plain["model.policy_init"] is None
    assert fingerprint(plain) != fingerprint(other)
    before = {name: value for name, value in plain.items() if name != "model.policy_init"}
    assert compare_saved_identity(before, plain) == []
    assert [change.name for change in compare_saved_identity(before, other)] == ["model.policy_init"]
