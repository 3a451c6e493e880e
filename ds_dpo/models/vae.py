"""Encode pixels into moments and scaled latents, and decode them; each posterior draw belongs to its pair.

Legend: M images; X,Y pixels; C,H,W latent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ds_dpo.models.layout import row_major

# An encoder's activations need 1.35 GiB for an image of 1024 x 1024 in fp32, much less than the UNet's.
PIXELS_AT_ONCE = 1024 * 1024
OVERFLOW_ADVICE = (
    "SDXL's own VAE overflows in fp16: use model.vae_dtype fp32 or bf16, or model.vae madebyollin/sdxl-vae-fp16-fix"
)
# the fields of a VAE's config on the shift and scale of its latents
SCALING_FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor, posterior_noise: Tensor) -> Tensor:
    """Return scaled latents (M, C, H, W), fp32: mean + exp(logvar / 2) * noise of each image's posterior.

    pixels: (M, 3, X, Y) in [-1, 1]. posterior_noise: (M, C, H, W) standard normal, fp32, drawn by the
    caller. Encodes as many images at once as have PIXELS_AT_ONCE pixels, at least one.
    """
    return sample_latents(encode_moments(vae, pixels), posterior_noise, vae_config=vae.config)


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: Tensor, *, images_at_once: int | None = None) -> Tensor:
    """Return mean and log-variance of each image's posterior, (M, 2C, H, W), in the VAE's dtype.

    pixels: (M, 3, X, Y) in [-1, 1]. images_at_once: None is as many as have PIXELS_AT_ONCE pixels, at least one.
    The last bits of an image's moments may depend on the images that are encoded with it.
    """
    images_at_once = images_at_once or max(1, PIXELS_AT_ONCE // (pixels.shape[-2] * pixels.shape[-1]))
    posteriors = (vae.encode(images.to(vae.dtype)).latent_dist for images in pixels.split(images_at_once))
    # a VAE with attention gives NHWC on a CPU
    return row_major(torch.cat([torch.cat([found.mean, found.logvar], dim=1) for found in posteriors]))


@torch.no_grad()
def sample_latents(moments: Tensor, posterior_noise: Tensor | None, *, vae_config: Mapping[str, Any]) -> Tensor:
    """Return scaled latents (M, C, H, W), fp32, from moments (M, 2C, H, W), or from means (M, C, H, W) without noise.

    The deviation is computed in the moments' dtype: moments in the VAE's dtype give the same as encode_images.
    vae_config: only its SCALING_FIELDS are read.
    """
    if posterior_noise is None:
        latents = moments.float()
    else:
        mean, logvar = moments.chunk(2, dim=1)
        # fp32, so that a draw from a half-precision VAE is not rounded again
        latents = mean.float() + torch.exp(0.5 * logvar).float() * posterior_noise
    shift, scale = _shift_and_scale(vae_config, latents)
    return (latents - shift) * scale


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, *, are_scaled: bool = True) -> Tensor:
    """Return images (M, 3, X, Y) in [0, 1], fp32, from latents (M, C, H, W), scaled, or as the VAE itself has them.

    Decodes, in the VAE's dtype, as many images at once as have PIXELS_AT_ONCE pixels, at least one.
    """
    shift, scale = _shift_and_scale(vae.config, latents) if are_scaled else (0.0, 1.0)
    raw = (latents.float() / scale + shift).to(vae.device, vae.dtype)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    images_at_once = max(1, PIXELS_AT_ONCE // (latents.shape[-2] * latents.shape[-1] * factor**2))
    images = torch.cat([vae.decode(part, return_dict=False)[0].float() for part in raw.split(images_at_once)])
    return (images / 2 + 0.5).clamp(0, 1)


def _shift_and_scale(config: Mapping[str, Any], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return shift and scale of latents (M, C, H, W), (latent - shift) * scale, broadcastable to them, fp32.

    A VAE states scaling_factor, sometimes shift_factor, or a mean and deviation per channel, or per channel and place
    in a patch.
    """
    shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
    mean, deviation = (
        _spread(_channels(_hashable(values), latents.device), latents)
        for values in (shift, config.get("latents_std") or 1.0)
    )
    return mean, config["scaling_factor"] / deviation


def _spread(values: Tensor, latents: Tensor) -> Tensor:
    """Return values (1, 1 or C, 1, 1) as they are, and those of patches, (1, C side^2, 1, 1), at each patch."""
    _, channels, height, width = latents.shape
    if values.shape[1] in (1, channels):
        return values
    side = math.isqrt(values.shape[1] // channels)
    return values.view(1, channels, side, side).repeat(1, 1, height // side, width // side)


def _hashable(values: Sequence[float] | float) -> tuple[float, ...] | float:
    return values if isinstance(values, int | float) else tuple(values)


@lru_cache(maxsize=32)
def _channels(values: tuple[float, ...] | float, device: torch.device) -> Tensor:
    """Return values of channels on a device. They go there once: each copy would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
