"""The one call of a UNet: for the policy inside a DeepSpeed engine, for a reference and for a plain module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning


def predict(unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the UNet's prediction for N images, (N, C, H, W) in the UNet's dtype.

    noisy_latents: (N, C, H, W) fp32. timesteps: (N,) int64. conditioning: of the same N images; with pooled text and
    time_ids it is SDXL's, without them SD1.5's.
    """
    dtype = parameter_dtype(unet)
    # The only cast to the model's precision; from here to the prediction everything is in it.
    noisy_latents, text_states = noisy_latents.to(dtype), conditioning.text_states.to(dtype)
    prediction = unet(
        noisy_latents,
        timesteps,
        encoder_hidden_states=text_states,
        added_cond_kwargs=_added_conditioning(conditioning, dtype),
        return_dict=False,
    )[0]
    assert isinstance(prediction, Tensor)
    return prediction


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's parameters; a DeepSpeed engine's ZeRO-3 parts keep it."""
    return next(module.parameters()).dtype


def _added_conditioning(conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
    if conditioning.pooled is None or conditioning.time_ids is None:
        return None
    return {
        "text_embeds": conditioning.pooled.to(dtype),
        # fp32, because bf16 has no 1022 or 1026; the UNet computes sines of sizes in fp32 and then casts them
        "time_ids": conditioning.time_ids.float(),
    }
