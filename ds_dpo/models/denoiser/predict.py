"""The one call of a denoiser: for the policy inside a DeepSpeed engine, for a reference and for a plain module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ds_dpo.batch import Conditioning
from ds_dpo.models.denoiser.packing import Packing
from ds_dpo.models.layout import row_major

FLUX_PACKING = Packing(side=2)

# A denoiser, noisy latents (N, C, H, W) fp32, its time (N,) and conditioning of N images into the prediction,
# (N, C, H, W) in the denoiser's own dtype. The time is ForwardProcess.denoiser_time's: int64 timesteps of a noise
# schedule, or 1000 sigma in fp32 of a flow. Each kind of denoiser has its own.
Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


def predict_by_unet(unet: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    """Return what a UNet of Stable Diffusion predicts; see Predict.

    With pooled text and the extra time_ids, (N, 6) or (N, 5), the conditioning is SDXL's, without them SD1.5's.
    """
    dtype = parameter_dtype(unet)
    # The only cast to the model's precision; from here to the prediction everything is in it.
    noisy_latents, text_states = row_major(noisy_latents.to(dtype)), row_major(conditioning.text_states.to(dtype))
    prediction = unet(
        noisy_latents,
        timesteps,
        encoder_hidden_states=text_states,
        added_cond_kwargs=_added_conditioning(conditioning, dtype),
        return_dict=False,
    )[0]
    assert isinstance(prediction, Tensor)
    return prediction


def predict_by_sd3_transformer(
    transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Tensor:
    """Return what Stable Diffusion 3's transformer predicts, with its pooled text; see Predict."""
    assert conditioning.pooled is not None, "this transformer is conditioned on pooled text"
    dtype = parameter_dtype(transformer)
    # The only cast to the model's precision; from here to the prediction everything is in it.
    prediction = transformer(
        hidden_states=row_major(noisy_latents.to(dtype)),
        encoder_hidden_states=row_major(conditioning.text_states.to(dtype)),
        pooled_projections=row_major(conditioning.pooled.to(dtype)),
        timestep=timesteps,
        return_dict=False,
    )[0]
    assert isinstance(prediction, Tensor)
    return prediction


def predict_by_flux_transformer(
    transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Tensor:
    """Return what FLUX.1's transformer predicts; see Predict.

    It takes sigma itself, pooled text, and, if it was distilled from guided predictions, the extra guidance, (N,).
    """
    assert conditioning.pooled is not None, "this transformer is conditioned on pooled text"
    dtype, (height, width) = parameter_dtype(transformer), noisy_latents.shape[-2:]
    # The only cast to the model's precision; from here to the prediction everything is in it.
    prediction = transformer(
        hidden_states=row_major(FLUX_PACKING.pack(noisy_latents.to(dtype))),
        encoder_hidden_states=row_major(conditioning.text_states.to(dtype)),
        pooled_projections=row_major(conditioning.pooled.to(dtype)),
        timestep=timesteps / 1000,
        guidance=conditioning.extras.get("guidance"),
        img_ids=_places(height // FLUX_PACKING.side, width // FLUX_PACKING.side, noisy_latents.device),
        txt_ids=torch.zeros(conditioning.text_states.shape[1], 3, device=noisy_latents.device),
        return_dict=False,
    )[0]
    assert isinstance(prediction, Tensor)
    return FLUX_PACKING.unpack(prediction, height=height, width=width)


def predict_by_flux2_transformer(
    transformer: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Tensor:
    """Return what FLUX.2's transformer predicts; see Predict. Text tokens are numbered on an axis of their own."""
    dtype, device, (height, width) = parameter_dtype(transformer), noisy_latents.device, noisy_latents.shape[-2:]
    grid = _places(height // FLUX_PACKING.side, width // FLUX_PACKING.side, device)
    words = torch.arange(conditioning.text_states.shape[1], device=device).float()
    # The only cast to the model's precision; from here to the prediction everything is in it.
    prediction = transformer(
        hidden_states=row_major(FLUX_PACKING.pack(noisy_latents.to(dtype))),
        encoder_hidden_states=row_major(conditioning.text_states.to(dtype)),
        timestep=timesteps / 1000,
        guidance=conditioning.extras.get("guidance"),
        img_ids=pad(grid, (0, 1)),
        txt_ids=pad(words[:, None], (3, 0)),
        return_dict=False,
    )[0]
    assert isinstance(prediction, Tensor)
    return FLUX_PACKING.unpack(prediction, height=height, width=width)


def _places(height: int, width: int, device: torch.device) -> Tensor:
    """Return the places of an image's tokens, (height x width, 3): 0, row, column; a text token's are zeros."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return pad(grid, (1, 0)).float()


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype of a module's parameters; a DeepSpeed engine's ZeRO-3 parts keep it."""
    return next(module.parameters()).dtype


def _added_conditioning(conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Tensor] | None:
    if conditioning.pooled is None or "time_ids" not in conditioning.extras:
        return None
    return {
        "text_embeds": conditioning.pooled.to(dtype),
        # fp32, because bf16 has no 1022 or 1026; the UNet computes sines of sizes in fp32 and then casts them
        "time_ids": conditioning.extras["time_ids"].float(),
    }
