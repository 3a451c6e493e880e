"""The section on the forward process: which timesteps are drawn, which noise is added, how errors are weighted."""

from __future__ import annotations

from math import pi
from typing import Literal

from pydantic import model_validator

from ds_dpo.config.base import Section, identity_field


class DiffusionConfig(Section):
    """How training images are noised. The defaults are the authors': uniform timesteps and plain normal noise.

    A cache of encoded pairs depends on none of these fields.
    """

    timestep_sampling: Literal["uniform", "logit_normal", "mode", "turbo"] = identity_field(
        "Distribution of training timesteps. uniform: all alike. logit_normal: floor(T sigmoid(z)) with a normal z. "
        "mode: Stable Diffusion 3's mode sampling with heavy tails. turbo: only SDXL-Turbo's four timesteps.",
        default="uniform",
    )
    min_timestep: int = identity_field("Smallest timestep that is drawn.", default=0, ge=0)
    max_timestep: int | None = identity_field(
        "Largest timestep that is drawn (the model's last if unset); 199 for SDXL's refiner.", default=None, ge=0
    )
    logit_mean: float | None = identity_field(
        "Mean of z, for logit_normal only. Above 0 draws noisier timesteps, below 0 cleaner ones.",
        default=None,
    )
    logit_std: float | None = identity_field("Standard deviation of z, for logit_normal only.", default=None, gt=0)
    mode_scale: float | None = identity_field(
        "Scale of mode sampling, for mode only. Above 0 draws the middle more often, below 0 both ends.",
        default=None,
        ge=-1,
        le=2 / (pi - 2),
    )
    timestep_shift: Literal["model", "none", "static", "by_resolution"] = identity_field(
        "How drawn times of a flow model are moved, after timestep_sampling. model: as its scheduler config says. "
        "none: not at all. static: by diffusion.shift. by_resolution: by the number of latent tokens, with the numbers "
        "of the scheduler config.",
        default="model",
    )
    shift: float | None = identity_field(
        "Factor k of the shift, for timestep_shift static only: the share of noise s becomes k s / (1 + (k - 1) s). "
        "Above 1 draws noisier timesteps, below 1 cleaner ones.",
        default=None,
        gt=0,
        le=1000,
    )
    zero_terminal_snr: bool = identity_field(
        "Rescale the noise schedule so that the last timestep is pure noise. A model whose scheduler asks for this "
        "gets it in any case.",
        default=False,
    )
    noise_offset: float = identity_field(
        "Add to the noise, also to that of the target, one normal draw per channel, times this (0: off).",
        default=0.0,
        ge=0,
    )
    input_perturbation: float = identity_field(
        "Add to the noise in the denoiser's input, but not to that of its target, a second normal noise, times this "
        "(0: off).",
        default=0.0,
        ge=0,
    )
    error_weighting: Literal["none", "snr", "min_snr", "epsilon", "x0"] = identity_field(
        "Weight of an image's squared error by its timestep. none: every prediction error counts alike. snr: the clean "
        "latents' error is weighted by SNR. min_snr: it is weighted by min(SNR, snr_gamma). For flow models only, with "
        "the share of noise s, epsilon: (1 - s)^2, every error of the noise counts alike; x0: s^2, every error of the "
        "clean latents does.",
        default="none",
    )
    snr_gamma: float | None = identity_field(
        "Largest weight of the clean latents' error, for min_snr only.", default=None, gt=0
    )

    @model_validator(mode="after")
    def the_range_holds_a_timestep(self) -> DiffusionConfig:
        if self.max_timestep is not None and self.max_timestep < self.min_timestep:
            raise ValueError(
                f"diffusion.max_timestep {self.max_timestep} is below diffusion.min_timestep {self.min_timestep}, so "
                "that no timestep can be drawn"
            )
        return self

    @model_validator(mode="after")
    def only_logit_normal_has_a_mean_and_a_deviation(self) -> DiffusionConfig:
        given = {name: getattr(self, name) for name in ("logit_mean", "logit_std")}
        if self.timestep_sampling == "logit_normal":
            if None in given.values():
                raise ValueError(
                    "diffusion.timestep_sampling logit_normal needs logit_mean and logit_std; the paper uses 0 and 1 "
                    "(arXiv:2403.03206)"
                )
            return self
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"diffusion.timestep_sampling {self.timestep_sampling} ignores {name} {value}; set it to "
                    f"logit_normal, or {name} to none"
                )
        return self

    @model_validator(mode="after")
    def only_mode_has_a_scale(self) -> DiffusionConfig:
        if self.timestep_sampling == "mode" and self.mode_scale is None:
            raise ValueError(
                "diffusion.timestep_sampling mode needs mode_scale; the paper's best is 1.29 (arXiv:2403.03206)"
            )
        if self.timestep_sampling != "mode" and self.mode_scale is not None:
            raise ValueError(
                f"diffusion.timestep_sampling {self.timestep_sampling} ignores mode_scale {self.mode_scale}; set it to "
                "mode, or mode_scale to none"
            )
        return self

    @model_validator(mode="after")
    def only_a_static_shift_has_a_factor(self) -> DiffusionConfig:
        if self.timestep_shift == "static" and self.shift is None:
            raise ValueError("diffusion.timestep_shift static needs shift; Stable Diffusion 3 has 3")
        if self.timestep_shift != "static" and self.shift is not None:
            raise ValueError(
                f"diffusion.timestep_shift {self.timestep_shift} ignores shift {self.shift:g}; set it to static, or "
                "shift to none"
            )
        return self

    @model_validator(mode="after")
    def only_min_snr_has_a_gamma(self) -> DiffusionConfig:
        if self.error_weighting == "min_snr" and self.snr_gamma is None:
            raise ValueError("diffusion.error_weighting min_snr needs snr_gamma; the paper uses 5 (arXiv:2303.09556)")
        if self.error_weighting != "min_snr" and self.snr_gamma is not None:
            raise ValueError(
                f"diffusion.error_weighting {self.error_weighting} ignores snr_gamma {self.snr_gamma}; set it to "
                "min_snr, or snr_gamma to none"
            )
        return self
