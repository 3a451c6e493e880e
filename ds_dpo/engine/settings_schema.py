"""The part of DeepSpeed's JSON that a run may state, and the ZeRO stages that use each option.

DeepSpeed 0.19.8 ignores unknown keys at the top level, reads "auto" as false or as a default, and accepts options
that the chosen stage never uses. So a file is checked here first, and all that DeepSpeed would ignore is refused.
Source: deepspeed/runtime/config.py, runtime/engine.py (_configure_zero_optimizer), runtime/zero/config.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ds_dpo.precision import Precision

Stage = Literal[1, 2, 3]


def _not_a_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("the option is not a switch that can be true or false")
    return value


Count = Annotated[int, BeforeValidator(_not_a_switch), Field(ge=0)]  # accepts 5e8, but not 5.5 or true
Number = Annotated[float, BeforeValidator(_not_a_switch), Field(ge=0)]
Switch = Annotated[bool, Field(strict=True)]


def option(*stages: int, default: Any = None) -> Any:
    """Return the field of a ZeRO option. stages: those that use it."""
    return Field(default=default, json_schema_extra={"stages": list(stages)})


class Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OffloadOptimizer(Block):
    """Keeps AdamW's state, and does its update, on the CPU."""

    device: Literal["cpu"]
    pin_memory: Switch = True


class OffloadParam(Block):
    """Keeps ZeRO-3's 16-bit weights on the CPU between uses."""

    device: Literal["cpu"]
    pin_memory: Switch = True


class ZeroOptimization(Block):
    """Options of ZeRO. Sizes, thresholds, distances and numbers of parameters are element counts."""

    stage: Annotated[Stage, BeforeValidator(_not_a_switch)]
    contiguous_gradients: Switch = option(1, 2, 3)
    reduce_scatter: Switch = option(1, 2, 3)
    reduce_bucket_size: Count = option(1, 2, 3)
    overlap_comm: Switch = option(1, 2, 3)
    offload_optimizer: OffloadOptimizer = option(1, 2, 3)
    allgather_bucket_size: Annotated[Count, Field(multiple_of=2)] = option(1, 2)  # odd ones fail an assertion
    use_multi_rank_bucket_allreduce: Switch = option(1, 2)
    round_robin_gradients: Switch = option(1, 2)
    parameter_alignment: Switch = option(1, 2)
    ignore_unused_parameters: Switch = option(2)
    offload_param: OffloadParam = option(3)
    sub_group_size: Count = option(3)
    stage3_prefetch_bucket_size: Count = option(3)
    stage3_param_persistence_threshold: Count = option(3)
    stage3_model_persistence_threshold: Count = option(3)
    stage3_max_live_parameters: Count = option(3)
    stage3_max_reuse_distance: Count = option(3)
    stage3_module_granularity_threshold: Count = option(3)
    stage3_use_all_reduce_for_fetch_params: Switch = option(3)
    stage3_allgather_sequential: Switch = option(3)
    zero_hpz_partition_size: Annotated[Count, Field(ge=1)] = option(3)
    zero_quantized_weights: Switch = option(3)
    zero_quantized_gradients: Switch = option(3)


def _always_on(value: Any) -> Any:
    if value is False:
        raise ValueError("updates with gradients that are not finite are always skipped; set it to true")
    return value


class Bf16(Block):
    enabled: Switch
    # with false, ZeRO-1 and 2 would apply an update whose gradients are not finite
    check_grad_overflow: Annotated[Switch, BeforeValidator(_always_on)] = True


class Fp16(Block):
    enabled: Switch
    loss_scale: Number = 0  # 0: dynamic
    initial_scale_power: Count = 16
    loss_scale_window: Annotated[Count, Field(ge=1)] = 1000
    hysteresis: Count = 2
    consecutive_hysteresis: Switch = False
    min_loss_scale: Annotated[Number, Field(gt=0)] = 1


class DataTypes(Block):
    grad_accum_dtype: Precision


class DeepSpeedFile(Block):
    """A file of ds_configs/. Options that it leaves out have DeepSpeed's defaults, except batch and clipping."""

    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None
    gradient_clipping: Number | None = None
    zero_optimization: ZeroOptimization
    bf16: Bf16 | None = None
    fp16: Fp16 | None = None
    data_types: DataTypes | None = None
    communication_data_type: Precision | None = None
    zero_allow_untested_optimizer: Switch | None = None
    zero_force_ds_cpu_optimizer: Switch = False


BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
# Keys that may be "auto", which means the same as leaving the key out.
AUTO_KEYS = (*BATCH_KEYS, "gradient_clipping")

# Options that an engine without an optimizer uses: how ZeRO-3 gathers weights for a forward pass. A file of stage 1 or
# 2 may have the first ones too, for a reference of residency zero3; the others mean something else there, or nothing.
GATHERING_OPTIONS_AT_ANY_STAGE = (
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params",
)
GATHERING_OPTIONS_AT_STAGE_3 = ("overlap_comm", "offload_param", "zero_hpz_partition_size", "zero_quantized_weights")

_OWN_METRICS = "the run writes its own metrics.jsonl and TensorBoard logs"
_RUN_OWNS = "the run configuration sets it"
_REMOVED = "DeepSpeed has removed it"

# Keys that DeepSpeed knows, or knew, but that a run must not set, each with the reason.
REFUSED = {
    "optimizer": f"{_RUN_OWNS}: --optimizer.learning_rate and others",
    "scheduler": f"{_RUN_OWNS}: --schedule.name and others",
    "activation_checkpointing": "it only configures deepspeed.checkpointing, which diffusers does not call; "
    "give --model.gradient_checkpointing",
    "torch_autocast": "policy and reference must compute in one visible precision; give bf16 or fp16",
    "amp": "give bf16 or fp16",
    "bfloat16": "its name is bf16",
    "tensorboard": _OWN_METRICS,
    "csv_monitor": _OWN_METRICS,
    "wandb": _OWN_METRICS,
    "comet": _OWN_METRICS,
    "steps_per_print": f"{_OWN_METRICS}; give --cadence.log_every_steps",
    "wall_clock_breakdown": _OWN_METRICS,
    "memory_breakdown": _OWN_METRICS,
    "flops_profiler": _OWN_METRICS,
    "comms_logger": _OWN_METRICS,
    "dump_state": "the resolved settings are in the run folder's deepspeed.json",
    "checkpoint": "the run sets it for its own checkpoints",
    "compile": "DeepCompile needs engine.compile(), which a run does not call",
    "prescale_gradients": "ZeRO with reduce_scatter refuses it",
    "gradient_predivide_factor": "ZeRO with reduce_scatter refuses it",
    "gradient_allreduce_op": "pairs_per_step means the mean over all ranks",
    "aio": "offload to NVMe is not supported; give device cpu",
    "elasticity": f"{_REMOVED}; checkpoints and batch do not need it here",
    "dataloader_drop_last": "the run has its own loader",
    "data_efficiency": "the run has its own loader",
    "curriculum_learning": _REMOVED,
    "sparse_gradients": _REMOVED,
    "compression_training": _REMOVED,
    "hybrid_engine": "it is for generating text",
    "zero_optimization.cpu_offload": "its name is offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "its name is offload_param: {device: cpu}",
    "zero_optimization.compute_grad_norm": "each step logs the gradient norm",
    "zero_optimization.allgather_partitions": "DeepSpeed 0.19 does not read it",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "scripts/consolidate.py exports from the shards",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "scripts/consolidate.py exports from the shards",
    "zero_optimization.elastic_checkpoint": _REMOVED,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.zero_quantized_nontrainable_weights": "the reference is not part of the engine",
    "bf16.bf16_master_weights_and_grads": "updates with rates of 1e-5 are lost in bf16 master weights",
    "bf16.bf16_optimizer_states": "updates with rates of 1e-5 are lost in bf16 master weights",
    "bf16.immediate_grad_update": "only ZeRO-1's BF16 optimizer reads it, to save memory that SDXL does not need",
    "fp16.auto_cast": "latents and embeddings already have the right precision",
    "fp16.fp16_master_weights_and_grads": "updates with rates of 1e-5 are lost in fp16 master weights",
    "zero_optimization.offload_optimizer.ratio": "either the whole state is offloaded or nothing",
    "zero_optimization.offload_optimizer.nvme_path": "offload to NVMe is not supported; give device cpu",
    "zero_optimization.offload_param.nvme_path": "offload to NVMe is not supported; give device cpu",
}
