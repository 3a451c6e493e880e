"""One micro-batch, from tensors to loss: the policy, the reference, their errors, the objective.

Legend: B pairs; N = 2B images (all chosen, then all rejected), or N = B if the objective uses only chosen images;
C,H,W latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning, PreferenceBatch, split_pair
from ds_dpo.diffusion.forward_process import ForwardProcess
from ds_dpo.diffusion.noise_schedule import paired_error_difference, squared_error
from ds_dpo.models.denoiser.predict import Predict
from ds_dpo.models.reference import Reference
from ds_dpo.objectives.losses import Objective
from ds_dpo.objectives.pair_errors import PairErrors, Quantity
from ds_dpo.objectives.statistics import Statistic
from ds_dpo.step.first_difference import Side, first_difference


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """loss: scalar with gradient, the mean over B pairs. pair_quantities: detached (B,) tensors by metric name."""

    loss: Tensor
    pair_quantities: dict[str, Tensor]


class PreferenceStep:
    """A function of a PreferenceBatch, independent of DeepSpeed, ranks and cadence."""

    def __init__(
        self,
        *,
        policy: nn.Module,
        predict: Predict,
        reference: Reference | None,
        schedule: ForwardProcess,
        objective: Objective,
        options: Mapping[str, Any],
        statistic: Statistic | None = None,
    ) -> None:
        """Join the parts.

        predict: calls the policy. reference: None if the objective uses none, or if each batch brings the reference's
        errors. options: the loss's keyword arguments. statistic: sets some of them from earlier steps.
        """
        assert (reference is not None) or objective.reference != "predictions"
        self._policy, self._predict = policy, predict
        self._reference = reference
        self._schedule = schedule
        self._objective = objective
        self._options = options
        self._statistic = statistic

    @property
    def compares_with_reference(self) -> bool:
        return self._objective.uses_reference

    @property
    def reads_reference_errors(self) -> bool:
        """Whether the batches must bring the reference's errors, because there is no reference."""
        return self._objective.uses_reference and self._reference is None

    def __call__(self, batch: PreferenceBatch) -> StepOutput:
        """Predict and compare one micro-batch, and compute its loss."""
        errors = self.errors(batch)
        options = self._options if self._statistic is None else {**self._options, **self._statistic.options()}
        # not divided by the weights' sum: the mean would then depend on the micro-batches of a step
        pair_losses = self._objective.loss(errors, **options) * batch.weights
        quantities = {"loss": pair_losses, **_pair_quantities(errors)}
        if self._objective.quantities is not None:
            quantities |= self._objective.quantities(errors, **options)
        return StepOutput(
            loss=pair_losses.mean(),
            pair_quantities={name: values.detach() for name, values in quantities.items()},
        )

    def errors(self, batch: PreferenceBatch) -> PairErrors:
        """Return the errors of the pairs of a batch, in fp32, with the policy's gradient attached."""
        return self._unweighted_errors(batch).weighted(self._schedule.error_weight(batch.timesteps))

    def _unweighted_errors(self, batch: PreferenceBatch) -> PairErrors:
        inputs = _noisy_inputs(batch, self._schedule, with_rejected=self._objective.uses_rejected)
        reference = None
        if self._objective.uses_reference and self._reference is not None:
            # first, without activations of the policy, whose backward pass then directly follows its forward pass
            reference = self._reference.predict(inputs.noisy_latents, inputs.denoiser_time, inputs.conditioning)
        prediction = self._predict(self._policy, inputs.noisy_latents, inputs.denoiser_time, inputs.conditioning)
        policy_error = squared_error(prediction, inputs.target)
        if not self._objective.uses_rejected:
            return PairErrors(policy_chosen_error=policy_error, target_probability=batch.target_probabilities)
        chosen_error, rejected_error = split_pair(policy_error)
        asked_for: dict[Quantity, Tensor] = {"policy_rejected_error": rejected_error}
        if self._objective.uses_residual_product:
            asked_for["residual_product"] = _residual_product(prediction, inputs.target)
        if reference is not None:
            asked_for |= self._compared(prediction, reference, inputs.target)
        elif self._objective.uses_reference:
            asked_for |= _compared_with_kept_errors(chosen_error, rejected_error, batch)
        return PairErrors(
            policy_chosen_error=chosen_error, target_probability=batch.target_probabilities, asked_for=asked_for
        )

    def _compared(self, prediction: Tensor, reference: Tensor, target: Tensor) -> dict[Quantity, Tensor]:
        """Return the quantities of both predictions, (N, C, H, W) each, that the objective asks for."""
        chosen_difference, rejected_difference = split_pair(paired_error_difference(prediction, reference, target))
        found: dict[Quantity, Tensor] = {
            "chosen_difference": chosen_difference,
            "rejected_difference": rejected_difference,
        }
        if self._objective.reference == "predictions":
            found["chosen_distance"], found["rejected_distance"] = split_pair(squared_error(prediction, reference))
        return found

    @torch.no_grad()
    def policy_errors(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return the policy's squared errors of chosen and rejected images, each (B,) fp32, without weights."""
        return squared_errors_of_pairs(self._policy, batch, self._schedule, predict=self._predict)

    @torch.no_grad()
    def differences(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Return |policy error - reference error| of each image, and this as a share of the reference's error.

        Both are (N,) fp32, and 0 while policy and reference hold the same weights and use the same kernels.
        """
        errors = self.errors(batch)
        policy_error = torch.cat([errors.policy_chosen_error, errors.policy_rejected_error])
        difference = torch.cat([errors.chosen_difference, errors.rejected_difference])
        return difference.abs(), share_of_error(difference, policy_error - difference)

    def largest_difference(self, batch: PreferenceBatch) -> float:
        """Return the largest |policy error - reference error| over a batch: 0 while both hold the same weights."""
        return float(self.differences(batch)[0].max())

    @torch.no_grad()
    def first_difference(self, batch: PreferenceBatch) -> str | None:
        """Say which module of the policy is the first to differ from the reference's, and how; None if none does.

        Every rank calls it, since ranks may share weights.
        """
        assert self._reference is not None, "a reference without a module has no modules to compare"
        inputs = _noisy_inputs(batch, self._schedule, with_rejected=self._objective.uses_rejected)
        given = (inputs.noisy_latents, inputs.denoiser_time, inputs.conditioning)
        return first_difference(
            Side(module=self._policy, predict=partial(self._predict, self._policy, *given)),
            Side(module=self._reference.module, predict=partial(self._reference.predict, *given)),
        )


def share_of_error(difference: Tensor, error: Tensor) -> Tensor:
    """Return |difference| as a share of a squared error, of the same shape."""
    return difference.abs() / error.clamp(min=1e-6)


@torch.no_grad()
def squared_errors_of_pairs(
    denoiser: nn.Module, batch: PreferenceBatch, schedule: ForwardProcess, *, predict: Predict
) -> tuple[Tensor, Tensor]:
    """Return a denoiser's squared errors of chosen and rejected images, each (B,) fp32, as a step would compute them.

    They are plain means over C,H,W; weights are applied when errors are compared.
    """
    inputs = _noisy_inputs(batch, schedule, with_rejected=True)
    prediction = predict(denoiser, inputs.noisy_latents, inputs.denoiser_time, inputs.conditioning)
    return split_pair(squared_error(prediction, inputs.target))


@dataclass(frozen=True, kw_only=True)
class _NoisyInputs:
    """noisy_latents, target: (N, C, H, W) fp32. denoiser_time: (N,), as ForwardProcess gives it."""

    noisy_latents: Tensor
    denoiser_time: Tensor
    conditioning: Conditioning
    target: Tensor


def _noisy_inputs(batch: PreferenceBatch, schedule: ForwardProcess, *, with_rejected: bool) -> _NoisyInputs:
    """Noise a batch's latents; both images of a pair get the same noise at the same timestep."""
    images = batch if with_rejected else batch.chosen_only()
    noise, timesteps = images.image_noise(), images.image_timesteps()
    return _NoisyInputs(
        noisy_latents=schedule.add_noise(images.latents, images.image_input_noise(), timesteps),
        denoiser_time=schedule.denoiser_time(timesteps),
        conditioning=images.conditioning(),
        target=schedule.target(images.latents, noise, timesteps),
    )


def _residual_product(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean product of a pair's residuals, (N, C, H, W) twice -> (B,) fp32, without gradient."""
    chosen, rejected = split_pair(prediction.detach().float() - target.float())
    return (chosen * rejected).mean(dim=(1, 2, 3))


def _compared_with_kept_errors(
    policy_chosen_error: Tensor, policy_rejected_error: Tensor, batch: PreferenceBatch
) -> dict[Quantity, Tensor]:
    """Return the differences from a reference whose errors are in the batch, up to the rounding of two means."""
    chosen_error, rejected_error = batch.reference_errors()
    return {
        "chosen_difference": policy_chosen_error - chosen_error,
        "rejected_difference": policy_rejected_error - rejected_error,
    }


def _pair_quantities(errors: PairErrors) -> dict[str, Tensor]:
    """Return the quantities of each pair for the log, (B,) each, with names of metrics.METRICS."""
    quantities = {"policy_chosen_error": errors.policy_chosen_error}
    if "policy_rejected_error" in errors.asked_for:
        quantities["policy_rejected_error"] = errors.policy_rejected_error
    if "chosen_difference" in errors.asked_for:
        gap = errors.difference_gap
        quantities |= {
            "reference_chosen_error": errors.policy_chosen_error - errors.chosen_difference,
            "reference_rejected_error": errors.policy_rejected_error - errors.rejected_difference,
            "chosen_difference": errors.chosen_difference,
            "rejected_difference": errors.rejected_difference,
            "implicit_margin": -gap,
            "absolute_margin": gap.abs(),
            "implicit_accuracy": _accuracy(gap, errors.target_probability),
        }
    if "chosen_distance" in errors.asked_for:
        quantities |= {"chosen_distance": errors.chosen_distance, "rejected_distance": errors.rejected_distance}
    return quantities


def _accuracy(gap: Tensor, target_probability: Tensor) -> Tensor:
    """Return 1 if the policy agrees with the label, else 0, (B,); equal counts half, as in the authors' code."""
    agrees = (gap < 0).float() + 0.5 * (gap == 0).float()
    # with a tie there is nothing to agree with
    return torch.where(target_probability == 0.5, 0.5, agrees)
