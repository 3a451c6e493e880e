"""The forward process of a run: the model's own, with the changes of the configuration."""

from __future__ import annotations

from dataclasses import replace

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.models import ModelConfig
from ds_dpo.diffusion.flow import FLOW_WEIGHTS, Flow
from ds_dpo.diffusion.forward_process import ForwardProcess
from ds_dpo.diffusion.noise_schedule import ERROR_WEIGHTS, NoiseSchedule
from ds_dpo.diffusion.shift import NO_SHIFT, Shift
from ds_dpo.errors import ConfigError
from ds_dpo.models.flow_scheduler import flow_of, is_flow, shift_by_tokens
from ds_dpo.models.loading import drawing_scheduler, read_noise_schedule, scheduler_config
from ds_dpo.models.sampler import Sampler, ddim_from

_Reasons = dict[tuple[str, object], str]
# why a value of the section `diffusion` has no sense for the process of the model that is loaded
_NOT_OF_A_FLOW: _Reasons = {
    ("timestep_sampling", "turbo"): "its four timesteps are those of a noise schedule; take uniform or logit_normal",
    ("zero_terminal_snr", True): "a flow ends in pure noise already; leave it out",
    **{
        ("error_weighting", name): f"its SNR is that of a noise schedule; {', '.join(FLOW_WEIGHTS)} would fit"
        for name in ERROR_WEIGHTS
    },
}
_ONLY_OF_A_FLOW: _Reasons = {
    ("timestep_sampling", "mode"): "it is defined for the times of a flow; take uniform or logit_normal",
    **{
        ("timestep_shift", name): "a noise schedule's timesteps are not shifted; leave it out"
        for name in ("none", "static", "by_resolution")
    },
    **{
        ("error_weighting", name): f"it is defined for a flow; none, {', '.join(ERROR_WEIGHTS)} would fit"
        for name in FLOW_WEIGHTS
        if name != "none"
    },
}


def training_schedule(model: ModelConfig, diffusion: DiffusionConfig) -> ForwardProcess:
    """Return a run's forward process and its weighting of errors: a noise schedule, or a flow.

    Raises ModelError as scheduler_config does, and ConfigError for a field of `diffusion` that belongs to the other.
    """
    return _flow(model, diffusion) if is_flow(scheduler_config(model)) else _noise_schedule(model, diffusion)


def _noise_schedule(model: ModelConfig, diffusion: DiffusionConfig) -> NoiseSchedule:
    _refuse(diffusion, _ONLY_OF_A_FLOW, what=f"{model.pretrained} has a noise schedule")
    schedule = read_noise_schedule(model)
    if diffusion.zero_terminal_snr:
        schedule = schedule.with_zero_terminal_snr()
    return replace(schedule, error_weighting=diffusion.error_weighting, snr_gamma=diffusion.snr_gamma)


def _flow(model: ModelConfig, diffusion: DiffusionConfig) -> Flow:
    what = f"{model.pretrained} is a flow model"
    _refuse(diffusion, _NOT_OF_A_FLOW, what=what)
    if diffusion.noise_offset:
        raise ConfigError(
            f"diffusion.noise_offset {diffusion.noise_offset:g}, but {what}: it ends in pure noise, from which images "
            "are drawn, and an offset would change that noise; leave it out"
        )
    flow = flow_of(scheduler_config(model), name=model.pretrained)
    return replace(flow, error_weighting=diffusion.error_weighting, shift=_shift(model, diffusion, flow))


def _shift(model: ModelConfig, diffusion: DiffusionConfig, flow: Flow) -> Shift:
    if diffusion.timestep_shift == "by_resolution":
        return Shift(by_tokens=shift_by_tokens(scheduler_config(model), name=model.pretrained))
    if diffusion.timestep_shift == "static":
        assert diffusion.shift is not None, "a validator requires it"
        return Shift(factor=diffusion.shift)
    return NO_SHIFT if diffusion.timestep_shift == "none" else flow.shift


def _refuse(diffusion: DiffusionConfig, reasons: _Reasons, *, what: str) -> None:
    for (name, value), reason in reasons.items():
        if getattr(diffusion, name) == value:
            shown = str(value).lower()
            raise ConfigError(f"diffusion.{name} {shown}, but {what}: {reason}")


def training_sampler(model: ModelConfig, diffusion: DiffusionConfig) -> Sampler:
    """Return the sampler of validation images: DDIM over the schedule that the model is trained with, or a flow's own.

    Raises ConfigError if a model that predicts epsilon would have to begin at a timestep without signal.
    """
    if is_flow(scheduler_config(model)):
        return drawing_scheduler(model)
    sampler = ddim_from(scheduler_config(model))
    if diffusion.zero_terminal_snr:
        sampler = ddim_from({**sampler.config, "rescale_betas_zero_snr": True})
    if sampler.config["prediction_type"] == "epsilon" and sampler.alphas_cumprod[-1] == 0:
        raise ConfigError(
            "images are drawn from the last timestep on, where zero terminal SNR leaves no signal, so that a predicted "
            "noise gives no clean latents; set model.prediction_type to v_prediction with a model made for it, or "
            "cadence.sample_every_steps to none"
        )
    return sampler
