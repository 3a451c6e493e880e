"""The run configuration's sections and the rules between them; those with many fields have modules of their own."""

from __future__ import annotations

from pydantic import model_validator

from ds_dpo.config.base import Section, free_field, identity_field
from ds_dpo.config.cadence import CadenceConfig
from ds_dpo.config.data import DataConfig
from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.families import LIMITS
from ds_dpo.config.held_out import HeldOutConfig, WatchdogConfig
from ds_dpo.config.models import ModelConfig, ReferenceConfig
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS, ObjectiveConfig, TermsConfig
from ds_dpo.config.optimization import AdapterConfig, NonFiniteConfig, OptimizerConfig, ScheduleConfig
from ds_dpo.config.supervision import SupervisionConfig


class BatchConfig(Section):
    """An optimizer step's pairs; accumulation follows from the number of ranks."""

    pairs_per_step: int = identity_field("pairs of one optimizer step, over all ranks", ge=1)
    micro_batch_pairs: int = free_field("pairs that a rank computes at once; the UNet sees twice as many images", ge=1)


class EmaConfig(Section):
    """A moving average of the master weights, kept beside them and exported on request."""

    decay: float | None = identity_field(
        "share of the average that an update keeps, once warmed up as in diffusers' EMAModel; none: no average",
        default=None,
        gt=0,
        lt=1,
    )


class ValidationConfig(Section):
    """Images drawn with the policy as training goes on, always from the same noise."""

    prompts: list[str] = free_field("prompts; each is drawn with each seed", default=[])
    seeds: list[int] = free_field("seeds of the starting noise", default=[0], min_length=1)
    num_inference_steps: int = free_field("DDIM steps of an image", default=30, ge=1)
    guidance_scale: float = free_field("classifier-free guidance; 1: none", default=5.0, ge=1)


class RunConfig(Section):
    """A whole run. ZeRO, precision, offload and communication are in the file that deepspeed_config names."""

    output_dir: str = free_field("run folder; the same command again resumes what it holds")
    max_train_steps: int = free_field("optimizer steps of the whole run", ge=1)
    seed: int = identity_field("of order, noise, timesteps, crops, flips, dropped prompts", default=0, ge=0, lt=2**63)
    deepspeed_config: str = free_field("name in ds_configs/, or a path", default="zero2_bf16")
    expected_world_size: int | None = free_field(
        "ranks that must be there; a mistyped hostfile else trains on one host; none: any", default=None, ge=1
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
                    f"model.{name} {' '.join(patterns)} has no effect with adapter.type {self.adapter.type}, beside "
                    "which the UNet is frozen; adapter.targets chooses layers"
                )
        return self

    @model_validator(mode="after")
    def a_polynomial_falls(self) -> RunConfig:
        schedule, rate = self.schedule, self.optimizer.learning_rate
        if schedule.name != "polynomial":
            return self
        if schedule.end_rate >= rate:
            raise ValueError(
                f"schedule.end_rate {schedule.end_rate:g} is not below optimizer.learning_rate {rate:g}; 0 would fit"
            )
        end = schedule.decay_steps or self.max_train_steps
        if end <= schedule.warmup_steps:
            raise ValueError(
                f"schedule.warmup_steps {schedule.warmup_steps} leaves no step to decay in until step {end}"
            )
        return self

    @model_validator(mode="after")
    def drawing_needs_prompts(self) -> RunConfig:
        if self.cadence.sample_every_steps is not None and not self.validation.prompts:
            raise ValueError(
                f"cadence.sample_every_steps {self.cadence.sample_every_steps} has nothing to draw: give "
                "validation.prompts, or sample_every_steps none"
            )
        return self

    @model_validator(mode="after")
    def held_out_pairs_are_not_trained_on(self) -> RunConfig:
        data, held_out = self.data, self.held_out
        if held_out.every_steps is None:
            return self
        split = held_out.split or data.split
        if held_out.dataset in (None, data.dataset) and split == data.split and held_out.name in (None, data.name):
            raise ValueError(
                f"held_out.every_steps {held_out.every_steps} would judge pairs that are trained on: split {split} of "
                f"{data.dataset}; give held_out.split, such as validation_unique, or held_out.dataset"
            )
        return self

    @model_validator(mode="after")
    def a_window_is_not_for_held_out_pairs(self) -> RunConfig:
        if self.watchdog.window_steps is not None and self.held_out.every_steps is not None:
            raise ValueError(
                f"watchdog.window_steps {self.watchdog.window_steps} is ignored while held_out is on, whose "
                "evaluations are the readings; leave it none, or give held_out.every_steps none"
            )
        return self

    @model_validator(mode="after")
    def a_watchdog_has_something_to_read(self) -> RunConfig:
        is_on = self.watchdog.action not in (None, "off")
        if is_on and self.held_out.every_steps is None and self.objective.reference_need == "none":
            raise ValueError(
                f"watchdog.action {self.watchdog.action} has nothing to read: objective.type {self.objective.type} "
                "compares with no reference while it trains; give held_out.every_steps, or action off"
            )
        return self

    @model_validator(mode="after")
    def only_sdxl_is_told_sizes(self) -> RunConfig:
        if not LIMITS[self.model.family].takes_sizes and self.data.size_conditioning != "fixed":
            raise ValueError(
                f"data.size_conditioning true has no effect on model.family {self.model.family}; leave it fixed"
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
                    f"does not take; these do: {taking}"
                )
        return self

    @model_validator(mode="after")
    def terms_add_what_the_objective_lacks(self) -> RunConfig:
        kind, terms = self.objective.type, self.terms
        if terms.sft_weight and kind == "sft":
            raise ValueError(
                f"terms.sft_weight {terms.sft_weight:g} adds the chosen images' squared error, which is all of "
                "objective.type sft already; leave it 0"
            )
        if terms.anchor_weight and self.objective.reference_need == "none":
            raise ValueError(
                f"terms.anchor_weight {terms.anchor_weight:g} holds the policy to the reference, but objective.type "
                f"{kind} has none; leave it 0, or take an objective with a reference, such as dpo"
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
                    f"reference.{name} {value} says something of a reference, but objective.type "
                    f"{self.objective.type} has no reference; leave it out"
                )
        return self

    @model_validator(mode="after")
    def an_adapter_is_there_to_be_switched_off(self) -> RunConfig:
        reference, adapter = self.reference, self.adapter.type
        if reference.residency == "adapter" and adapter == "none":
            raise ValueError(
                "reference.residency adapter is the policy with its low-rank layers off, and adapter.type none has no "
                "such layers; take adapter.type lora, rslora or dora, or another residency, such as replicated"
            )
        if reference.refresh_every_steps is not None and adapter != "none":
            raise ValueError(
                f"reference.refresh_every_steps {reference.refresh_every_steps} with adapter.type {adapter}: a "
                "reference without low-rank layers cannot hold their weights; take adapter.type none, or "
                "refresh_every_steps none"
            )
        return self

    @model_validator(mode="after")
    def kept_errors_are_no_predictions(self) -> RunConfig:
        residency = self.reference.residency
        if residency != "cached":
            return self
        if self.objective.reference_need == "predictions":
            raise ValueError(
                f"reference.residency cached keeps two errors a pair, but objective.type {self.objective.type} needs "
                "the reference's predictions; take another residency, such as replicated"
            )
        if self.terms.anchor_weight:
            raise ValueError(
                f"reference.residency cached keeps two errors a pair, but terms.anchor_weight "
                f"{self.terms.anchor_weight:g} needs the reference's predictions; take another residency, such as "
                "replicated"
            )
        return self
