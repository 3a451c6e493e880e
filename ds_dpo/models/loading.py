"""Turn a run's model section into modules and numbers, from a diffusers folder, the hub or one file.

Each rank calls these functions by itself. No code of a model's files runs: weights are only read from safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ds_dpo.config.models import ModelConfig
from ds_dpo.diffusion.noise_schedule import TARGETS, NoiseSchedule
from ds_dpo.errors import ModelError
from ds_dpo.models.families.table import FAMILIES, family_of
from ds_dpo.models.families.text import TextEncoder, TextTower
from ds_dpo.models.pipelines.pretrained import Pipeline, open_denoiser_init, open_pipeline, open_vae
from ds_dpo.models.sampler import ddim_from
from ds_dpo.models.weights.parts import Part, fill, skeleton
from ds_dpo.precision import torch_dtype


def load_denoiser(model: ModelConfig, *, dtype: torch.dtype, start: Mapping[str, Tensor] | None = None) -> ModelMixin:
    """Return the denoiser to train, on the host, in dtype and training mode; each tensor is cast when it is read.

    start: weights instead of those that the model section names. Raises ModelError if the denoiser is missing,
    incomplete or of another family, or if other weights than the pipeline's do not fit it.
    """
    pipeline = open_pipeline(model)
    part = pipeline.denoiser()
    _check_family(model, pipeline, part.config)
    if start is None and model.denoiser_init is None:
        denoiser = part.load(dtype=dtype)
    else:
        denoiser = skeleton(FAMILIES[model.family].denoiser.model_class(), part.config)
        fill(denoiser, start or file_weights(model), dtype=dtype, source=f"model.denoiser_init {model.denoiser_init}")
    assert isinstance(denoiser, ModelMixin)
    _fix_kernels(denoiser)
    return denoiser.train()


def file_weights(model: ModelConfig) -> Mapping[str, Tensor]:
    """Return the weights that the policy starts from, by parameter name, in the dtype of the file.

    Each is read on request: from model.denoiser_init, else from the pipeline.
    """
    return _start_part(model).weights()


def load_vae(model: ModelConfig) -> AutoencoderKL:
    """Return the frozen VAE, model.vae's or the pipeline's own, on the host in model.vae_dtype.

    Raises ModelError if it is missing, does not fit the UNet, or would overflow in fp16.
    """
    part = open_vae(model)
    _check_vae(model, part.config)
    vae = part.load(dtype=torch_dtype(model.vae_dtype))
    assert isinstance(vae, AutoencoderKL)
    return vae.requires_grad_(False).eval()


def load_text(model: ModelConfig, *, dtype: torch.dtype) -> TextEncoder:
    """Return the frozen text encoders with their tokenizers, on the host in dtype.

    Raises ModelError if one is missing or incomplete.
    """
    pipeline, family = open_pipeline(model), FAMILIES[model.family]
    towers = []
    for name in family.text_encoders:
        encoder = pipeline.text_encoder(name).load(dtype=dtype)
        tokenizer = pipeline.tokenizer(tokenizer_of(name))
        towers.append(TextTower(tokenizer=tokenizer, encoder=encoder.requires_grad_(False).eval()))
    return TextEncoder(towers, encode=family.encode)


def tokenizer_of(text_encoder: str) -> str:
    """Return the name of a text encoder's tokenizer, which has the same number."""
    return text_encoder.replace("text_encoder", "tokenizer")


def read_noise_schedule(model: ModelConfig) -> NoiseSchedule:
    """Return the forward process in the pipeline's scheduler config, which may belong to any sampler.

    model.prediction_type, if given, replaces the config's.

    Raises ModelError for a process without betas, such as flow matching, and for a prediction type without a target.
    """
    config = _scheduler_config(model)
    schedule: Any = DDPMScheduler.from_config(config)
    return NoiseSchedule(
        alphas_cumprod=schedule.alphas_cumprod.float(), prediction_type=schedule.config["prediction_type"]
    )


def drawing_scheduler(model: ModelConfig) -> DDIMScheduler:
    """Return the DDIM sampler for validation images, over the pipeline's own noise schedule."""
    return ddim_from(_scheduler_config(model))


def latent_shape(model: ModelConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return (C, H, W) of an image's latent, from the VAE's config. size: height and width in pixels.

    Raises ModelError if a side is not a multiple of the VAE's factor.
    """
    config = open_vae(model).config
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = size
    if height % factor or width % factor:
        raise ModelError(
            f"training images of {height} x {width} pixels (data.resolution, data.bucket_step) have a side that is not "
            f"a multiple of {factor}, the factor of the VAE of {model.vae or model.pretrained}"
        )
    return int(config["latent_channels"]), height // factor, width // factor


def peak_host_gib(
    model: ModelConfig, *, dtype: torch.dtype, ranks_at_once: int, start_bytes: int | None = None
) -> float:
    """Return the largest host memory in GiB that loading the UNet needs on a node, from file headers alone.

    The mapped file counts once, because ranks share its pages; each rank that loads at once adds a copy in dtype.
    start_bytes: size of other weights than those that the model section names.
    """
    denoiser = open_pipeline(model).denoiser()
    source_bytes = _start_part(model).num_bytes() if start_bytes is None else start_bytes
    return (source_bytes + ranks_at_once * denoiser.num_parameters() * dtype.itemsize) / 2**30


def _fix_kernels(denoiser: nn.Module) -> None:
    """Make linear projections into transformers use the same kernel for trained and frozen weights.

    Their input is a transposed view. torch multiplies it by `mm` if the weight requires a gradient, and by `bmm` if
    not, even under no_grad (should_fold in aten/src/ATen/native/LinearAlgebra.cpp). The two may round differently, so
    that the frozen reference would not predict exactly what the policy does.
    """
    for module in denoiser.modules():
        if isinstance(module, Transformer2DModel) and isinstance(module.proj_in, nn.Linear):
            module.proj_in.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)


def _start_part(model: ModelConfig) -> Part:
    return open_pipeline(model).denoiser() if model.denoiser_init is None else open_denoiser_init(model)


def _check_family(model: ModelConfig, pipeline: Pipeline, unet_config: Mapping[str, Any]) -> None:
    """Raise ModelError if the denoiser is not of model.family, or is not a text-to-image model."""
    family = family_of(unet_config, pipeline.text_config)
    found = None if family is None else family.name
    if found != model.family:
        raise ModelError(
            f"model.family {model.family}, but the UNet of {model.pretrained} (addition_embed_type "
            f"{unet_config.get('addition_embed_type')}, cross_attention_dim {unet_config.get('cross_attention_dim')}) "
            + (f"is of family {found}; set model.family to {found}" if found else f"is none of {', '.join(FAMILIES)}")
        )
    if unet_config["in_channels"] != unet_config["out_channels"]:
        raise ModelError(
            f"{model.pretrained}: its UNet has {unet_config['in_channels']} input and {unet_config['out_channels']} "
            "output channels; only text-to-image models can be trained, not inpainting or upscaling models"
        )


def _check_vae(model: ModelConfig, config: Mapping[str, Any]) -> None:
    if model.vae_dtype == "fp16" and config.get("force_upcast", True):  # a missing value means true in diffusers
        raise ModelError(
            f"model.vae_dtype fp16 with the VAE of {model.vae or model.pretrained}, whose config has force_upcast: "
            "SDXL's own gives NaN in fp16; use vae_dtype fp32 or bf16, or model.vae madebyollin/sdxl-vae-fp16-fix"
        )
    unet_channels = open_pipeline(model).denoiser().config["in_channels"]
    if config["latent_channels"] != unet_channels:
        raise ModelError(
            f"the VAE of {model.vae or model.pretrained} has {config['latent_channels']} latent channels, but the UNet "
            f"of {model.pretrained} takes {unet_channels}"
        )


def _scheduler_config(model: ModelConfig) -> dict[str, Any]:
    config = open_pipeline(model).scheduler_config(model.prediction_type)
    prediction_type = model.prediction_type or config["prediction_type"]
    if prediction_type not in TARGETS:
        raise ModelError(
            f"{model.pretrained}: its scheduler has prediction_type {prediction_type}; only {', '.join(TARGETS)} can "
            "be trained"
        )
    return {**config, "prediction_type": prediction_type}


def describe_model(model: ModelConfig) -> str:
    """Return a line with the family, and with what the UNet predicts and where that is stated."""
    used = _scheduler_config(model)["prediction_type"]
    own = open_pipeline(model).scheduler_config(model.prediction_type)["prediction_type"]
    source = "its scheduler config" if model.prediction_type is None else "model.prediction_type"
    over = f", instead of {own} in its scheduler config" if used != own else ""
    return f"model: {model.pretrained}, {model.family}, which predicts {used} ({source}{over})"
