"""The distribution of a run's timesteps: it can be drawn from, and asked for its quantiles.

Legend: T is the model's number of timesteps; timestep 0 has the least noise, T - 1 the most.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from statistics import NormalDist

import numpy as np

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.errors import ConfigError

# a range must keep this share of a distribution's draws: a smaller share is a mistake, and loses digits
SMALLEST_SHARE = 1e-6
TURBO_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class TimestepDistribution:
    """values: the timesteps, rising. cumulative: probability up to each one, the last is 1; None if all are equal."""

    values: Sequence[int]
    cumulative: Sequence[float] | None = None

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


def timestep_distribution(diffusion: DiffusionConfig, *, num_train_timesteps: int) -> TimestepDistribution:
    """Return the distribution that a run draws its timesteps from.

    A range removes the timesteps outside it, and keeps the proportions of those inside. Raises ConfigError if the range
    goes beyond the model's timesteps, or holds none or almost none of the draws.
    """
    last = num_train_timesteps - 1 if diffusion.max_timestep is None else diffusion.max_timestep
    if max(last, diffusion.min_timestep) >= num_train_timesteps:
        name = "max_timestep" if last >= num_train_timesteps else "min_timestep"
        raise ConfigError(
            f"diffusion.{name} {getattr(diffusion, name)}: the model has timesteps 0 to {num_train_timesteps - 1}"
        )
    inside = range(diffusion.min_timestep, last + 1)
    if diffusion.timestep_sampling == "turbo":
        return _turbo(inside, num_train_timesteps=num_train_timesteps)
    mean, deviation = diffusion.logit_mean, diffusion.logit_std
    if mean is not None and deviation is not None:  # given for logit_normal, and for nothing else
        return _logit_normal(NormalDist(mean, deviation), inside, num_train_timesteps=num_train_timesteps)
    return TimestepDistribution(values=inside)


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


def _logit_normal(normal: NormalDist, inside: range, *, num_train_timesteps: int) -> TimestepDistribution:
    """Return the distribution of floor(T sigmoid(z)) for a normal z.

    Source: arXiv:2403.03206, section 3.1 (t there is t / T here).
    """
    edges = [_logit(edge / num_train_timesteps) for edge in range(inside[0], inside[-1] + 2)]
    below = [0.0 if edge == -inf else 1.0 if edge == inf else normal.cdf(edge) for edge in edges]
    share = below[-1] - below[0]
    if share < SMALLEST_SHARE:
        raise ConfigError(
            f"diffusion.logit_mean {normal.mean:g} with logit_std {normal.stdev:g} gives a share of "
            f"{share:.1g} of its draws to timesteps {inside[0]} to {inside[-1]}; at least {SMALLEST_SHARE:g} is needed"
        )
    return TimestepDistribution(values=inside, cumulative=tuple((each - below[0]) / share for each in below[1:]))


def _logit(share: float) -> float:
    if share in (0.0, 1.0):
        return -inf if share == 0.0 else inf
    return log(share / (1 - share))
