"""Pixels into scaled latents and back, with a posterior draw that belongs to the pair.

Legend: M images; X,Y pixels; C,H,W latent.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

# An encoder's activations take 1.35 GiB for an image of 1024 x 1024 in fp32, and much less than the UNet's below that.
PIXELS_AT_ONCE = 1024 * 1024


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor, posterior_noise: Tensor) -> Tensor:
    """Return scaled latents (M, C, H, W), fp32: mean + exp(logvar / 2) * noise of each image's posterior.

    pixels: (M, 3, X, Y) in [-1, 1]. posterior_noise: (M, C, H, W) standard normal, fp32, so that the draw is the
    caller's. As many images as PIXELS_AT_ONCE holds, at least one, pass at a time.
    """
    images_at_once = max(1, PIXELS_AT_ONCE // (pixels.shape[-2] * pixels.shape[-1]))
    slices = zip(pixels.split(images_at_once), posterior_noise.split(images_at_once), strict=True)
    latents = torch.cat([_sample_posterior(vae, images, noise) for images, noise in slices])
    shift, scale = _shift_and_scale(vae, latents.device)
    return (latents - shift) * scale


def _sample_posterior(vae: AutoencoderKL, pixels: Tensor, noise: Tensor) -> Tensor:
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    # fp32: a draw from a half-precision VAE need not be rounded again
    return posterior.mean.float() + posterior.std.float() * noise


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return images (M, 3, X, Y) in [0, 1], fp32, of scaled latents (M, C, H, W).

    As many images as PIXELS_AT_ONCE holds, at least one, pass at a time, in the VAE's dtype.
    """
    shift, scale = _shift_and_scale(vae, latents.device)
    raw = (latents.float() / scale + shift).to(vae.device, vae.dtype)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    images_at_once = max(1, PIXELS_AT_ONCE // (latents.shape[-2] * latents.shape[-1] * factor**2))
    images = torch.cat([vae.decode(part, return_dict=False)[0].float() for part in raw.split(images_at_once)])
    return (images / 2 + 0.5).clamp(0, 1)


def _shift_and_scale(vae: AutoencoderKL, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what is taken from a latent and what it is then multiplied by, broadcastable to (M, C, H, W), fp32.

    A VAE states scaling_factor, sometimes shift_factor, or a mean and deviation for each channel.
    """

    def channels(values: list[float] | float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)

    config = vae.config
    shift = channels(config.get("latents_mean") or config.get("shift_factor") or 0.0)
    return shift, config["scaling_factor"] / channels(config.get("latents_std") or 1.0)
