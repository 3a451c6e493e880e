"""Other VAEs and other UNets to start from, under every name that they go by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from tiny_families import shipped, written
from torch import Tensor

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.loading import file_weights, load_denoiser, load_vae, peak_host_gib
from ds_dpo.models.weights.files import FileWeights
from ds_dpo.models.weights.ldm_keys import ldm_names
from ds_dpo.models.weights.ldm_parts import vae_places


def assert_same(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# ---- the VAE ----


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """As SDXL's, with attention in its middle, and smaller."""
    torch.manual_seed(3)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    small = {**shipped("sdxl", "vae"), "block_out_channels": [32, 64], "layers_per_block": 1, **blocks}
    made: Any = AutoencoderKL.from_config(small)
    assert isinstance(made, AutoencoderKL)
    return made


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_in_one_file_is_built_as_its_shapes_tell_and_scaled_as_the_pipelines(
    sdxl: ModelConfig, vae: AutoencoderKL, tmp_path: Path, prefix: str
) -> None:
    tensors = written(vae, vae_places(vae.state_dict(), num_blocks=2), prefix=prefix)
    tensors["loss.logvar"] = torch.zeros(1)  # what its training left behind
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "vae.safetensors")
    model = sdxl.model_copy(update={"vae": str(tmp_path / "vae.safetensors")})
    loaded = load_vae(model)
    assert_same(loaded.state_dict(), vae.state_dict())
    assert loaded.config["scaling_factor"] == load_vae(sdxl).config["scaling_factor"]


def test_a_vae_in_one_file_under_diffusers_names_must_have_the_pipelines_shapes(
    sdxl: ModelConfig, vae: AutoencoderKL, tmp_path: Path
) -> None:
    model = sdxl.model_copy(update={"vae": str(tmp_path / "vae.safetensors")})
    own = {name: tensor + 1 for name, tensor in load_vae(sdxl).state_dict().items()}
    save_file(own, tmp_path / "vae.safetensors")
    assert_same(load_vae(model).state_dict(), own)
    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match=r"vae.safetensors: its VAE lacks \d+ tensors, such as"):
        load_vae(model)


def test_a_file_that_is_no_vae_is_an_error(sdxl: ModelConfig, tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=r"model.vae .*a.safetensors: not a VAE; its first tensor is 'conv_in.weight'"):
        load_vae(sdxl.model_copy(update={"vae": str(tmp_path / "a.safetensors")}))


# ---- the UNet ----


@pytest.fixture(scope="module")
def tuned() -> dict[str, Tensor]:
    """The miniature's UNet, each weight moved."""
    folder = Path(resolve_asset("ds_dpo://assets/miniature/model"), "unet")
    unet: Any = UNet2DConditionModel.from_pretrained(folder)
    return {name: tensor + 0.5 for name, tensor in unet.state_dict().items()}


def write_start(form: str, tuned: dict[str, Tensor], sdxl: ModelConfig, folder: Path) -> Path:
    config = UNet2DConditionModel.load_config(resolve_asset(f"{sdxl.pretrained}/unet"))
    names = ldm_names(tuned, config)
    if form.endswith("folder"):
        unet: Any = UNet2DConditionModel.from_config(config)
        unet.load_state_dict(tuned)
        unet.save_pretrained(folder / "unet")
        return folder if form == "pipeline folder" else folder / "unet"
    tensors = {
        "diffusers names": tuned,
        "single file": {names[name]: tensor for name, tensor in tuned.items()}
        | {"first_stage_model.x": torch.zeros(1)},
        "ldm names": {names[name].removeprefix("model.diffusion_model."): value for name, value in tuned.items()},
    }[form]
    save_file(tensors, folder / "start.safetensors")
    return folder / "start.safetensors"


@pytest.mark.parametrize("form", ["unet folder", "pipeline folder", "diffusers names", "single file", "ldm names"])
def test_another_unet_starts_policy_and_master_weights(
    sdxl: ModelConfig, tuned: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    model = sdxl.model_copy(update={"denoiser_init": str(write_start(form, tuned, sdxl, tmp_path))})
    policy = load_denoiser(model, dtype=torch.bfloat16)
    assert policy.training
    assert_same(policy.state_dict(), {name: tensor.bfloat16() for name, tensor in tuned.items()})
    assert_same(dict(file_weights(model)), tuned)
    assert dict(policy.config) | {"_name_or_path": None} == dict(load_denoiser(sdxl, dtype=torch.bfloat16).config) | {
        "_name_or_path": None
    }
    numbers = sum(tensor.numel() for tensor in tuned.values())
    found = peak_host_gib(model, dtype=torch.bfloat16, ranks_at_once=1) * 2**30
    assert 6 * numbers <= found < 6.1 * numbers  # fp32 in the file, bf16 beside; a folder's file has a header too


def test_weights_from_elsewhere_are_taken_in_place_of_any_file(sdxl: ModelConfig, tuned: dict[str, Tensor]) -> None:
    policy = load_denoiser(sdxl, dtype=torch.float32, start=tuned)
    assert_same(policy.state_dict(), tuned)
    with torch.no_grad():
        policy.conv_in.weight.zero_()
    assert tuned["conv_in.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_in.bias": None}, r"denoiser_init .*lacks 1 tensors of this model, such as conv_in.bias"),
        ({"conv_in.bias": torch.zeros(3)}, r"has conv_in.bias of shape \(3,\), but this model has \(48,\)"),
        ({"more": torch.zeros(1)}, r"has 1 tensors that do not belong to this model, such as more"),
    ],
)
def test_a_unet_that_is_not_the_pipelines_is_an_error(
    sdxl: ModelConfig, tuned: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    start = {name: tensor for name, tensor in {**tuned, **change}.items() if tensor is not None}
    with pytest.raises(ModelError, match=message):
        load_denoiser(sdxl, dtype=torch.float32, start=start)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_a.lora_up.weight"], "a LoRA, not a UNet; fuse it"),
        (["encoder.conv_in.weight"], "not a UNet; its first tensor is 'encoder.conv_in.weight'"),
    ],
)
def test_a_file_that_is_no_unet_is_an_error(sdxl: ModelConfig, tmp_path: Path, names: list[str], message: str) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=f"model.denoiser_init .*a.safetensors: {message}"):
        load_denoiser(sdxl.model_copy(update={"denoiser_init": str(tmp_path / "a.safetensors")}), dtype=torch.float32)


def test_a_folder_without_a_unet_is_an_error(sdxl: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model.denoiser_init .* is not a UNet, since it has neither config.json nor unet/config.json"
    ):
        file_weights(sdxl.model_copy(update={"denoiser_init": str(tmp_path)}))


def test_without_another_unet_the_pipelines_own_file_counts(sdxl: ModelConfig) -> None:
    assert isinstance(file_weights(sdxl), FileWeights)
