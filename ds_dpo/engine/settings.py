"""Make complete DeepSpeed settings from a file and the run configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings_file import deepspeed_config_path, ignored_options, precision_of_file, read_deepspeed_file
from ds_dpo.engine.settings_schema import BATCH_KEYS, GATHERING_OPTIONS_AT_ANY_STAGE, GATHERING_OPTIONS_AT_STAGE_3
from ds_dpo.errors import ConfigError
from ds_dpo.precision import Precision


@dataclass(frozen=True, kw_only=True)
class ResolvedDeepSpeed:
    """The settings for the engine, and those of them that the rest of a run uses."""

    settings: dict[str, Any]
    stage: int
    precision: Precision
    accumulation_precision: Precision
    accumulation_steps: int
    world_size: int
    offloads_optimizer: bool
    offloads_parameters: bool


def resolve_deepspeed(config: RunConfig, *, world_size: int) -> ResolvedDeepSpeed:
    """Return the complete DeepSpeed settings of a run on world_size ranks.

    Raises ConfigError for a missing file, unknown keys, a misplaced "auto", options that the stage ignores, values
    that contradict the run configuration, and a batch that does not divide.
    """
    if config.expected_world_size not in (None, world_size):
        raise ConfigError(
            f"expected_world_size is {config.expected_world_size}, but the launch has {ranks_text(world_size)}; check "
            "the launcher's --hostfile, --num_gpus or srun's --ntasks (`deepspeed` without its hostfile "
            "starts on this host alone)"
        )
    path = deepspeed_config_path(config.deepspeed_config)
    file = read_deepspeed_file(path)
    shares_reference = config.reference.residency == "zero3"
    ignored = list(ignored_options(file, world_size=world_size, shares_reference=shares_reference))
    if config.optimizer.type != "adamw" and "offload_optimizer" in file.zero_optimization.model_fields_set:
        ignored.append(
            f"zero_optimization.offload_optimizer with optimizer.type {config.optimizer.type}, which updates on the "
            "GPU; choose adamw, or leave the offload out"
        )
    if ignored:
        raise ConfigError("\n  ".join([f"{path} is not valid for this run:", *ignored]))
    accumulation_steps = accumulation(config, world_size=world_size)
    owned_by_run: dict[str, int | float] = {
        "train_batch_size": config.batch.pairs_per_step,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_pairs,
        "gradient_accumulation_steps": accumulation_steps,
        # always stated, because DeepSpeed's default clips to 1.0
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
    }
    if config.optimizer.type != "adamw":
        # the other optimizers update each element, or each block of 256, independently
        owned_by_run["zero_allow_untested_optimizer"] = True
    for key, value in owned_by_run.items():
        stated = getattr(file, key)
        if stated not in (None, value):
            raise ConfigError(
                f'{path}: {key} is {stated}, but the run configuration sets it to {value}; write "auto" or leave it out'
            )
    settings = {
        **file.model_dump(exclude_unset=True, exclude_none=True),
        **owned_by_run,
        # without this DeepSpeed refuses torch's AdamW with offload
        "zero_force_ds_cpu_optimizer": False,
        # ranks that save under different tags fail instead of printing a warning
        "checkpoint": {"tag_validation": "Fail"},
    }
    precision = precision_of_file(file)
    return ResolvedDeepSpeed(
        settings=settings,
        stage=file.zero_optimization.stage,
        precision=precision,
        accumulation_precision=file.data_types.grad_accum_dtype if file.data_types else precision,
        accumulation_steps=accumulation_steps,
        world_size=world_size,
        offloads_optimizer="offload_optimizer" in file.zero_optimization.model_fields_set,
        offloads_parameters="offload_param" in file.zero_optimization.model_fields_set,
    )


def reference_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a second engine that only predicts: the reference, divided among all ranks.

    settings: the run's complete settings. Batch, precision and the options for gathering weights are kept. The stage is
    always 3, because no other ZeRO stage divides the weights.
    """
    zero = settings["zero_optimization"]
    stage_3 = GATHERING_OPTIONS_AT_STAGE_3 if zero["stage"] == 3 else ()
    gathering = {name: zero[name] for name in (*GATHERING_OPTIONS_AT_ANY_STAGE, *stage_3) if name in zero}
    return {
        **{name: settings[name] for name in (*BATCH_KEYS, "bf16", "fp16") if name in settings},
        # memory_efficient_linear would replace torch's linear in the whole process, the policy's too at stages 1 and 2
        "zero_optimization": {**gathering, "stage": 3, "memory_efficient_linear": False},
    }


def accumulation(config: RunConfig, *, world_size: int) -> int:
    """Return the number of micro-batches per rank and step. Raises ConfigError with values that would divide."""
    pairs, micro = config.batch.pairs_per_step, config.batch.micro_batch_pairs
    at_once = micro * world_size
    if pairs % at_once == 0:
        return pairs // at_once
    below = pairs // at_once * at_once
    nearest = [str(number) for number in (below, below + at_once) if number]
    message = (
        f"batch.pairs_per_step {pairs} is not a multiple of micro_batch_pairs {micro} x {ranks_text(world_size)} "
        f"= {at_once}; the nearest {'values' if below else 'value'} that would fit: {' and '.join(nearest)}"
    )
    if pairs % world_size == 0:
        share = pairs // world_size
        fitting = max(number for number in range(1, min(micro, share) + 1) if share % number == 0)
        message += f", or keep {pairs} with micro_batch_pairs {fitting}"
    raise ConfigError(message)


def ranks_text(world_size: int) -> str:
    """Return the number of ranks for a message: 1 rank, 2 ranks."""
    return "1 rank" if world_size == 1 else f"{world_size} ranks"
