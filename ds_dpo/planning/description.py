"""Describe a whole run in words before it starts."""

from __future__ import annotations

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import ResolvedDeepSpeed, ranks_text
from ds_dpo.planning.recipes import far_from_recipes

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
        *_reference(config),
        *_noising(config.diffusion),
        f"DeepSpeed: ZeRO stage {resolved.stage}, {resolved.precision}, gradients accumulated in "
        f"{resolved.accumulation_precision}, offloaded to the CPU: {offloaded or 'nothing'} "
        f"({config.deepspeed_config})",
        f"pairs of the whole run: {batch.pairs_per_step * config.max_train_steps} in {config.max_train_steps} steps; "
        f"warm-up {100 * min(1.0, schedule.warmup_steps / config.max_train_steps):.0f} % of them",
        *far_from_recipes(config),
    ]


def _reference(config: RunConfig) -> list[str]:
    """Return a line on what the policy is compared with, and no line if there is no reference."""
    if config.objective.reference_need == "none":
        return []
    every_steps = config.reference.refresh_every_steps
    follows = f"; takes the policy's weights every {every_steps} steps" if every_steps else ""
    return [f"reference: {config.reference.residency}, {_RESIDENCY_WORDS[config.reference.residency]}{follows}"]


def _noising(diffusion: DiffusionConfig) -> list[str]:
    """Return a line with the noising options that differ from the authors', and no line if none does."""
    plain = DiffusionConfig().model_dump()
    chosen = {name: value for name, value in diffusion.model_dump().items() if value != plain[name]}
    return ["noising: " + ", ".join(f"{name} {str(value).lower()}" for name, value in chosen.items())] if chosen else []


def _shape(config: RunConfig) -> str:
    schedule = config.schedule
    if schedule.name in ("constant", "piecewise_constant"):
        return " ".join(["constant", *(["by", schedule.step_rules] if schedule.step_rules else [])])
    warmup = f"{schedule.warmup_steps} steps of warm-up, then "
    if schedule.name == "constant_with_warmup":
        return warmup + "constant"
    end = f"{schedule.end_rate:g}" if schedule.name == "polynomial" else "0"
    return warmup + f"{schedule.name} to {end} at step {schedule.decay_steps or config.max_train_steps}"
