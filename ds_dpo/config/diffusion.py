"""The section on the forward process: which timesteps are drawn, which noise is added, how errors are weighted."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ds_dpo.config.base import Section, identity_field


class DiffusionConfig(Section):
    """How training images are noised. The defaults are the authors': uniform timesteps and plain normal noise.

    A cache of encoded pairs depends on none of these fields.
    """

    timestep_sampling: Literal["uniform", "logit_normal", "turbo"] = identity_field(
        "Distribution of training timesteps. uniform: all alike. logit_normal: floor(T sigmoid(z)) with a normal z. "
        "turbo: only SDXL-Turbo's four timesteps.",
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
    error_weighting: Literal["none", "snr", "min_snr"] = identity_field(
        "Weight of an image's squared error by its timestep. none: every prediction error counts alike. snr: the clean "
        "latents' error is weighted by SNR. min_snr: it is weighted by min(SNR, snr_gamma).",
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
    def only_min_snr_has_a_gamma(self) -> DiffusionConfig:
        if self.error_weighting == "min_snr" and self.snr_gamma is None:
            raise ValueError("diffusion.error_weighting min_snr needs snr_gamma; the paper uses 5 (arXiv:2303.09556)")
        if self.error_weighting != "min_snr" and self.snr_gamma is not None:
            raise ValueError(
                f"diffusion.error_weighting {self.error_weighting} ignores snr_gamma {self.snr_gamma}; set it to "
                "min_snr, or snr_gamma to none"
            )
        return self
