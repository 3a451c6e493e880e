from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.loading import (
    describe_model,
    drawing_scheduler,
    latent_shape,
    load_denoiser,
    load_text,
    load_vae,
    peak_host_gib,
    read_noise_schedule,
)


def rewrite_config(model: ModelConfig, part: str, **values: Any) -> None:
    path = Path(model.pretrained, part, "scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- UNet ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unet_holds_the_files_values_in_the_dtype(sdxl: ModelConfig, dtype: torch.dtype) -> None:
    unet = load_denoiser(sdxl, dtype=dtype)
    in_file = load_file(Path(resolve_asset(sdxl.pretrained), "unet", "diffusion_pytorch_model.safetensors"))
    assert unet.training
    assert all(torch.equal(parameter, in_file[name].to(dtype)) for name, parameter in unet.named_parameters())


def test_a_family_that_is_not_the_models_is_an_error(sdxl: ModelConfig, sd15: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"family sd15, but .*text_time.* is of family sdxl; set model.family to sdxl"):
        load_denoiser(sdxl.model_copy(update={"family": "sd15"}), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"family sdxl, but .*None.* is of family sd15; set model.family to sd15"):
        load_denoiser(sd15.model_copy(update={"family": "sdxl"}), dtype=torch.float32)


def test_a_family_that_is_not_known_is_an_error(sdxl_copy: ModelConfig) -> None:
    rewrite_config(sdxl_copy, "unet", addition_embed_type="image")
    with pytest.raises(ModelError, match=r"addition_embed_type image.* is none of sdxl, sdxl_refiner"):
        load_denoiser(sdxl_copy, dtype=torch.float32)


def test_an_inpainting_unet_is_an_error(sdxl_copy: ModelConfig) -> None:
    rewrite_config(sdxl_copy, "unet", in_channels=9)
    with pytest.raises(ModelError, match="has 9 input and 4 output channels; only text-to-image"):
        load_denoiser(sdxl_copy, dtype=torch.float32)


def test_weights_of_other_shapes_are_a_model_error(sdxl_copy: ModelConfig) -> None:
    rewrite_config(sdxl_copy, "unet", block_out_channels=[48, 48])
    with pytest.raises(ModelError, match="unet: cannot be loaded as UNet2DConditionModel"):
        load_denoiser(sdxl_copy, dtype=torch.float32)


def test_peak_host_memory_is_the_file_and_a_copy_for_each_rank(sdxl: ModelConfig) -> None:
    numbers = sum(parameter.numel() for parameter in load_denoiser(sdxl, dtype=torch.float32).parameters())
    file = Path(resolve_asset(sdxl.pretrained), "unet", "diffusion_pytorch_model.safetensors")
    expected_bytes = file.stat().st_size + 3 * numbers * 2
    assert peak_host_gib(sdxl, dtype=torch.bfloat16, ranks_at_once=3) == expected_bytes / 2**30
    assert peak_host_gib(sdxl, dtype=torch.float32, ranks_at_once=1) == (file.stat().st_size + 4 * numbers) / 2**30


# ---- VAE ----


def test_the_vae_is_frozen_in_its_own_dtype(sdxl: ModelConfig) -> None:
    assert load_vae(sdxl).dtype == torch.float32
    vae = load_vae(sdxl.model_copy(update={"vae_dtype": "bf16"}))
    assert vae.dtype == torch.bfloat16
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_fp16_is_refused_for_a_vae_that_needs_upcasting(sdxl_copy: ModelConfig) -> None:
    model = sdxl_copy.model_copy(update={"vae_dtype": "fp16"})
    rewrite_config(sdxl_copy, "vae", force_upcast=True)
    with pytest.raises(ModelError, match=r"vae_dtype fp16 .* force_upcast: .*madebyollin/sdxl-vae-fp16-fix"):
        load_vae(model)
    rewrite_config(sdxl_copy, "vae", force_upcast=False)
    assert load_vae(model).dtype == torch.float16


def test_a_replaced_vae_is_taken_whatever_the_pipelines_variant(sdxl: ModelConfig, tmp_path: Path) -> None:
    other = load_vae(sdxl)
    torch.nn.init.constant_(other.quant_conv.weight, 0.5)
    other.save_pretrained(tmp_path)
    model = sdxl.model_copy(update={"vae": str(tmp_path), "variant": "fp16"})
    assert load_vae(model).quant_conv.weight.unique().tolist() == [0.5]


def test_a_vae_of_other_channels_is_an_error(sdxl: ModelConfig, tmp_path: Path) -> None:
    AutoencoderKL(latent_channels=16, norm_num_groups=8, block_out_channels=(8,)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has 16 latent channels, but the UNet of .* takes 4"):
        load_vae(sdxl.model_copy(update={"vae": str(tmp_path)}))


def test_attention_weights_of_older_vaes_are_loaded(sdxl_copy: ModelConfig) -> None:
    """SD1.5's file still has the names query, key, value and proj_attn."""
    torch.manual_seed(0)
    vae = AutoencoderKL(norm_num_groups=8, block_out_channels=(8,))
    folder = Path(sdxl_copy.pretrained, "vae")
    vae.save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        if ".attentions." in name:
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(new, old)
        renamed[name] = tensor
    assert renamed.keys() != vae.state_dict().keys()
    save_file(renamed, path, metadata={"format": "pt"})
    loaded = load_vae(sdxl_copy).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in vae.state_dict().items())


# ---- text encoders ----


def test_text_encoders_are_loaded_in_the_dtype(sdxl: ModelConfig, sd15: ModelConfig) -> None:
    for model, count in ((sdxl, 2), (sd15, 1)):
        towers = load_text(model, dtype=torch.bfloat16).towers
        assert len(towers) == count
        assert {parameter.dtype for tower in towers for parameter in tower.encoder.parameters()} == {torch.bfloat16}


def test_text_weights_and_tokenizers_as_the_hub_has_them_are_loaded(sdxl: ModelConfig, sdxl_copy: ModelConfig) -> None:
    """SDXL's files: names under text_model., position_ids among them, vocab.json and merges.txt."""
    for part in ("text_encoder", "text_encoder_2"):
        path = Path(sdxl_copy.pretrained, part, "model.safetensors")
        tensors = {
            name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
            for name, tensor in load_file(path).items()
        }
        tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        save_file(tensors, path, metadata={"format": "pt"})
    for part in ("tokenizer", "tokenizer_2"):
        folder = Path(sdxl_copy.pretrained, part)
        tables = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(tables["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, tables["merges"])]) + "\n")
        (folder / "tokenizer.json").unlink()
    prompts = ["a small red circle", ""]
    found, expected = (load_text(model, dtype=torch.float32).encode(prompts) for model in (sdxl_copy, sdxl))
    assert torch.equal(found.text_states, expected.text_states)
    assert found.pooled is not None
    assert expected.pooled is not None
    assert torch.equal(found.pooled, expected.pooled)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_part_is_named(sdxl_copy: ModelConfig, part: str) -> None:
    Path(sdxl_copy.pretrained, part).rename(Path(sdxl_copy.pretrained, "away"))
    with pytest.raises(ModelError, match=f"{part}: no such folder"):
        load_text(sdxl_copy, dtype=torch.float32)


# ---- noise schedule ----


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_noise_schedule_is_that_of_any_samplers_config(
    sdxl_copy: ModelConfig, scheduler_class: type[SchedulerMixin], prediction_type: str
) -> None:
    sampler: Any = scheduler_class
    sampler(
        num_train_timesteps=50,
        beta_start=0.01,
        beta_end=0.04,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
    ).save_pretrained(Path(sdxl_copy.pretrained, "scheduler"))
    schedule = read_noise_schedule(sdxl_copy)
    alphas_cumprod, product = [], 1.0
    for step in range(50):
        product *= 1 - (0.1 + (0.2 - 0.1) * step / 49) ** 2  # betas: squares of evenly spaced roots
        alphas_cumprod.append(product)
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(alphas_cumprod), rtol=1e-5, atol=0)
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert schedule.prediction_type == prediction_type


def test_noising_of_another_kind_is_refused(sdxl_copy: ModelConfig) -> None:
    EDMEulerScheduler().save_pretrained(Path(sdxl_copy.pretrained, "scheduler"))
    for read in (read_noise_schedule, drawing_scheduler):
        with pytest.raises(ModelError, match="EDMEulerScheduler has no beta_schedule"):
            read(sdxl_copy)


def test_a_flow_has_no_noise_schedule(sdxl_copy: ModelConfig) -> None:
    FlowMatchEulerDiscreteScheduler().save_pretrained(Path(sdxl_copy.pretrained, "scheduler"))
    with pytest.raises(ModelError, match="its scheduler is of a flow, which has no noise schedule"):
        read_noise_schedule(sdxl_copy)
    assert describe_model(sdxl_copy).endswith(", sdxl, which predicts flow (its scheduler config)")


def test_a_prediction_type_without_a_target_is_refused(sdxl_copy: ModelConfig) -> None:
    rewrite_config(sdxl_copy, "scheduler", prediction_type="sample")
    with pytest.raises(ModelError, match="prediction_type sample; only epsilon, v_prediction can be trained"):
        read_noise_schedule(sdxl_copy)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_prediction_type_that_is_given_is_taken_and_said(sdxl: ModelConfig, prediction_type: str) -> None:
    model = sdxl.model_copy(update={"prediction_type": prediction_type})
    assert read_noise_schedule(model).prediction_type == prediction_type
    assert drawing_scheduler(model).config["prediction_type"] == prediction_type
    over = "" if prediction_type == "epsilon" else ", instead of epsilon in its scheduler config"
    assert describe_model(model).endswith(f", sdxl, which predicts {prediction_type} (model.prediction_type{over})")
    assert describe_model(sdxl).endswith(", sdxl, which predicts epsilon (its scheduler config)")


def test_pictures_are_drawn_from_the_noisiest_timestep_of_the_same_schedule(sdxl: ModelConfig) -> None:
    scheduler = drawing_scheduler(sdxl)
    alphas_cumprod = read_noise_schedule(sdxl).alphas_cumprod
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert torch.equal(scheduler.alphas_cumprod, alphas_cumprod)
    assert scheduler.final_alpha_cumprod == alphas_cumprod[0]
    assert scheduler.config["clip_sample"] is False


# ---- shapes and damage ----


def test_the_latent_shape_is_that_of_an_encoded_image(sdxl: ModelConfig) -> None:
    with torch.no_grad():
        latents = load_vae(sdxl).encode(torch.zeros(1, 3, 24, 32)).latent_dist.mean
    assert latent_shape(sdxl, (24, 32)) == latents.shape[1:] == (4, 6, 8)
    for size in ((34, 32), (32, 34)):
        with pytest.raises(ModelError, match=rf"{size[0]} x {size[1]} pixels \(data.resolution.* not a multiple of 4,"):
            latent_shape(sdxl, size)


def test_an_unreadable_config_is_named(sdxl_copy: ModelConfig) -> None:
    path = Path(sdxl_copy.pretrained, "unet", "config.json")
    for content, message in (("{", "is not valid JSON"), ("[]", "must contain names and values, not a list")):
        path.write_text(content)
        with pytest.raises(ModelError, match=f"unet/config.json {message}"):
            load_denoiser(sdxl_copy, dtype=torch.float32)
    path.unlink()
    with pytest.raises(ModelError, match=r"unet/config.json: missing"):
        load_denoiser(sdxl_copy, dtype=torch.float32)


def test_sd15_is_loaded_whole(sd15: ModelConfig) -> None:
    assert isinstance(load_denoiser(sd15, dtype=torch.float32), UNet2DConditionModel)
    assert latent_shape(sd15, (32, 32)) == (4, 8, 8)
    assert len(load_text(sd15, dtype=torch.float32).towers) == 1
    assert load_vae(sd15).config["latent_channels"] == 4
