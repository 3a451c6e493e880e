"""Latents as the tokens that some transformers take: patches of pixels, packed into channels outside of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Patches of side x side latent pixels, one token each; a side of 1 leaves latents as they are, (N, C, H, W).

    Source: diffusers, FluxPipeline._pack_latents: a token has its patch's pixels of one channel after the other.
    """

    side: int = 1

    def pack(self, latents: Tensor) -> Tensor:
        """Return tokens (N, H W / side^2, C side^2) of latents (N, C, H, W), row by row."""
        if self.side == 1:
            return latents
        patches = latents.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpack(self, tokens: Tensor, *, height: int, width: int) -> Tensor:
        """Return latents (N, C, height, width) of tokens."""
        if self.side == 1:
            return tokens
        patches = tokens.unflatten(2, (-1, self.side, self.side))
        rows = patches.unflatten(1, (height // self.side, width // self.side))
        return rows.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def latent_channels(self, config: Mapping[str, Any]) -> int:
        """Return C for a denoiser's diffusers configuration, which counts channels of tokens."""
        return int(config["in_channels"]) // self.side**2

    def patch(self, config: Mapping[str, Any]) -> int:
        """Return the latent pixels along a side of a token, those that the network packs by itself included."""
        return self.side * int(config.get("patch_size") or 1)


NO_PACKING = Packing()
