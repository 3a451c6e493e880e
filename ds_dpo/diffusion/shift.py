"""How a flow's times are moved, for high resolutions towards noise.

Legend: s (sigma) the share of noise, from 0 (clean) to 1 (noise); k the factor of a shift, above 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShiftByTokens:
    """A shift whose factor grows with the number of latent tokens, as FlowMatchEulerDiscreteScheduler states it.

    Between the two numbers of tokens, and beyond them, mu is linear. The factor is e^mu if exponential, else mu itself.
    Source: diffusers' calculate_shift and time_shift; black-forest-labs/flux, sampling.py, get_lin_function.
    """

    base_tokens: int = 256
    base_shift: float = 0.5
    max_tokens: int = 4096
    max_shift: float = 1.15
    exponential: bool = True

    def factor(self, tokens: int) -> float:
        """Return k for a number of latent tokens of an image."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True, kw_only=True)
class Shift:
    """s' = k s / (1 + (k - 1) s): k above 1 moves times towards noise, below 1 towards clean images, 1 not at all.

    factor: k, if by_tokens is None. by_tokens: gives k by the resolution. patch: latent pixels along a side of a token.
    """

    factor: float = 1.0
    by_tokens: ShiftByTokens | None = None
    patch: int = 2

    def factor_at(self, latent_shape: tuple[int, int, int]) -> float:
        """Return k for images whose latents are (C, H, W)."""
        if self.by_tokens is None:
            return self.factor
        _, height, width = latent_shape
        return self.by_tokens.factor((height // self.patch) * (width // self.patch))


NO_SHIFT = Shift()


def shifted(sigma: float, factor: float) -> float:
    """Return s' = k s / (1 + (k - 1) s), exact at 0, at 1 and for a factor of 1; the factor 1 / k takes it back."""
    return sigma if factor == 1 else sigma / (sigma + (1 - sigma) / factor)
