"""The tensors of one step, and the one place that knows how a pair is laid out.

Legend: B pairs; N = 2B images (all chosen, then all rejected); C,H,W latent; L text tokens; D text width;
P pooled width; X,Y pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class _MovableTensors:
    """Adds `to(device)` to a dataclass of tensors and of mappings of tensors; other values stay as they are."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        moved = {}
        for one in fields(self):  # type: ignore[arg-type]
            moved[one.name] = _moved(getattr(self, one.name), device, non_blocking=non_blocking)
        return type(self)(**moved)


def _moved(value: Any, device: torch.device | str, *, non_blocking: bool) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(inner, device, non_blocking=non_blocking) for name, inner in value.items()}
    return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value


@dataclass(frozen=True, kw_only=True)
class DrawnPairs(_MovableTensors):
    """What the loader yields for B pairs with images in any form: every random draw, labels, sizes; on the CPU.

    chosen_time_ids, rejected_time_ids: (B, 6) SDXL micro-conditioning. timesteps: (B,) int64. noise: (B, C, H, W),
    shared by the pair. chosen_posterior_noise, rejected_posterior_noise: (B, C, H, W) standard normal draws for the
    VAE posterior. pair_ids: (B,) int64. target_probabilities, weights, reference_chosen_error,
    reference_rejected_error: (B,), and input_noise: see PreferenceBatch. All floats fp32.
    """

    chosen_time_ids: Tensor
    rejected_time_ids: Tensor
    timesteps: Tensor
    noise: Tensor
    chosen_posterior_noise: Tensor
    rejected_posterior_noise: Tensor
    pair_ids: Tensor
    target_probabilities: Tensor
    weights: Tensor
    input_noise: Tensor | None = None
    reference_chosen_error: Tensor | None = None
    reference_rejected_error: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PairSamples(DrawnPairs):
    """Pairs with decoded images.

    chosen_pixels, rejected_pixels: (B, 3, X, Y) fp32 in [-1, 1]. prompts: B strings, '' if dropped.
    """

    chosen_pixels: Tensor
    rejected_pixels: Tensor
    prompts: list[str]


@dataclass(frozen=True, kw_only=True)
class CachedSamples(DrawnPairs):
    """Pairs with images and prompts from a cache.

    chosen_moments, rejected_moments: (B, 2C, H, W) mean and log-variance of the VAE's posterior, or (B, C, H, W) the
    mean alone, in the cache's dtype. text_states: (B, L, D). pooled: (B, P) or None.
    """

    chosen_moments: Tensor
    rejected_moments: Tensor
    text_states: Tensor
    pooled: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Conditioning(_MovableTensors):
    """The inputs of a denoiser besides the noisy latents.

    text_states: (N, L, D). pooled: (N, P), None if the family has none. extras: further inputs of the family, by its
    own names, (N, ...) each.
    """

    text_states: Tensor
    pooled: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(_MovableTensors):
    """One micro-batch as data: the step is a function of it.

    latents: (N, C, H, W) scaled clean latents. noise: (B, C, H, W) of the target. input_noise: (B, C, H, W) of the
    denoiser's input, None if it is the same. timesteps: (B,) int64. text_states: (B, L, D). pooled: (B, P) or None.
    extras: those of Conditioning, for each image, (N, ...) each. pair_ids: (B,) int64.
    target_probabilities: (B,) fp32, that the chosen image is the better one: 1, or 0.5 for a tie. weights: (B,) fp32,
    factors of the pairs' losses. reference_chosen_error, reference_rejected_error: (B,) fp32 if the reference's
    errors were computed beforehand, else None. N is 2B, or B after chosen_only().
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text_states: Tensor
    pooled: Tensor | None
    pair_ids: Tensor
    target_probabilities: Tensor
    weights: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    input_noise: Tensor | None = None
    reference_chosen_error: Tensor | None = None
    reference_rejected_error: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return len(self.pair_ids)

    def chosen_only(self) -> PreferenceBatch:
        """Return the same pairs without their rejected images: N = B."""
        chosen = slice(None, self.num_pairs)
        extras = {name: values[chosen] for name, values in self.extras.items()}
        return replace(self, latents=self.latents[chosen], extras=extras)

    def reference_errors(self) -> tuple[Tensor, Tensor]:
        """Return the reference's errors of chosen and rejected images, (B,) each. Raises LookupError without them."""
        if self.reference_chosen_error is None or self.reference_rejected_error is None:
            raise LookupError("this batch has no errors of the reference; only reference.residency cached gives them")
        return self.reference_chosen_error, self.reference_rejected_error

    def image_noise(self) -> Tensor:
        """Return the noise of all N images, (N, C, H, W): a pair's images share theirs."""
        return self._per_image(self.noise)

    def image_input_noise(self) -> Tensor:
        """Return the noise in the denoiser's input for all N images, (N, C, H, W); it may differ from the target's."""
        return self._per_image(self.noise if self.input_noise is None else self.input_noise)

    def image_timesteps(self) -> Tensor:
        """Return the timesteps of all N images, (N,): a pair's images share theirs."""
        return self._per_image(self.timesteps)

    def conditioning(self) -> Conditioning:
        """Return the conditioning of all N images: the prompt is the pair's, the size each image's own."""
        return Conditioning(
            text_states=self._per_image(self.text_states),
            pooled=None if self.pooled is None else self._per_image(self.pooled),
            extras=self.extras,
        )

    def _per_image(self, shared: Tensor) -> Tensor:
        return shared if len(self.latents) == self.num_pairs else repeat_for_pair(shared)


def stack_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Join chosen (B, ...) and rejected (B, ...) into (N, ...): all chosen, then all rejected."""
    return torch.cat([chosen, rejected])


def split_pair(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen and the rejected half of (N, ...), each (B, ...)."""
    chosen, rejected = stacked.chunk(2)
    return chosen, rejected


def repeat_for_pair(shared: Tensor) -> Tensor:
    """Give both images of each pair the pair's own value: (B, ...) -> (N, ...)."""
    return torch.cat([shared, shared])
