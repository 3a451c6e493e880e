"""Statistics of earlier whole optimizer steps that an objective uses, never those of a micro-batch.

Each is a part of the run: it gets the reduced means of a step, so that it is the same on every rank and for every
division of a step into micro-batches, and every checkpoint has its state. A mean that is not finite does not change it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from ds_dpo.config.objective_section import AutomaticBetaFields, ObjectiveSection
from ds_dpo.run_part import RunPart


class Statistic(Protocol):
    """The present values of some keyword arguments of a loss."""

    def options(self) -> Mapping[str, float]:
        """Return the values by name; they change only between optimizer steps."""
        ...


class ObjectiveStatistic(RunPart, ABC):
    """A Statistic that follows the run."""

    @classmethod
    @abstractmethod
    def of(cls, config: ObjectiveSection) -> Self | None:
        """Return the statistic that an objective's section asks for, None if it asks for none."""

    @abstractmethod
    def options(self) -> Mapping[str, float]:
        """Return the present values; see Statistic."""


class KtoBaseline(ObjectiveStatistic):
    """kto's `baseline`: the mean of g = reference error - policy error over the previous step's images, at least 0.

    It represents the divergence of policy and reference, and is 0 in the first step.
    Source: arXiv:2402.01306, eq. 8 with its clamp; jacklishufan/diffusion-kto uses the mean of the micro-batch itself.
    """

    name = "kto_baseline"

    def __init__(self) -> None:
        self._baseline = 0.0

    @classmethod
    def of(cls, config: ObjectiveSection) -> Self:
        return cls()

    def options(self) -> Mapping[str, float]:
        return {"baseline": self._baseline}

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Update from a step's mean differences; returns the baseline that the step itself used."""
        used = self._baseline
        mean = -0.5 * (metrics["chosen_difference"] + metrics["rejected_difference"])
        if math.isfinite(mean):
            self._baseline = max(0.0, mean)
        return {"baseline": used}

    def state(self) -> dict[str, Any]:
        return {"baseline": self._baseline}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        self._baseline = float(state["baseline"])


class MeanProbability(ObjectiveStatistic):
    """alpha's `mean_probability`: the mean over the previous step's pairs of sigmoid(u), 1/2 in the first step.

    Source: yangli-lab/Diffusion_alpha-DPO_ICLR2026, which uses the mean of the micro-batch itself over all ranks.
    """

    name = "mean_probability"

    def __init__(self) -> None:
        self._mean = 0.5

    @classmethod
    def of(cls, config: ObjectiveSection) -> Self:
        return cls()

    def options(self) -> Mapping[str, float]:
        return {"mean_probability": self._mean}

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Update from a step's mean probability of the labels; returns the mean that the step itself used."""
        used = self._mean
        if math.isfinite(metrics["label_probability"]):
            self._mean = metrics["label_probability"]
        return {"mean_probability": used}

    def state(self) -> dict[str, Any]:
        return {"mean_probability": self._mean}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        self._mean = float(state["mean_probability"])


class AutomaticBeta(ObjectiveStatistic):
    """`beta` such that a pair with the running mean of |gap| has a given gradient factor.

    A pair with gap = -d has u = beta d / 2 and the factor sigmoid(-u), which is f if beta d / 2 = logit(1 - f): so
    beta = 2 logit(1 - f) / d, clamped. It is the start value until a gap is above 0, because in the first step policy
    and reference are equal.
    Source: auto_beta of bghira/SimpleTuner's Flow-DPO, which uses the mean of a micro-batch.
    """

    name = "automatic_beta"

    def __init__(
        self, *, beta: float, target_gradient_factor: float, beta_min: float, beta_max: float, gap_decay: float
    ) -> None:
        """Begin with beta. gap_decay: share of the running mean that a step keeps; 0: only the last step counts."""
        self._start = beta
        self._logit = math.log1p(-target_gradient_factor) - math.log(target_gradient_factor)
        self._beta_min, self._beta_max, self._gap_decay = beta_min, beta_max, gap_decay
        self._mean_absolute_gap: float | None = None

    @classmethod
    def of(cls, config: ObjectiveSection) -> Self | None:
        assert isinstance(config, AutomaticBetaFields)
        if config.target_gradient_factor is None:
            return None
        least, largest = config.beta_bounds
        return cls(
            beta=config.beta,
            target_gradient_factor=config.target_gradient_factor,
            beta_min=least,
            beta_max=largest,
            gap_decay=config.gap_decay,
        )

    def options(self) -> Mapping[str, float]:
        return {"beta": self._beta()}

    def _beta(self) -> float:
        if self._mean_absolute_gap is None:
            return self._start
        return min(self._beta_max, max(self._beta_min, 2 * self._logit / self._mean_absolute_gap))

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Update from a step's mean |gap|; returns the beta that the step itself used."""
        used = self._beta()
        gap = metrics["absolute_margin"]
        if math.isfinite(gap):
            self._mean_absolute_gap = self._averaged(gap)
        return {"beta": used}

    def _averaged(self, gap: float) -> float | None:
        if self._mean_absolute_gap is None:
            return gap if gap > 0 else None
        return self._gap_decay * self._mean_absolute_gap + (1 - self._gap_decay) * gap

    def state(self) -> dict[str, Any]:
        return {"mean_absolute_gap": self._mean_absolute_gap}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        gap = state["mean_absolute_gap"]
        self._mean_absolute_gap = None if gap is None else float(gap)
