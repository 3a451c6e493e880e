"""The table of all fields by dotted name, and every name under which a field may be given."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ds_dpo.config.optimization import NO_ADAFACTOR
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One field: its dotted name, what it may hold and what it means. kind: of one element, where it is a list."""

    path: str
    description: str
    is_identity: bool
    kind: type
    choices: tuple[str, ...]
    is_optional: bool
    is_list: bool
    default: Any

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]


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

# Names of diffusers', the authors' and transformers' training scripts, only where the meaning is the same.
ALIASES = {
    "pretrained_model_name_or_path": "model.pretrained",
    "pretrained_vae_model_name_or_path": "model.vae",
    "revision": "model.revision",
    "variant": "model.variant",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "dataset_name": "data.dataset",
    "dataset_split_name": "data.split",
    "split": "data.split",
    "cache_dir": "data.cache_dir",
    "proportion_empty_prompts": "data.prompt_dropout",
    "dataloader_num_workers": "data.workers",
    "noise_offset": "diffusion.noise_offset",
    "input_perturbation": "diffusion.input_perturbation",
    "snr_gamma": "diffusion.snr_gamma",
    "beta_dpo": "objective.beta",
    "label_smoothing": "objective.label_smoothing",
    "dmpo_alpha": "objective.alpha",
    "winner_preserving_mu": "objective.mu",
    "halo": "objective.utility",
    "lambda_d_kto": "objective.desirable_weight",
    "lambda_u_kto": "objective.undesirable_weight",
    "beta_mapo": "objective.ratio_weight",
    "beta_orpo": "objective.ratio_weight",
    "snr_value": "objective.snr_value",
    "sft_loss_weight": "terms.sft_weight",
    "anchor_alpha": "terms.anchor_weight",
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
EXPLAINED = {
    "scale_lr": "the rate is never scaled: give the effective one as --learning_rate (the authors' sdxl.sh: "
    "1e-8 x 2048 = 2.048e-5)",
    "train_batch_size": "it counts one rank's pairs in diffusers and all ranks' in DeepSpeed: give --micro_batch_pairs "
    "(a rank, at once) or --pairs_per_step (all ranks, an optimizer step)",
    "gradient_accumulation_steps": "it follows from --pairs_per_step, --micro_batch_pairs and the number of ranks",
    "num_train_epochs": "give --max_train_steps; an epoch has (number of pairs / pairs_per_step) of them",
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
    "sft": "give --objective.type sft",
    "train_method": "give --objective.type, such as dpo or sft",
    "loss_type": "give --objective.type, such as dpo (sigmoid), hinge or ipo",
    "sdxl": "give --model.family sdxl",
    "enable_xformers_memory_efficient_attention": "give --model.attention xformers",
    "resume_from_checkpoint": "the same command with the same --output_dir resumes its newest valid checkpoint",
    "random_crop": "give --data.crop random",
    "random_flip": "give --data.flip shared (or independent, as the authors' code)",
    "no_hflip": "give --data.flip off",
    "train_data_dir": "give the folder or parquet file as --data.dataset",
    "validation_prompt": "give --validation.prompts, one or more",
    "report_to": "a run always writes metrics.jsonl and TensorBoard logs",
    "logging_dir": "logs lie in --output_dir",
    "world_size": "the launcher says how many ranks there are; use it with --dry_run, or give --expected_world_size",
    "num_processes": "the launcher says how many ranks there are, as in deepspeed --num_gpus 8 ds_dpo/train.py",
}


def _walk(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted names and pydantic fields; the classes of a union one after another."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        sections = [part for part in (annotation, *get_args(annotation)) if _is_section(part)]
        if not sections:
            yield prefix + name, info
        for section in sections:
            yield from _walk(section, f"{prefix}{name}.")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _spec(path: str, info: FieldInfo) -> FieldSpec:
    annotation = info.annotation
    is_optional = get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation)
    if is_optional:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    is_list = get_origin(annotation) is list
    if is_list:
        annotation = get_args(annotation)[0]
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    extra = info.json_schema_extra
    assert isinstance(extra, dict), f"{path} is made with identity_field or free_field"
    return FieldSpec(
        path=path,
        description=info.description or "",
        is_identity=bool(extra["identity"]),
        kind=str if choices else annotation if isinstance(annotation, type) else str,
        choices=choices,
        is_optional=is_optional,
        is_list=is_list,
        default=None if info.is_required() else info.default,
    )


def _joined(first: FieldSpec, second: FieldSpec) -> FieldSpec:
    """Return the field of two classes of a union; it means the same in both, and `type` has the choices of both."""
    if first.path.endswith(".type"):
        return replace(first, choices=first.choices + second.choices)
    assert first == second, f"{first.path} means two things"
    return first


def _all_fields() -> dict[str, FieldSpec]:
    fields: dict[str, FieldSpec] = {}
    for path, info in _walk(RunConfig):
        spec = _spec(path, info)
        if path in fields:  # of a union's next class
            spec = _joined(fields[path], spec)
        fields[path] = spec
    return fields


FIELDS = _all_fields()
SECTIONS = tuple(dict.fromkeys(spec.section for spec in FIELDS.values() if spec.section))


def field_path(name: str, *, other_names: Iterable[str] = ()) -> str:
    """Return the dotted name of a field given by any of its names, with - or _.

    other_names: what else may be suggested. Raises ConfigError saying what was likely meant.
    """
    plain = name.replace("-", "_")
    path = FLAT_NAMES.get(plain) or ALIASES.get(plain) or plain
    if path in FIELDS:
        return path
    if plain in EXPLAINED:
        raise ConfigError(f"{name} is not taken: {EXPLAINED[plain]}")
    if plain in SECTIONS:
        inside = ", ".join(spec.path for spec in FIELDS.values() if spec.section == plain)
        raise ConfigError(f"{name} is a section; its fields are {inside}")
    near = did_you_mean(plain, [*FIELDS, *FLAT_NAMES, *ALIASES, *other_names])
    raise ConfigError(f"{name} is not known{near or '; --help lists all'}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean A or B?', or '' where nothing is near; a name without its section is compared too."""
    known = list(known)
    by_last_part = {option.rpartition(".")[2]: option for option in reversed(known)}
    near = get_close_matches(name, known, n=2, cutoff=0.7) or [
        by_last_part[part] for part in get_close_matches(name.rpartition(".")[2], by_last_part, n=2, cutoff=0.6)
    ]
    return f"; did you mean {' or '.join(near)}?" if near else ""
