"""Turn pairs, decoded or cached, into the tensors of a step, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ds_dpo.batch import CachedSamples, DrawnPairs, PairSamples, PreferenceBatch, split_pair, stack_pair
from ds_dpo.errors import DataError
from ds_dpo.models.families.family import Extras
from ds_dpo.models.families.text import TextEncoder
from ds_dpo.models.vae import OVERFLOW_ADVICE, encode_images, sample_latents


class OnlineEncoder:
    """Encodes each micro-batch when it is needed, with the VAE and text encoders on the training device."""

    def __init__(self, *, vae: AutoencoderKL, text: TextEncoder, extras: Extras, device: torch.device | str) -> None:
        """Take frozen encoders and move them to the device."""
        self._extras = extras
        self._device = torch.device(device)
        self._vae = vae.to(self._device)
        self._text = text.to(self._device)

    @torch.no_grad()
    def __call__(self, samples: PairSamples) -> PreferenceBatch:
        """Return the micro-batch on the device; all its random draws come from the samples.

        Raises DataError that names the pairs whose latents are not finite.
        """
        pair = samples.to(self._device, non_blocking=True)
        latents = encode_images(
            self._vae,
            stack_pair(pair.chosen_pixels, pair.rejected_pixels),
            stack_pair(pair.chosen_posterior_noise, pair.rejected_posterior_noise),
        )
        self._refuse_not_finite(latents, samples.pair_ids)
        prompts = self._text.encode(pair.prompts)
        return _batch(pair, self._extras, latents=latents, text_states=prompts.text_states, pooled=prompts.pooled)

    def _refuse_not_finite(self, latents: Tensor, pair_ids: Tensor) -> None:
        # Waits for the device once per micro-batch: a NaN found later would already be in the optimizer's moments.
        image_is_finite = latents.isfinite().all(dim=(1, 2, 3)).cpu()
        if image_is_finite.all():
            return
        chosen_is_finite, rejected_is_finite = split_pair(image_is_finite)
        bad = pair_ids[~(chosen_is_finite & rejected_is_finite)].tolist()
        raise DataError(
            f"the VAE gave NaN or infinite latents for pairs {', '.join(map(str, bad))} in {self._vae.dtype}; "
            f"{OVERFLOW_ADVICE}"
        )


class CachedEncoder:
    """Draws latents from the moments in a cache, which also holds the text states. Needs no model."""

    def __init__(
        self,
        *,
        quantity: Literal["moments", "mean"],
        vae_dtype: torch.dtype,
        vae_config: Mapping[str, Any],
        extras: Extras,
        device: torch.device | str,
    ) -> None:
        """Take what the cache's record says of its images.

        quantity: latents are drawn from moments, while a mean is used unchanged. vae_dtype: dtype in which the VAE ran;
        standard deviations are computed in it, as online. vae_config: shift and scale of the latents.
        """
        self._device = torch.device(device)
        self._draws = quantity == "moments"
        self._vae_dtype, self._vae_config = vae_dtype, vae_config
        self._extras = extras

    @torch.no_grad()
    def __call__(self, samples: CachedSamples) -> PreferenceBatch:
        """Return the micro-batch on the device; all its random draws come from the samples."""
        pair = samples.to(self._device, non_blocking=True)
        noise = stack_pair(pair.chosen_posterior_noise, pair.rejected_posterior_noise) if self._draws else None
        moments = stack_pair(pair.chosen_moments, pair.rejected_moments)
        latents = sample_latents(moments.to(self._vae_dtype), noise, vae_config=self._vae_config)
        return _batch(pair, self._extras, latents=latents, text_states=pair.text_states, pooled=pair.pooled)


def _batch(
    pair: DrawnPairs, extras: Extras, *, latents: Tensor, text_states: Tensor, pooled: Tensor | None
) -> PreferenceBatch:
    return PreferenceBatch(
        latents=latents,
        noise=pair.noise,
        input_noise=pair.input_noise,
        timesteps=pair.timesteps,
        text_states=text_states,
        pooled=pooled,
        extras=extras(stack_pair(pair.chosen_time_ids, pair.rejected_time_ids)),
        pair_ids=pair.pair_ids,
        target_probabilities=pair.target_probabilities,
        weights=pair.weights,
        reference_chosen_error=pair.reference_chosen_error,
        reference_rejected_error=pair.reference_rejected_error,
    )
