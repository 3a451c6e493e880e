"""Statistics of held-out errors: means over pairs with 95 % intervals, overall and by timestep decile.

The draws of a pair are not independent, so the pair is the unit: a pair's value is the mean over its draws.
Legend: P pairs; D deciles; K draws per decile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # the normal quantile of 0.975

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class GridErrors:
    """Squared errors of P pairs at each (decile, draw): (P, D, K) float64. start: those of the run's start."""

    chosen: Values
    rejected: Values
    start_chosen: Values
    start_rejected: Values

    @property
    def chosen_difference(self) -> Values:
        """Policy error minus reference error, chosen images."""
        return self.chosen - self.start_chosen

    @property
    def rejected_difference(self) -> Values:
        """Policy error minus reference error, rejected images."""
        return self.rejected - self.start_rejected

    @property
    def gap(self) -> Values:
        """The chosen minus the rejected difference; below 0 if the policy agrees with the label."""
        return self.chosen_difference - self.rejected_difference


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Estimates with the names in QUANTITIES: over all timesteps, and in each decile."""

    overall: Mapping[str, Estimate]
    deciles: tuple[Mapping[str, Estimate], ...]


# The quantities of each (pair, timestep, noise). loss and gradient_factor are those of plain DPO with the run's beta,
# for any objective, so that runs can be compared; they are left out if the objective has no beta.
QUANTITIES: dict[str, str] = {
    "accuracy": "share in which the policy favours the chosen image more than the reference; equal counts half",
    "margin": "rejected_difference - chosen_difference",
    "loss": "-log sigmoid(beta/2 margin), Diffusion-DPO's loss",
    "gradient_factor": "sigmoid(-beta/2 margin): 0.5 at the start, near 0 when a pair no longer changes the policy",
    "chosen_difference": "policy error minus reference error, chosen images",
    "rejected_difference": "policy error minus reference error, rejected images",
    "policy_chosen_error": "mean squared error of the policy's prediction, chosen images",
    "policy_rejected_error": "mean squared error of the policy's prediction, rejected images",
}


def summarize(errors: GridErrors, *, beta: float | None) -> Summary:
    """Return the estimates of a grid of at least 2 pairs. beta: None if the objective has none."""
    values = _quantities(errors, beta)
    deciles = tuple(
        {name: _estimate(name, of_all[:, decile].mean(axis=1)) for name, of_all in values.items()}
        for decile in range(errors.chosen.shape[1])
    )
    return Summary(overall={name: _estimate(name, by_pair(of_all)) for name, of_all in values.items()}, deciles=deciles)


def by_pair(values: Values) -> Values:
    """Return the mean of each pair over its deciles and draws: (P, D, K) -> (P,)."""
    return values.mean(axis=(1, 2))


def _quantities(errors: GridErrors, beta: float | None) -> dict[str, Values]:
    gap = errors.gap
    values = {
        # an error that is not finite counts as disagreement
        "accuracy": np.where(gap < 0, 1.0, np.where(gap == 0, 0.5, 0.0)),
        "margin": -gap,
        "chosen_difference": errors.chosen_difference,
        "rejected_difference": errors.rejected_difference,
        "policy_chosen_error": errors.chosen,
        "policy_rejected_error": errors.rejected,
    }
    if beta is not None:
        logits = -0.5 * beta * gap
        with np.errstate(invalid="ignore"):  # an error that is not finite gives a value that is not finite
            values["loss"] = np.logaddexp(0, -logits)
            values["gradient_factor"] = np.exp(-np.logaddexp(0, logits))
    return {name: values[name] for name in QUANTITIES if name in values}


def _estimate(name: str, of_pairs: Values) -> Estimate:
    interval: Callable[[Values], Estimate] = share_interval if name == "accuracy" else normal_interval
    return interval(of_pairs)


def normal_interval(of_pairs: Values) -> Estimate:
    """Return the mean of (P,) values, P at least 2, and its normal interval: plus and minus 1.96 standard errors."""
    mean = float(of_pairs.mean())
    half = Z_95 * float(of_pairs.std(ddof=1)) / math.sqrt(len(of_pairs))
    return Estimate(mean=mean, low=mean - half, high=mean + half)


def share_interval(of_pairs: Values) -> Estimate:
    """Return the mean of (P,) shares in 0..1 and its Wilson interval, which is within 0..1 and never empty.

    Shares of several draws vary less between pairs than single 0/1 outcomes: the pairs count as the number of 0/1
    outcomes that has their variance. If all pairs are equal, each counts once. Sources: Wilson, J. Am. Stat. Assoc.
    22 (1927) 209; for the effective number, Korn and Graubard, Survey Methodology 24 (1998) 193.
    """
    mean, variance = float(of_pairs.mean()), float(of_pairs.var())
    number = len(of_pairs) * (mean * (1 - mean) / variance if variance > 1e-12 else 1.0)
    middle = (mean + Z_95**2 / (2 * number)) / (1 + Z_95**2 / number)
    half = Z_95 * math.sqrt(mean * (1 - mean) / number + Z_95**2 / (4 * number**2)) / (1 + Z_95**2 / number)
    return Estimate(mean=mean, low=max(0.0, middle - half), high=min(1.0, middle + half))
