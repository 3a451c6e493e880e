"""How a VAE's latents are shifted and scaled before a denoiser sees them: by its configuration, or by its weights."""

from __future__ import annotations

from typing import Any

from ds_dpo.models.vae import SCALING_FIELDS
from ds_dpo.models.weights.parts import Part

BATCH_NORM_EPS = "batch_norm_eps"  # a setting of VAEs whose latents are normed by running means of patches


def latent_scaling(part: Part) -> dict[str, Any]:
    """Return the SCALING_FIELDS of a VAE; None for what it does not state.

    FLUX.2's VAE has them among its weights: mean and variance for each channel and place in a patch of 2 x 2.
    Source: diffusers, Flux2KleinPipeline._encode_vae_image.
    """
    config = part.config
    stated = {name: config.get(name) for name in SCALING_FIELDS}
    if BATCH_NORM_EPS not in config:
        return stated
    weights = part.weights()
    mean, variance = (weights[f"bn.running_{name}"].float() for name in ("mean", "var"))
    deviation = (variance + config[BATCH_NORM_EPS]).sqrt()
    return {**stated, "scaling_factor": 1.0, "latents_mean": mean.tolist(), "latents_std": deviation.tolist()}
