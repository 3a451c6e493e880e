"""The run configuration's section on the forward process: which timesteps, what noise, and how their errors count."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ds_dpo.config.base import Section, identity_field


class DiffusionConfig(Section):
    """How training images are noised; the defaults are the authors': any timestep alike, plain normal noise.

    A cache of encoded pairs follows from none of these.
    """

    timestep_sampling: Literal["uniform", "logit_normal", "turbo"] = identity_field(
        "which timesteps are drawn; logit_normal: floor(T sigmoid(normal draw)); turbo: SDXL-Turbo's four",
        default="uniform",
    )
    min_timestep: int = identity_field("timesteps below are not drawn", default=0, ge=0)
    max_timestep: int | None = identity_field(
        "timesteps above are not drawn (199 for SDXL's refiner); none: the model's last", default=None, ge=0
    )
    logit_mean: float | None = identity_field(
        "of logit_normal's draw; above 0: more noise, below: less; none: not logit_normal", default=None
    )
    logit_std: float | None = identity_field(
        "standard deviation of logit_normal's draw; none: not logit_normal", default=None, gt=0
    )
    zero_terminal_snr: bool = identity_field(
        "rescale the schedule so that the last timestep is noise alone; as it is where the model says so itself",
        default=False,
    )
    noise_offset: float = identity_field(
        "strength of a further normal draw for each channel, part of the noise and of the target", default=0.0, ge=0
    )
    input_perturbation: float = identity_field(
        "strength of a further normal draw in what the UNet is shown, not in the target", default=0.0, ge=0
    )
    error_weighting: Literal["none", "snr", "min_snr"] = identity_field(
        "weight of an image's error by its timestep, stated for the error in the clean latents; none: prediction's own",
        default="none",
    )
    snr_gamma: float | None = identity_field("min_snr caps the weight at this; none: not min_snr", default=None, gt=0)

    @model_validator(mode="after")
    def the_range_holds_a_timestep(self) -> DiffusionConfig:
        if self.max_timestep is not None and self.max_timestep < self.min_timestep:
            raise ValueError(
                f"diffusion.max_timestep {self.max_timestep} is below min_timestep {self.min_timestep}: no timestep is "
                "left to draw"
            )
        return self

    @model_validator(mode="after")
    def only_logit_normal_has_a_mean_and_a_deviation(self) -> DiffusionConfig:
        given = {name: getattr(self, name) for name in ("logit_mean", "logit_std")}
        if self.timestep_sampling == "logit_normal":
            if None in given.values():
                raise ValueError(
                    "diffusion.timestep_sampling logit_normal needs logit_mean and logit_std; 0 and 1 are the paper's "
                    "(arXiv:2403.03206)"
                )
            return self
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"diffusion.timestep_sampling {self.timestep_sampling} ignores {name} {value}; take logit_normal, "
                    f"or {name} none"
                )
        return self

    @model_validator(mode="after")
    def only_min_snr_has_a_gamma(self) -> DiffusionConfig:
        if self.error_weighting == "min_snr" and self.snr_gamma is None:
            raise ValueError(
                "diffusion.error_weighting min_snr needs snr_gamma; 5 is the paper's choice (arXiv:2303.09556)"
            )
        if self.error_weighting != "min_snr" and self.snr_gamma is not None:
            raise ValueError(
                f"diffusion.error_weighting {self.error_weighting} ignores snr_gamma {self.snr_gamma}; take min_snr, "
                "or snr_gamma none"
            )
        return self
