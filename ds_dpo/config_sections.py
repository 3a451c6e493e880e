"""The run configuration's fields: types, bounds, meaning, and which of them make a run the run it is.

Each field is `identity` (a change makes it another run: refused against an existing run folder) or `free` (taken
and logged). Descriptions are the text of `--help`; a new field is one line here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DECAYING_SCHEDULES = ("linear", "cosine")


def identity_field(description: str, **constraints: Any) -> Any:
    """A field whose change makes another run."""
    return Field(description=description, json_schema_extra={"identity": True}, **constraints)


def free_field(description: str, **constraints: Any) -> Any:
    """A field that may change from one start of a run to the next."""
    return Field(description=description, json_schema_extra={"identity": False}, **constraints)


class Section(BaseModel):
    """Frozen, and closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """What is trained, and what encodes for it."""

    pretrained: str = identity_field("diffusers pipeline to start from: hub id, folder, or ds_dpo://assets/...")
    revision: str | None = identity_field("commit or branch on the hub; none: its default branch", default=None)
    variant: str | None = identity_field("weight files of this variant, such as fp16; none: full ones", default=None)
    family: Literal["sdxl", "sd15"] = identity_field("how prompts and sizes condition the UNet", default="sdxl")
    vae: str | None = identity_field("another VAE: hub id or folder; none: the pipeline's own", default=None)
    vae_dtype: Literal["fp32", "bf16", "fp16"] = identity_field("precision of image encoding", default="fp32")
    attention: Literal["auto", "xformers", "sdpa"] = free_field(
        "attention kernels; auto: xformers where it works on this device, else PyTorch's SDPA", default="auto"
    )
    gradient_checkpointing: bool = free_field(
        "recompute activations in the backward pass: much less memory, about a third more time", default=True
    )


class DataConfig(Section):
    """Preference pairs: where they are, which of them count, and how their images are cut."""

    dataset: str = identity_field("hub id, local folder or file, or ds_dpo://assets/...")
    name: str | None = identity_field("configuration (subset) of a hub dataset; none: its only one", default=None)
    revision: str | None = identity_field("commit or branch of a hub dataset; none: its default branch", default=None)
    split: str = identity_field("split of the dataset", default="train")
    cache_dir: str | None = free_field("where `datasets` keeps its files; none: its own default", default=None)
    format: Literal["pickapic", "chosen_rejected", "ranked", "manifest", "webdataset"] = identity_field(
        "how a row tells its pairs; docs/data.md describes each", default="pickapic"
    )
    columns: list[str] = identity_field(
        "role=column for each column that is not named as the format expects, such as prompt=text", default=[]
    )
    image_root: str | None = free_field(
        "folder that the image paths of a manifest start from; none: the manifest's own", default=None
    )
    cache: str | None = free_field(
        "folder of scripts/cache.py with these pairs encoded; none: images and prompts are encoded as they come",
        default=None,
    )
    ties: Literal["drop", "soft", "error"] = identity_field(
        "pairs that nobody won: left out, trained towards equality (target 0.5), or refused", default="drop"
    )
    confidence: Literal["ignore", "target", "weight"] = identity_field(
        "what a pair's confidence, where there is one, is used for: nothing, its target probability, its weight",
        default="ignore",
    )
    min_confidence: float | None = identity_field(
        "leave out pairs of less confidence; pairs without one stay; none: keep all", default=None, ge=0, le=1
    )
    models: list[str] = identity_field(
        "keep pairs whose images both come from a model with one of these in its name (the paper's subset: dreamlike)",
        default=[],
    )
    has_label: Literal["ignore", "require"] = identity_field(
        "require: keep only rows that say has_label", default="ignore"
    )
    max_pairs_per_prompt: int | None = identity_field(
        "keep the first so many pairs of a prompt; none: all", default=None, ge=1
    )
    max_rows: int | None = identity_field("read the first so many rows only; none: all", default=None, ge=1)
    expected_pairs: int | None = free_field(
        "pairs that should be left; another number is warned of; none: not checked", default=None, ge=1
    )
    resolution: int = identity_field("side of the square training images, pixels", default=1024, ge=16, multiple_of=8)
    aspect_buckets: bool = identity_field(
        "train at several aspect ratios of about resolution x resolution pixels; all pairs of a step share one",
        default=False,
    )
    bucket_step: int = identity_field("sides of buckets are multiples of this, pixels", default=64, ge=8, multiple_of=8)
    max_aspect: float = identity_field("longer side of the most extreme bucket over its shorter one", default=2.0, ge=1)
    crop: Literal["center", "random"] = identity_field("one crop for both images of a pair", default="center")
    flip: Literal["off", "shared", "independent"] = identity_field(
        "mirror half of the pairs (shared) or half of the images (independent, as the authors' code)", default="off"
    )
    size_conditioning: Literal["fixed", "true"] = identity_field(
        "sizes told to SDXL: always the training size (fixed, as the authors) or the file's own (true)", default="fixed"
    )
    prompt_dropout: float = identity_field("share of pairs whose prompt becomes ''", default=0.0, ge=0, le=1)
    max_bad_rows: int = free_field(
        "unreadable rows that are named and replaced, over the run, before it is an error", default=100, ge=0
    )
    workers: int = free_field("loader processes of a rank; 0: in the training process", default=4, ge=0)
    prefetch: int = free_field("micro-batches that each loader process has ready", default=2, ge=1)

    @model_validator(mode="after")
    def a_cache_holds_one_crop(self) -> DataConfig:
        if self.cache is not None and self.crop == "random":
            raise ValueError("data.cache holds each image cut once: data.crop random does not fit; take center")
        return self


class DpoConfig(Section):
    """Diffusion-DPO: the fields are the keyword arguments of objectives.dpo."""

    takes_soft_targets: ClassVar[bool] = True
    type: Literal["dpo"] = identity_field("the loss", default="dpo")
    beta: float = identity_field(
        "pull towards the reference; the loss is -log sigmoid(-beta/2 x difference of mean squared errors)", gt=0
    )
    label_smoothing: float = identity_field(
        "share of labels taken to be wrong (conservative DPO)", default=0.0, ge=0, lt=0.5
    )


class SftConfig(Section):
    """Supervised fine-tuning on the preferred images alone; no reference, no beta."""

    takes_soft_targets: ClassVar[bool] = False
    type: Literal["sft"] = identity_field("the loss", default="sft")


# A new objective's class joins here; its `type` is its row in objectives.OBJECTIVES.
ObjectiveConfig = Annotated[DpoConfig | SftConfig, Field(discriminator="type")]


class ReferenceConfig(Section):
    """Where the frozen reference lives."""

    residency: Literal["replicated"] = free_field("replicated: a frozen copy on each rank", default="replicated")


class BatchConfig(Section):
    """An optimizer step's pairs; accumulation follows from the number of ranks."""

    pairs_per_step: int = identity_field("pairs of one optimizer step, over all ranks", ge=1)
    micro_batch_pairs: int = free_field("pairs that a rank computes at once; the UNet sees twice as many images", ge=1)


class OptimizerConfig(Section):
    """torch.optim.AdamW, fused on GPUs."""

    type: Literal["adamw"] = identity_field("the optimizer", default="adamw")
    learning_rate: float = identity_field("peak rate; never scaled by batch or ranks", gt=0)
    adam_beta1: float = identity_field("decay of the mean of gradients", default=0.9, ge=0, lt=1)
    adam_beta2: float = identity_field("decay of the mean of squared gradients", default=0.999, ge=0, lt=1)
    weight_decay: float = identity_field("decoupled decay; times the rate, each step", default=0.01, ge=0)
    epsilon: float = identity_field("added to the root of the second moment", default=1e-8, gt=0)
    max_grad_norm: float | None = identity_field("clip the gradient's 2-norm to this; none: never", default=1.0, gt=0)


class EmaConfig(Section):
    """A moving average of the master weights, kept beside them and exported on request."""

    decay: float | None = identity_field(
        "share of the average that an update keeps, once warmed up as in diffusers' EMAModel; none: no average",
        default=None,
        gt=0,
        lt=1,
    )


class ScheduleConfig(Section):
    """Learning rate over optimizer steps, by diffusers.optimization.get_scheduler.

    Its other names are left out: with their default settings they repeat one of these or need arguments.
    """

    name: Literal["constant", "constant_with_warmup", "linear", "cosine"] = identity_field(
        "shape after warm-up; linear and cosine fall to 0", default="constant_with_warmup"
    )
    warmup_steps: int = identity_field("optimizer steps over which the rate rises from 0", default=0, ge=0)
    decay_steps: int | None = identity_field(
        "optimizer step at which linear or cosine reaches 0; none: max_train_steps", default=None, ge=1
    )

    @model_validator(mode="after")
    def a_constant_schedule_neither_warms_up_nor_decays(self) -> ScheduleConfig:
        if self.name == "constant" and self.warmup_steps:
            raise ValueError(
                f"schedule.name constant ignores warmup_steps {self.warmup_steps}; take constant_with_warmup, or "
                "warmup_steps 0"
            )
        if self.name not in DECAYING_SCHEDULES and self.decay_steps is not None:
            raise ValueError(
                f"schedule.name {self.name} ignores decay_steps {self.decay_steps}; take linear or cosine, or "
                "decay_steps none"
            )
        return self


class CadenceConfig(Section):
    """When things are due, in optimizer steps; all are due at the end too."""

    log_every_steps: int = free_field("steps between lines shown; metrics.jsonl has each", default=10, ge=1)
    save_every_steps: int = free_field("steps between checkpoints", default=200, ge=1)
    keep_checkpoints: int = free_field("newest checkpoints that stay on disk", default=2, ge=1)
    sample_every_steps: int | None = free_field("steps between validation images; none: never", default=None, ge=1)


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
    data: DataConfig
    objective: ObjectiveConfig
    reference: ReferenceConfig = ReferenceConfig()
    batch: BatchConfig
    optimizer: OptimizerConfig
    ema: EmaConfig = EmaConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    cadence: CadenceConfig = CadenceConfig()
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def drawing_needs_prompts(self) -> RunConfig:
        if self.cadence.sample_every_steps is not None and not self.validation.prompts:
            raise ValueError(
                f"cadence.sample_every_steps {self.cadence.sample_every_steps} has nothing to draw: give "
                "validation.prompts, or sample_every_steps none"
            )
        return self

    @model_validator(mode="after")
    def only_sdxl_is_told_sizes(self) -> RunConfig:
        if self.model.family == "sd15" and self.data.size_conditioning != "fixed":
            raise ValueError("data.size_conditioning true has no effect on model.family sd15; leave it fixed")
        return self

    @model_validator(mode="after")
    def soft_targets_need_an_objective_that_takes_them(self) -> RunConfig:
        for field, value in (("ties", "soft"), ("confidence", "target")):
            if getattr(self.data, field) == value and not self.objective.takes_soft_targets:
                raise ValueError(
                    f"data.{field} {value} gives target probabilities, which objective.type {self.objective.type} "
                    "does not take; objective.type dpo would"
                )
        return self
