"""The distribution of a run's timesteps: it can be drawn from, and asked for its quantiles.

Legend: T is the model's number of timesteps; timestep 0 has the least noise, T - 1 the most. A share of T is a time in
[0, 1]: timestep t is drawn as often as a time between t / T and (t + 1) / T.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, log, pi, sin
from statistics import NormalDist

import numpy as np

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.diffusion.shift import Shift, shifted
from ds_dpo.errors import ConfigError

# a range must keep this share of a distribution's draws: a smaller share is a mistake, and loses digits
SMALLEST_SHARE = 1e-6
TURBO_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class TimestepDistribution:
    """values: the timesteps, rising. cumulative: probability up to each one, the last is 1; None if all are equal."""

    values: Sequence[int]
    cumulative: Sequence[float] | None = None

    def at(self, latent_shape: tuple[int, int, int]) -> TimestepDistribution:
        """Return itself: it is the same for images of all sizes."""
        return self

    def draw(self, generator: np.random.Generator) -> int:
        """Draw a timestep with the next number of a generator."""
        if self.cumulative is None:
            # not by quantile: this is the draw of runs from before other distributions existed
            return self.values[int(generator.integers(len(self.values)))]
        return self.quantile(float(generator.random()))

    def quantile(self, share: float) -> int:
        """Return the timestep at a quantile, the inverse of the distribution. share: in [0, 1).

        The shares (i + 1/2) / n, i = 0 .. n - 1, give a grid of n timesteps with the distribution of training.
        """
        if self.cumulative is None:
            return self.values[int(share * len(self.values))]
        return self.values[bisect_right(self.cumulative, share)]


@dataclass(frozen=True, kw_only=True)
class TimestepsBySize:
    """Timesteps that depend on the size of an image, whose shift does. shift: by the number of tokens."""

    diffusion: DiffusionConfig
    num_train_timesteps: int
    shift: Shift

    @property
    def values(self) -> Sequence[int]:
        """The timesteps of all sizes, rising."""
        return _inside(self.diffusion, num_train_timesteps=self.num_train_timesteps)

    def at(self, latent_shape: tuple[int, int, int]) -> TimestepDistribution:
        """Return the distribution for images whose latents are (C, H, W)."""
        return _kept(self.diffusion, self.num_train_timesteps, self.shift.factor_at(latent_shape))


@lru_cache(maxsize=256)  # a run has as many as it has buckets
def _kept(diffusion: DiffusionConfig, num_train_timesteps: int, shift_factor: float) -> TimestepDistribution:
    return timestep_distribution(diffusion, num_train_timesteps=num_train_timesteps, shift_factor=shift_factor)


def timestep_distribution(
    diffusion: DiffusionConfig, *, num_train_timesteps: int, shift_factor: float = 1.0
) -> TimestepDistribution:
    """Return the distribution that a run draws its timesteps from.

    shift_factor: moves the times, see diffusion.shift; above 1 towards noise. A range removes the timesteps outside it,
    and keeps the proportions of those inside. Raises ConfigError if the range goes beyond the model's timesteps, or
    holds none or almost none of the draws.
    """
    inside = _inside(diffusion, num_train_timesteps=num_train_timesteps)
    if diffusion.timestep_sampling == "turbo":
        return _turbo(inside, num_train_timesteps=num_train_timesteps)
    if diffusion.timestep_sampling == "uniform" and shift_factor == 1:
        return TimestepDistribution(values=inside)
    below = BELOW[diffusion.timestep_sampling](diffusion)
    # shifted times are below an edge if the times before the shift are below the edge that is moved back
    edges = [shifted(edge / num_train_timesteps, 1 / shift_factor) for edge in range(inside[0], inside[-1] + 2)]
    cumulative = [below(edge) for edge in edges]
    share = cumulative[-1] - cumulative[0]
    if share < SMALLEST_SHARE:
        raise ConfigError(
            f"diffusion.{_words(diffusion, shift_factor)} gives a share of {share:.1g} of its draws to timesteps "
            f"{inside[0]} to {inside[-1]}; at least {SMALLEST_SHARE:g} is needed"
        )
    return TimestepDistribution(
        values=inside, cumulative=tuple((each - cumulative[0]) / share for each in cumulative[1:])
    )


def _inside(diffusion: DiffusionConfig, *, num_train_timesteps: int) -> range:
    """Return the timesteps of the range. Raises ConfigError if it goes beyond the model's."""
    last = num_train_timesteps - 1 if diffusion.max_timestep is None else diffusion.max_timestep
    if max(last, diffusion.min_timestep) >= num_train_timesteps:
        name = "max_timestep" if last >= num_train_timesteps else "min_timestep"
        raise ConfigError(
            f"diffusion.{name} {getattr(diffusion, name)}: the model has timesteps 0 to {num_train_timesteps - 1}"
        )
    return range(diffusion.min_timestep, last + 1)


def _words(diffusion: DiffusionConfig, shift_factor: float) -> str:
    words = {
        "logit_normal": f"logit_mean {diffusion.logit_mean:g} with logit_std {diffusion.logit_std:g}"
        if diffusion.logit_mean is not None
        else "",
        "mode": f"mode_scale {diffusion.mode_scale}",
    }.get(diffusion.timestep_sampling, f"timestep_sampling {diffusion.timestep_sampling}")
    return words if shift_factor == 1 else f"{words} and a shift of {shift_factor:.3g}"


def _turbo(inside: range, *, num_train_timesteps: int) -> TimestepDistribution:
    """Return SDXL-Turbo's four sampling timesteps, with equal probability: 249, 499, 749 and 999 of 1000.

    Source: SalesforceAIResearch/DiffusionDPO, train.py, `250 * timesteps_0_to_3 + 249`; for another T, diffusers'
    "trailing" spacing, which gives the same of 1000.
    """
    four = [round(num_train_timesteps * (step + 1) / TURBO_STEPS) - 1 for step in range(TURBO_STEPS)]
    values = tuple(timestep for timestep in four if timestep in inside)
    if not values:
        raise ConfigError(
            f"diffusion.timestep_sampling turbo draws {', '.join(map(str, four))}, none of which is between "
            f"min_timestep {inside[0]} and max_timestep {inside[-1]}"
        )
    return TimestepDistribution(values=values)


# ---- the probability that a time is below a share of T, before any shift ----


def _below_uniform(diffusion: DiffusionConfig) -> Callable[[float], float]:
    return lambda share: share


def _below_logit_normal(diffusion: DiffusionConfig) -> Callable[[float], float]:
    """Return the distribution of sigmoid(z) for a normal z. Source: arXiv:2403.03206, section 3.1."""
    mean, deviation = diffusion.logit_mean, diffusion.logit_std
    assert mean is not None, "a validator requires it"
    assert deviation is not None, "a validator requires it"
    normal = NormalDist(mean, deviation)

    def below(share: float) -> float:
        edge = _logit(share)
        return 0.0 if edge == -inf else 1.0 if edge == inf else normal.cdf(edge)

    return below


def _below_mode(diffusion: DiffusionConfig) -> Callable[[float], float]:
    """Return the distribution of v - m (sin^2(pi v / 2) - v) for a uniform v and mode_scale m.

    That is "mode sampling with heavy tails", 1 - u - m (cos^2(pi u / 2) - 1 + u), with v = 1 - u. It rises in v for the
    scales that the section accepts, so that its inverse is the distribution. Source: arXiv:2403.03206, section 3.1.
    """
    scale = diffusion.mode_scale
    assert scale is not None, "a validator requires it"

    def below(share: float) -> float:
        low, high = 0.0, 1.0
        while high - low > 1e-15:
            middle = (low + high) / 2
            if middle in (low, high):
                break
            is_below = middle - scale * (sin(pi * middle / 2) ** 2 - middle) < share
            low, high = (middle, high) if is_below else (low, middle)
        return high if share > 0 else 0.0

    return below


def _logit(share: float) -> float:
    if share in (0.0, 1.0):
        return -inf if share == 0.0 else inf
    return log(share / (1 - share))


BELOW: dict[str, Callable[[DiffusionConfig], Callable[[float], float]]] = {
    "uniform": _below_uniform,
    "logit_normal": _below_logit_normal,
    "mode": _below_mode,
}
