"""The whole run configuration: its small sections, and the rules between sections."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ds_dpo.config.base import PathText, Section, free_field, identity_field
from ds_dpo.config.cadence import CadenceConfig
from ds_dpo.config.data import DataConfig
from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.families import LIMITS
from ds_dpo.config.held_out import HeldOutConfig, WatchdogConfig
from ds_dpo.config.models import ModelConfig, ReferenceConfig
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS, ObjectiveConfig, SftConfig
from ds_dpo.config.optimization import AdapterConfig, NonFiniteConfig, OptimizerConfig, ScheduleConfig
from ds_dpo.config.supervision import SupervisionConfig
from ds_dpo.config.terms import TermsConfig

TrackerName = Literal["tensorboard", "wandb", "trackio"]


class BatchConfig(Section):
    """The pairs of an optimizer step; gradient accumulation follows from the number of ranks."""

    pairs_per_step: int = identity_field("Number of pairs per optimizer step, over all ranks.", ge=1)
    micro_batch_pairs: int = free_field(
        "Number of pairs that a rank computes at once; the denoiser sees 2N images.", ge=1
    )


class EmaConfig(Section):
    """A moving average of the master weights, which is saved with them and exported on request."""

    decay: float | None = identity_field(
        "Keep a moving average of the weights with this decay, warmed up as in diffusers' EMAModel (off if unset).",
        default=None,
        gt=0,
        lt=1,
    )


class ValidationConfig(Section):
    """Images drawn with the policy during training, always from the same noise."""

    prompts: list[str] = free_field("Prompts to draw; each is drawn with each seed.", default=[])
    seeds: list[int] = free_field("Seeds of the starting noise.", default=[0], min_length=1)
    num_inference_steps: int = free_field("Number of sampling steps per image.", default=30, ge=1)
    guidance_scale: float = free_field("Classifier-free guidance scale (1: off).", default=5.0, ge=1)
    scorers: list[str] = free_field(
        "Scorers of the validation images, such as pickscore or clip=FOLDER; docs/scorers.md lists them. Rank 0 loads "
        "them onto its device (no scorers: images are drawn and not scored).",
        default=[],
    )


class RunConfig(Section):
    """A whole run. The file that deepspeed_config names sets ZeRO, precision, offload and communication."""

    output_dir: PathText = free_field("Run folder. The same command resumes the run in it.")
    max_train_steps: int = free_field("Number of optimizer steps of the whole run.", ge=1)
    seed: int = identity_field(
        "Seed of the pairs' order, noise, timesteps, crops, flips and dropped prompts.", default=0, ge=0, lt=2**63
    )
    deepspeed_config: PathText = free_field(
        "DeepSpeed settings: name of a file in ds_configs/, or a path.", default="zero2_bf16"
    )
    expected_world_size: int | None = free_field(
        "Refuse to train with a number of ranks other than N, as after a mistyped hostfile (any number if unset).",
        default=None,
        ge=1,
    )
    deterministic: bool = free_field(
        "Take only GPU kernels that repeat a result to the bit, which are slower. An operation without one ends the "
        "run with its name.",
        default=False,
    )
    allow_tf32: bool = free_field(
        "Compute fp32 products and convolutions on a GPU in TF32, with 10 bits of mantissa: faster where "
        "model.vae_dtype is fp32.",
        default=False,
    )
    trackers: list[TrackerName] = free_field(
        "Where curves go beside metrics.jsonl, which is always written; wandb and trackio are extras to install.",
        default=["tensorboard"],
    )
    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    objective: ObjectiveConfig
    terms: TermsConfig = TermsConfig()
    reference: ReferenceConfig = ReferenceConfig()
    batch: BatchConfig
    optimizer: OptimizerConfig
    ema: EmaConfig = EmaConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    cadence: CadenceConfig = CadenceConfig()
    validation: ValidationConfig = ValidationConfig()
    held_out: HeldOutConfig = HeldOutConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    non_finite: NonFiniteConfig = NonFiniteConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    @model_validator(mode="after")
    def beside_an_adapter_all_is_frozen(self) -> RunConfig:
        for name in ("train", "freeze"):
            patterns = getattr(self.model, name)
            if patterns and self.adapter.type != "none":
                raise ValueError(
                    f"model.{name} {' '.join(patterns)} has no effect with adapter.type {self.adapter.type}, which "
                    "freezes the denoiser; choose layers with adapter.targets"
                )
        return self

    @model_validator(mode="after")
    def a_polynomial_falls(self) -> RunConfig:
        schedule, rate = self.schedule, self.optimizer.learning_rate
        if schedule.name != "polynomial":
            return self
        if schedule.end_rate >= rate:
            raise ValueError(
                f"schedule.end_rate {schedule.end_rate:g} must be below optimizer.learning_rate {rate:g}; 0 would fit"
            )
        end = schedule.decay_steps or self.max_train_steps
        if end <= schedule.warmup_steps:
            raise ValueError(
                f"schedule.warmup_steps {schedule.warmup_steps} must be below {end}, the step at which the decay ends"
            )
        return self

    @model_validator(mode="after")
    def a_decay_ends_after_the_warm_up(self) -> RunConfig:
        schedule = self.schedule
        if schedule.decay_steps is not None and schedule.warmup_steps > schedule.decay_steps:
            raise ValueError(
                f"schedule.warmup_steps {schedule.warmup_steps} is more than schedule.decay_steps "
                f"{schedule.decay_steps}, the step at which the decay ends; give fewer, or a later end"
            )
        return self

    @model_validator(mode="after")
    def drawing_needs_prompts(self) -> RunConfig:
        if self.cadence.sample_every_steps is not None and not self.validation.prompts:
            raise ValueError(
                f"cadence.sample_every_steps {self.cadence.sample_every_steps} has nothing to draw: give "
                "validation.prompts, or set sample_every_steps to none"
            )
        return self

    @model_validator(mode="after")
    def held_out_pairs_are_not_trained_on(self) -> RunConfig:
        data, held_out = self.data, self.held_out
        if held_out.every_steps is None or held_out.share is not None:
            return self
        split = held_out.split or data.split
        if held_out.dataset in (None, data.dataset) and split == data.split and held_out.name in (None, data.name):
            raise ValueError(
                f"held_out.every_steps {held_out.every_steps} would evaluate pairs that are trained on: split {split} "
                f"of {data.dataset}; give held_out.split, such as validation_unique, held_out.dataset, or "
                "held_out.share, such as 0.05"
            )
        return self

    @model_validator(mode="after")
    def a_window_is_not_for_held_out_pairs(self) -> RunConfig:
        if self.watchdog.window_steps is not None and self.held_out.every_steps is not None:
            raise ValueError(
                f"watchdog.window_steps {self.watchdog.window_steps} is ignored while held_out is on: the "
                "watchdog then reads its evaluations; set window_steps or held_out.every_steps to none"
            )
        return self

    @model_validator(mode="after")
    def a_watchdog_has_something_to_read(self) -> RunConfig:
        is_on = self.watchdog.action not in (None, "off") and self.watchdog.max_fall is None
        if is_on and self.held_out.every_steps is None and self.objective.reference_need == "none":
            raise ValueError(
                f"watchdog.action {self.watchdog.action} has nothing to read: objective.type {self.objective.type} "
                "trains without a reference; set held_out.every_steps, or watchdog.action to off"
            )
        return self

    @model_validator(mode="after")
    def the_best_checkpoint_has_an_evaluation(self) -> RunConfig:
        best = self.cadence.keep_best
        if best is None:
            if self.watchdog.max_fall is not None:
                raise ValueError(
                    f"watchdog.max_fall {self.watchdog.max_fall:g} has no metric to read; set cadence.keep_best, such "
                    "as held_out.accuracy"
                )
            return self
        if best.startswith("held_out.") and self.held_out.every_steps is None:
            raise ValueError(f"cadence.keep_best {best} is never evaluated: set held_out.every_steps")
        if best.startswith("validation.") and self.cadence.sample_every_steps is None:
            raise ValueError(f"cadence.keep_best {best} is never evaluated: set cadence.sample_every_steps")
        return self

    @model_validator(mode="after")
    def a_fall_is_watched_only_by_a_watchdog(self) -> RunConfig:
        if self.watchdog.max_fall is not None and self.watchdog.action == "off":
            raise ValueError(
                f"watchdog.action off ignores watchdog.max_fall {self.watchdog.max_fall:g}; set action to warn, "
                "lower_rate, roll_back or stop"
            )
        return self

    @model_validator(mode="after")
    def only_sdxl_is_conditioned_on_sizes(self) -> RunConfig:
        if not LIMITS[self.model.family].takes_sizes and self.data.size_conditioning != "fixed":
            raise ValueError(
                f"data.size_conditioning true has no effect on model.family {self.model.family}; leave it fixed"
            )
        return self

    @model_validator(mode="after")
    def only_distilled_families_are_given_guidance(self) -> RunConfig:
        family, guidance = self.model.family, self.model.guidance
        if guidance is not None and not LIMITS[family].takes_guidance:
            taking = ", ".join(name for name, limits in LIMITS.items() if limits.takes_guidance)
            raise ValueError(
                f"model.guidance {guidance:g} with model.family {family}: its denoisers take no scale of guidance, as "
                f"those of {taking} may; leave it out (validation.guidance_scale is for drawing)"
            )
        return self

    @model_validator(mode="after")
    def a_family_that_cannot_draw_draws_nothing(self) -> RunConfig:
        family, every_steps = self.model.family, self.cadence.sample_every_steps
        reason = LIMITS[family].undrawable
        if reason is not None and every_steps is not None:
            raise ValueError(
                f"cadence.sample_every_steps {every_steps} with model.family {family}: {reason}; give "
                "sample_every_steps none"
            )
        return self

    @model_validator(mode="after")
    def soft_targets_need_an_objective_that_takes_them(self) -> RunConfig:
        taking = ", ".join(name for name, section in OBJECTIVE_SECTIONS.items() if section.takes_soft_targets)
        for field, value in (("ties", "soft"), ("confidence", "target")):
            if getattr(self.data, field) == value and not self.objective.takes_soft_targets:
                raise ValueError(
                    f"data.{field} {value} gives target probabilities, which objective.type {self.objective.type} "
                    f"ignores; {taking} use them"
                )
        return self

    @model_validator(mode="after")
    def terms_add_what_the_objective_lacks(self) -> RunConfig:
        kind, terms = self.objective.type, self.terms
        if terms.sft_weight and isinstance(self.objective, SftConfig):
            raise ValueError(
                f"terms.sft_weight {terms.sft_weight:g} adds the chosen images' squared error, which is already "
                f"the whole loss of objective.type {kind}; set it to 0"
            )
        if terms.anchor_weight and self.objective.reference_need == "none":
            having = ", ".join(name for name, section in OBJECTIVE_SECTIONS.items() if section.reference_need != "none")
            raise ValueError(
                f"terms.anchor_weight {terms.anchor_weight:g} pulls the policy to the reference, but objective.type "
                f"{kind} has none; set it to 0, or choose an objective with a reference: {having}"
            )
        return self

    @model_validator(mode="after")
    def a_reference_is_there_to_be_placed(self) -> RunConfig:
        if self.objective.reference_need != "none":
            return self
        plain = ReferenceConfig()
        for name in ReferenceConfig.model_fields:
            value = getattr(self.reference, name)
            if value != getattr(plain, name):
                raise ValueError(
                    f"reference.{name} {value} has no effect: objective.type "
                    f"{self.objective.type} has no reference; leave it out"
                )
        return self

    @model_validator(mode="after")
    def an_adapter_is_there_to_be_switched_off(self) -> RunConfig:
        reference, adapter = self.reference, self.adapter.type
        if reference.residency == "adapter" and adapter == "none":
            raise ValueError(
                "reference.residency adapter needs low-rank layers, which adapter.type none lacks; set adapter.type to "
                "lora, rslora or dora, or choose another residency, such as replicated"
            )
        for name in ("refresh_every_steps", "ema_decay"):
            value = getattr(reference, name)
            if value is not None and adapter != "none":
                raise ValueError(
                    f"reference.{name} {value} with adapter.type {adapter}: the reference has no low-rank layers that "
                    f"could hold the policy's weights; set adapter.type or {name} to none"
                )
        return self

    @model_validator(mode="after")
    def kept_errors_are_no_predictions(self) -> RunConfig:
        residency = self.reference.residency
        if residency != "cached":
            return self
        if self.objective.reference_need == "predictions":
            raise ValueError(
                f"reference.residency cached keeps two errors per pair, but objective.type {self.objective.type} needs "
                "the reference's predictions; choose another residency, such as replicated"
            )
        if self.terms.anchor_weight:
            raise ValueError(
                f"reference.residency cached keeps two errors per pair, but terms.anchor_weight "
                f"{self.terms.anchor_weight:g} needs the reference's predictions; choose another residency, such "
                "as replicated"
            )
        return self
