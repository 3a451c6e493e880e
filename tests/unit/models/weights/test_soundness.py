"""Weights that are not finite, and names of a wrapped module, are named when they are loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.loading import load_denoiser, load_text, load_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


def spoil(path: Path, name: str, value: float) -> None:
    tensors = {stored: tensor.float() for stored, tensor in load_file(path).items()}
    tensors[name].view(-1)[1] = value
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("part", "name", "value", "found"),
    [
        ("unet", "conv_in.weight", float("nan"), "1 NaN of"),
        ("unet", "conv_out.bias", float("inf"), "1 infinite of 4 values in float32"),
        ("vae", "quant_conv.bias", float("nan"), "1 NaN of 8 values in float32"),
        ("text_encoder", "final_layer_norm.bias", float("-inf"), "1 infinite of"),
    ],
)
def test_file_and_tensor_of_a_value_that_is_not_finite_are_named(
    sdxl_copy: ModelConfig, part: str, name: str, value: float, found: str
) -> None:
    path = Path(sdxl_copy.pretrained) / part / (WEIGHTS if part != "text_encoder" else "model.safetensors")
    spoil(path, name, value)
    load = {"unet": load_denoiser, "text_encoder": load_text}.get(part)
    with pytest.raises(ModelError) as caught:
        load_vae(sdxl_copy) if load is None else load(sdxl_copy, dtype=torch.float32)
    assert str(caught.value).startswith(f"{path}: tensor {name} has {found}")


def test_a_value_that_is_too_large_for_the_precision_is_named_too(sdxl_copy: ModelConfig) -> None:
    path = Path(sdxl_copy.pretrained) / "unet" / WEIGHTS
    spoil(path, "conv_out.bias", 1e5)
    load_denoiser(sdxl_copy, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"conv_out.bias has 1 infinite of 4 values in float16.*such as bf16"):
        load_denoiser(sdxl_copy, dtype=torch.float16)


def test_other_start_weights_are_looked_at_as_well(sdxl: ModelConfig, sdxl_copy: ModelConfig, tmp_path: Path) -> None:
    path = Path(sdxl_copy.pretrained) / "unet" / WEIGHTS
    spoil(path, "conv_in.bias", float("nan"))
    path = path.rename(tmp_path / "start.safetensors")
    started = sdxl.model_copy(update={"denoiser_init": str(path)})
    with pytest.raises(ModelError, match=rf"{path}.*tensor conv_in.bias has 1 NaN"):
        load_denoiser(started, dtype=torch.float32)


@pytest.mark.parametrize(("prefix", "writer"), [("module.", "DeepSpeed"), ("_orig_mod.", "torch.compile")])
def test_the_prefix_of_a_wrapper_is_named(
    sdxl: ModelConfig, sdxl_copy: ModelConfig, tmp_path: Path, prefix: str, writer: str
) -> None:
    path = Path(sdxl_copy.pretrained) / "unet" / WEIGHTS
    wrapped = {f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}
    save_file(wrapped, path)
    save_file(wrapped, tmp_path / "start.safetensors")
    started = sdxl.model_copy(update={"denoiser_init": str(tmp_path / "start.safetensors")})
    for model in (sdxl_copy, started):
        with pytest.raises(ModelError, match=rf"have the prefix '{prefix}' of .*{writer}: save the module inside it"):
            load_denoiser(model, dtype=torch.float32)
