"""The runs whose behaviour is recorded, as options of train.py."""

from __future__ import annotations

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
# The options without which an objective does not start; the rest are its defaults.
BETA = {"objective.beta": 500}
OBJECTIVES: dict[str, dict[str, object]] = {
    "dpo": BETA,
    "ipo": BETA,
    "hinge": BETA,
    "dmpo": BETA,
    "sdpo": BETA,
    "kto": {**BETA, "objective.undesirable_weight": 0.02},
    "mapo": {},
    "orpo": {},
    "dspo": {**BETA, "objective.shift": 0.05},
    "sft": {},
}
LORA = {"adapter.type": "lora", "adapter.rank": 4, "optimizer.learning_rate": 1e-2}
SHORT_RUNS: dict[str, dict[str, object]] = {
    **{f"objective_{name}": {"objective.type": name, **options} for name, options in OBJECTIVES.items()},
    "automatic_beta": {"objective.target_gradient_factor": 0.3, "objective.gap_decay": 0.8},
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
    "lora": LORA,
    "lora_adapter_reference": {**LORA, "reference.residency": "adapter"},
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


def spell(options: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]
