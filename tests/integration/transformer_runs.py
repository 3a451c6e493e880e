"""Runs of tiny transformers: each a way to divide, keep and recompute the same training; one in bf16."""

from __future__ import annotations

STEPS = 4
COMMON = {
    "config": "miniature",
    "max_train_steps": STEPS,
    "data.max_rows": 40,
    "batch.pairs_per_step": 4,
    "batch.micro_batch_pairs": 1,
    "objective.beta": 500,
    "optimizer.learning_rate": 1e-3,
    "schedule.warmup_steps": 0,
    "cadence.log_every_steps": 1,
    "cadence.save_every_steps": STEPS,
    "cadence.sample_every_steps": "none",
    "data.prompt_dropout": 0.3,
}
CHECKPOINTING = {"model.gradient_checkpointing": "true"}
LORA = {"adapter.type": "lora", "adapter.rank": 4, "optimizer.learning_rate": 1e-2}
# by group: runs whose curves must be one, with their ZeRO stage and further options
GROUPS: dict[str, dict[str, tuple[int, dict[str, object]]]] = {
    "full": {
        "zero1": (1, {}),
        "zero2_cpu_checkpointing": (
            2,
            {"reference.residency": "cpu", "batch.micro_batch_pairs": 2, **CHECKPOINTING},
        ),
        "zero3_zero3_checkpointing": (3, {"reference.residency": "zero3", **CHECKPOINTING}),
    },
    "lora": {
        "lora_zero1_adapter_checkpointing": (1, {**LORA, "reference.residency": "adapter", **CHECKPOINTING}),
        "lora_zero2_replicated": (2, LORA),
        "lora_zero3_adapter": (3, {**LORA, "reference.residency": "adapter"}),
    },
    "bf16": {"zero3_bf16": (3, {"deepspeed_config": "zero3_bf16", **CHECKPOINTING})},
}
DRAWN = "zero3_zero3_checkpointing"  # this run also draws images, with weights that are divided
# by family, what its runs have besides; a scale of guidance other than 1 changes predictions, and no first difference
FAMILIES: dict[str, dict[str, object]] = {"sd3": {}, "flux1": {"model.guidance": 2.5}, "flux2_klein": {}}
# FLUX.2's blocks are divided and kept as FLUX.1's are, so that its runs are those that differ most
RUNS_OF_FLUX2 = ("zero1", "zero3_zero3_checkpointing", "lora_zero1_adapter_checkpointing", "lora_zero3_adapter")


def names(family: str, group: str) -> list[str]:
    """Return the runs of a group that a family has."""
    return [name for name in GROUPS[group] if family != "flux2_klein" or name in RUNS_OF_FLUX2]


def settings(family: str, pipeline: str, out: str) -> dict[str, dict[str, object]]:
    """Return the options of every run of a family, by name; its folder is out/family/name."""
    found: dict[str, dict[str, object]] = {}
    for group, runs in GROUPS.items():
        for name in names(family, group):
            stage, options = runs[name]
            drawing = (
                {"cadence.sample_every_steps": STEPS, "validation.num_inference_steps": 2} if name == DRAWN else {}
            )
            place = {"output_dir": f"{out}/{family}/{name}", "model.pretrained": pipeline, "model.family": family}
            own = {"deepspeed_config": f"zero{stage}_fp32_cpu", **options, **drawing}
            found[name] = {**COMMON, **FAMILIES[family], **place, **own}
    return found
