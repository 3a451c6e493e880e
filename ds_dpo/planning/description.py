"""Describe a whole run in words before it starts."""

from __future__ import annotations

import re
from pathlib import Path

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.families import LIMITS
from ds_dpo.config.held_out import HeldOutConfig
from ds_dpo.config.optimization import DECAYING_SCHEDULES
from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import ResolvedDeepSpeed, ranks_text
from ds_dpo.planning.recipes import far_from_recipes
from ds_dpo.planning.sizes import describe_sizes
from ds_dpo.precision import NEAR_ERRORS, Precision

OPTIMIZER_WORDS = {
    "adamw": "AdamW",
    "adamw_8bit": "AdamW with moments in 8 bit",
    "lion": "Lion",
    "lion_8bit": "Lion with its mean in 8 bit",
}
_RESIDENCY_WORDS = {
    "replicated": "a frozen copy on each rank",
    "zero3": "a frozen copy whose weights are divided among all ranks",
    "cpu": "a frozen copy in each rank's host memory, moved to the device block by block",
    "adapter": "the policy without its low-rank layers",
    "cached": "its errors were computed beforehand",
}


# by diffusion.error_weighting; those of a noise schedule are refused before training
FLOW_ERRORS = {
    "none": ", counted alike at each share of noise s; the error of the noise, which beta is for in SDXL, is (1 - s)^2 "
    "times it, so that the same beta is stronger here",
    "epsilon": " times (1 - s)^2, s being the share of noise: that is the error of the noise, as beta is for in SDXL",
    "x0": " times s^2, s being the share of noise: that is the error of the clean latents",
    "snr": "",
    "min_snr": "",
}


# names of models that draw in few steps; FLUX.2's klein is distilled, and klein-base is not
DISTILLED = re.compile(r"turbo|schnell|lightning|\blcm\b|hyper-|klein-(?!base)", re.IGNORECASE)


def describe(config: RunConfig, resolved: ResolvedDeepSpeed) -> list[str]:
    """Return lines that explain the numbers of a run in words."""
    batch, optimizer, schedule = config.batch, config.optimizer, config.schedule
    clipping = f"gradient norm clipped to {optimizer.max_grad_norm:g}" if optimizer.max_grad_norm else "no clipping"
    offloads = {"optimizer": resolved.offloads_optimizer, "weights": resolved.offloads_parameters}
    offloaded = " and ".join(name for name, is_offloaded in offloads.items() if is_offloaded)
    return [
        f"pairs per step: {batch.pairs_per_step} = {ranks_text(resolved.world_size)} x {batch.micro_batch_pairs} at "
        f"once x {resolved.accumulation_steps} accumulated",
        f"learning rate: peak {optimizer.learning_rate:g}, as given (not scaled by batch or ranks); {_shape(config)}",
        f"optimizer: {OPTIMIZER_WORDS[optimizer.type]}, weight decay {optimizer.weight_decay:g}, {clipping}",
        *config.objective.sentences(),
        *config.terms.sentences(),
        *_reference(config, resolved.precision),
        *_noising(config.diffusion),
        *_flow(config),
        *_held_out(config.held_out),
        f"DeepSpeed: ZeRO stage {resolved.stage}, {resolved.precision}, gradients accumulated in "
        f"{resolved.accumulation_precision}, offloaded to the CPU: {offloaded or 'nothing'} "
        f"({config.deepspeed_config})",
        *describe_sizes(config, resolved),
        f"pairs of the whole run: {batch.pairs_per_step * config.max_train_steps} in {config.max_train_steps} steps; "
        f"warm-up {100 * min(1.0, schedule.warmup_steps / config.max_train_steps):.0f} % of them",
        *_schedule_warnings(config),
        *far_from_recipes(config),
    ]


def _reference(config: RunConfig, precision: Precision) -> list[str]:
    """Return lines on what the policy is compared with and how exactly, and no line if there is no reference."""
    if config.objective.reference_need == "none":
        return []
    every_steps, decay = config.reference.refresh_every_steps, config.reference.ema_decay
    follows = f"; takes the policy's weights every {every_steps} steps" if every_steps else ""
    if decay is not None:
        follows = f"; moves after each update: {decay:g} x reference + {1 - decay:g} x policy"
    return [
        f"reference: {config.reference.residency}, {_RESIDENCY_WORDS[config.reference.residency]}{follows}",
        *_preflight(config, precision),
    ]


def _preflight(config: RunConfig, precision: Precision) -> list[str]:
    """Return a line on what the check before the first update allows, and no line if errors are cached."""
    if config.reference.residency == "cached":
        return []
    near = f"its errors may differ from the policy's by a share of up to {NEAR_ERRORS[precision]:g} in {precision}"
    allowed = {"exact": "the run starts only if policy and reference predict exactly the same", "near": near}
    return [f"preflight: {config.reference.preflight}, {allowed[config.reference.preflight]}"]


def _noising(diffusion: DiffusionConfig) -> list[str]:
    """Return a line with the noising options that differ from the authors', and no line if none does."""
    plain = DiffusionConfig().model_dump()
    chosen = {name: value for name, value in diffusion.model_dump().items() if value != plain[name]}
    return ["noising: " + ", ".join(f"{name} {str(value).lower()}" for name, value in chosen.items())] if chosen else []


def _flow(config: RunConfig) -> list[str]:
    """Return a line on what an error, and so beta, means for a flow model, and no line for another model."""
    if not LIMITS[config.model.family].is_flow:
        return []
    line = f"flow: an error is that of the velocity (noise - latents){FLOW_ERRORS[config.diffusion.error_weighting]}"
    return [line, *_few_steps(config.model.pretrained)]


def _few_steps(pretrained: str) -> list[str]:
    """Return a warning for a flow model that was distilled to few steps, by its name; see docs/flow.md."""
    if not DISTILLED.search(Path(pretrained).name):
        return []
    return [
        f"warning: model.pretrained {pretrained} is distilled to few sampling steps, by its name: a flow's loss trains "
        "it towards velocities of many steps, so that images of few steps blur; take the model that it was made from"
    ]


def _schedule_warnings(config: RunConfig) -> list[str]:
    """Return a line for each part of the run in which the learning rate is not what one expects; usually none."""
    schedule, steps = config.schedule, config.max_train_steps
    lines = []
    if schedule.warmup_steps > steps:
        lines.append(
            f"warning: schedule.warmup_steps {schedule.warmup_steps} is more than max_train_steps {steps}: the "
            f"learning rate ends at {100 * steps / schedule.warmup_steps:.0f} % of its peak"
        )
    end = schedule.decay_steps
    falls_to_zero = schedule.name in DECAYING_SCHEDULES and (schedule.name != "polynomial" or schedule.end_rate == 0)
    if end is not None and end < steps and falls_to_zero:
        lines.append(
            f"warning: the learning rate is 0 from step {end} on (schedule.decay_steps): steps {end + 1} to {steps} "
            "train nothing"
        )
    return lines


def _held_out(held_out: HeldOutConfig) -> list[str]:
    """Return a line on the share of prompts that is held out, and no line without a share."""
    if held_out.share is None:
        return []
    when = f"evaluated every {held_out.every_steps} steps" if held_out.every_steps else "evaluated never"
    unset = "" if held_out.every_steps else " (held_out.every_steps is unset)"
    return [f"held out: a share of {held_out.share:g} of the prompts, never trained on, {when}{unset}"]


def _shape(config: RunConfig) -> str:
    schedule = config.schedule
    if schedule.name in ("constant", "piecewise_constant"):
        return " ".join(["constant", *(["by", schedule.step_rules] if schedule.step_rules else [])])
    warmup = f"{schedule.warmup_steps} steps of warm-up, then "
    if schedule.name == "constant_with_warmup":
        return warmup + "constant"
    end = f"{schedule.end_rate:g}" if schedule.name == "polynomial" else "0"
    return warmup + f"{schedule.name} to {end} at step {schedule.decay_steps or config.max_train_steps}"
