"""The runs whose behaviour is recorded, as options of train.py.

Objectives and adapters are those of tests/integration, in this checkout also when another one is recorded.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "integration"))

from baseline_cases import OBJECTIVES
from invariance_cases import GROUPS

STEPS, HALF = 20, 10
MODEL = "ds_dpo://assets/miniature/model"
# The long runs: the miniature as it is shipped, in fp32.
RUN: dict[str, object] = {
    "config": "miniature",
    "deepspeed_config": "zero1_fp32_cpu",
    "max_train_steps": STEPS,
    "schedule.decay_steps": STEPS,
    "cadence.save_every_steps": HALF,
    "cadence.sample_every_steps": "none",
}
# Short runs, one after another in one process, each of which reaches code that the long ones do not.
SHORT: dict[str, object] = {
    **RUN,
    "max_train_steps": 3,
    "data.max_rows": 100,
    "batch.pairs_per_step": 4,
    "batch.micro_batch_pairs": 2,
    "cadence.save_every_steps": 3,
}
SHORT_RUNS: dict[str, dict[str, object]] = {
    **{f"objective_{name}": {"objective.type": name, **options} for name, options in OBJECTIVES.items()},
    "automatic_beta": GROUPS["automatic_beta"],
    "terms": {"terms.sft_weight": 0.1, "terms.anchor_weight": 0.1, "objective.label_smoothing": 0.1},
    "noising": {
        "diffusion.timestep_sampling": "logit_normal",
        "diffusion.logit_mean": 0,
        "diffusion.logit_std": 1,
        "diffusion.noise_offset": 0.05,
        "diffusion.input_perturbation": 0.1,
        "diffusion.error_weighting": "min_snr",
        "diffusion.snr_gamma": 5,
        "data.flip": "independent",
        "data.prompt_dropout": 0.3,
    },
    "moving_average": {"ema.decay": 0.3},
    "lora": GROUPS["lora"],
    "lora_adapter_reference": {**GROUPS["lora"], "reference.residency": "adapter"},
    "reference_in_host_memory": {"reference.residency": "cpu"},
    "recomputing": {"model.gradient_checkpointing": "true"},
    "held_out": {
        "held_out.every_steps": 1,
        "held_out.split": "validation_unique",
        "held_out.num_pairs": 8,
        "watchdog.max_rise": 2,
    },
    "images": {"cadence.sample_every_steps": 3, "validation.num_inference_steps": 2, "deepspeed_config": "zero2_bf16"},
    "zero2_bf16": {"deepspeed_config": "zero2_bf16"},
    "cached_latents": {"data.cache": "given/cache"},
    "cached_reference": {"reference.residency": "cached", "reference.cache": "given/reference"},
    "old_denoiser_option": {"model.unet_init": MODEL},
    # last: ZeRO-3 replaces torch's linear for the rest of a process
    "zero3": {"deepspeed_config": "zero3_fp32_cpu"},
    "zero3_reference": {"deepspeed_config": "zero3_fp32_cpu", "reference.residency": "zero3"},
}
