"""Every name under which a field may be given beside its dotted one, and names that are explained instead of taken."""

from __future__ import annotations

from ds_dpo.config.families import FAMILY_NAMES
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.config.optimization import NO_ADAFACTOR
from ds_dpo.config.terms import TermsConfig

# Names without a section, shown first in --help.
FLAT_NAMES = {
    "pairs_per_step": "batch.pairs_per_step",
    "micro_batch_pairs": "batch.micro_batch_pairs",
    "learning_rate": "optimizer.learning_rate",
    "beta": "objective.beta",
    "warmup_steps": "schedule.warmup_steps",
    "resolution": "data.resolution",
    "dataset": "data.dataset",
    "pretrained": "model.pretrained",
}

# What fields were called in earlier versions, whose files and commands go on working.
RENAMED = {"model.unet_init": "model.denoiser_init"}

# Names of diffusers', the authors' and transformers' training scripts, only where the meaning is the same.
ALIASES = {
    **RENAMED,
    "pretrained_model_name_or_path": "model.pretrained",
    "pretrained_vae_model_name_or_path": "model.vae",
    "revision": "model.revision",
    "variant": "model.variant",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "dataset_name": "data.dataset",
    "dataset_split_name": "data.split",
    "split": "data.split",
    "cache_dir": "data.cache_dir",
    "report_to": "trackers",
    "proportion_empty_prompts": "data.prompt_dropout",
    "dataloader_num_workers": "data.workers",
    "noise_offset": "diffusion.noise_offset",
    "input_perturbation": "diffusion.input_perturbation",
    "snr_gamma": "diffusion.snr_gamma",
    **{
        name: f"objective.{field}"
        for objective in OBJECTIVE_SECTIONS.values()
        for name, field in objective.also_named.items()
    },
    **{name: f"terms.{field}" for name, field in TermsConfig.also_named.items()},
    "per_device_train_batch_size": "batch.micro_batch_pairs",
    "lr": "optimizer.learning_rate",
    "adam_beta1": "optimizer.adam_beta1",
    "adam_beta2": "optimizer.adam_beta2",
    "adam_weight_decay": "optimizer.weight_decay",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.epsilon",
    "max_grad_norm": "optimizer.max_grad_norm",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "lr_warmup_steps": "schedule.warmup_steps",
    "lr_num_cycles": "schedule.num_cycles",
    "lr_power": "schedule.power",
    "rank": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "logging_steps": "cadence.log_every_steps",
    "checkpointing_steps": "cadence.save_every_steps",
    "save_steps": "cadence.save_every_steps",
    "checkpoints_total_limit": "cadence.keep_checkpoints",
    "save_total_limit": "cadence.keep_checkpoints",
    "validation_steps": "cadence.sample_every_steps",
    "validation_prompts": "validation.prompts",
    "num_inference_steps": "validation.num_inference_steps",
    "guidance_scale": "validation.guidance_scale",
    "max_steps": "max_train_steps",
}

# Names that users of those scripts will try, where nothing here means the same.
_PRECISION = "precision is set in the file of --deepspeed_config, such as zero2_bf16 or zero2_fp16"
_OBJECTIVES = f"give --objective.type, one of {', '.join(OBJECTIVE_SECTIONS)}"
EXPLAINED: dict[str, str] = {
    "scale_lr": "the learning rate is never scaled: give the effective rate as --learning_rate (the authors' sdxl.sh: "
    "1e-8 x 2048 = 2.048e-5)",
    "train_batch_size": "it means one rank's pairs in diffusers and all ranks' pairs in DeepSpeed: give "
    "--micro_batch_pairs (one rank, at once) or --pairs_per_step (all ranks, one optimizer step)",
    "gradient_accumulation_steps": "it follows from --pairs_per_step, --micro_batch_pairs and the number of ranks",
    "num_train_epochs": "give --max_train_steps; an epoch has (number of pairs / pairs_per_step) steps",
    "deepspeed": "give --deepspeed_config NAME",
    "mixed_precision": _PRECISION,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "use_adafactor": NO_ADAFACTOR,
    "use_8bit_adam": "give --optimizer.type adamw_8bit",
    "timestep_bias_strategy": "give --diffusion.timestep_sampling, .min_timestep or .max_timestep",
    "rescale_betas_zero_snr": "give --diffusion.zero_terminal_snr",
    "use_lora": "give --adapter.type lora",
    "use_dora": "give --adapter.type dora",
    **{objective: f"give --objective.type {objective}" for objective in OBJECTIVE_SECTIONS},
    "train_method": _OBJECTIVES,
    "loss_type": f"{_OBJECTIVES}; the loss that is called sigmoid elsewhere is dpo",
    **{family: f"give --model.family {family}" for family in FAMILY_NAMES},
    "enable_xformers_memory_efficient_attention": "give --model.attention xformers",
    "resume_from_checkpoint": "the same command with the same --output_dir resumes its newest valid "
    "checkpoint; --resume STEP goes back to another one",
    "random_crop": "give --data.crop random",
    "random_flip": "give --data.flip shared (or independent, as the authors' code)",
    "no_hflip": "give --data.flip off",
    "train_data_dir": "give the folder or parquet file as --data.dataset",
    "validation_prompt": "give --validation.prompts, one or more",
    "wandb": "give --trackers tensorboard wandb",
    "use_wandb": "give --trackers tensorboard wandb",
    "logging_dir": "logs are written to --output_dir",
    "world_size": "the launcher sets the number of ranks; use it with --dry_run, or give --expected_world_size",
    "num_processes": "the launcher sets the number of ranks, as in deepspeed --num_gpus 8 ds_dpo/train.py",
}
