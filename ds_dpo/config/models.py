"""The sections on models: the one that is trained, its encoders, and where the reference is."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import field_validator, model_validator

from ds_dpo.config.base import PathText, Section, free_field, identity_field
from ds_dpo.config.families import DEFAULT_FAMILY, FamilyName
from ds_dpo.precision import Precision

# What the check of policy and reference before the first update allows.
Preflight = Literal["exact", "near"]
# Which blocks compute their activations again in the backward pass; a number of blocks is an int.
Recomputed = Literal["all", "none", "auto"]
Checkpointing = Recomputed | int
SWITCH_WORDS: dict[str, Recomputed] = {
    **dict.fromkeys(("true", "yes", "on"), "all"),
    **dict.fromkeys(("false", "no", "off", "0"), "none"),
}


class ModelConfig(Section):
    """The model that is trained, and its encoders."""

    pretrained: PathText = identity_field(
        "Pipeline to start from: hub id, diffusers folder, whole .safetensors checkpoint, or ds_dpo://assets/..."
    )
    revision: str | None = identity_field(
        "Commit or branch of a model on the hub (its default branch if unset).", default=None
    )
    variant: str | None = identity_field(
        "Variant of the weight files, such as fp16 (the full files if unset).", default=None
    )
    family: FamilyName = identity_field(
        "Model family: how prompts and image sizes condition the denoiser.", default=DEFAULT_FAMILY
    )
    prediction_type: Literal["epsilon", "v_prediction", "flow"] | None = identity_field(
        "What the denoiser predicts (as the model's scheduler config says if unset). flow: the velocity of a flow "
        "model, whose scheduler config must be a flow's.",
        default=None,
    )
    guidance: float | None = identity_field(
        "Scale of guidance that a guidance-distilled denoiser (FLUX.1-dev) is given in training: one value for policy "
        "and reference, chosen and rejected (1 if unset). 1 asks for the prediction without guidance, which the loss "
        "is about; a higher one asks for a prediction that imitates guided sampling.",
        default=None,
        ge=0,
        le=100,
    )
    denoiser_init: PathText | None = identity_field(
        "Other weights that policy and reference start from: a diffusers folder, a hub id, a .safetensors file, or a "
        "run's folder or checkpoint (the pipeline's own if unset).",
        default=None,
    )
    policy_init: PathText | None = identity_field(
        "Weights that the policy alone starts from, while the reference keeps the others: a run's folder or "
        "checkpoint, a diffusers folder, a hub id or a .safetensors file; with an adapter, a run that trained one "
        "like it (the reference's own weights if unset).",
        default=None,
    )
    vae: PathText | None = identity_field(
        "Another VAE: hub id, folder or .safetensors file (the pipeline's own if unset).", default=None
    )
    vae_dtype: Precision = identity_field("Precision in which images are encoded.", default="fp32")
    attention: Literal["auto", "xformers", "sdpa"] = free_field(
        "Attention kernels. auto: PyTorch's SDPA. xformers: checked on this device before it is used.", default="auto"
    )
    gradient_checkpointing: Checkpointing | bool = free_field(
        "Which blocks compute their activations again in the backward pass instead of keeping them. all: every block, "
        "which needs much less memory and about a third more time. auto: as few as fit the memory that is free at the "
        "start. N: the N blocks that save most memory for their work. true and false mean all and none.",
        default="all",
    )
    train: list[str] = identity_field(
        "Train only parameters whose names match one of these patterns, such as *.attn2.* (all if empty).", default=[]
    )
    freeze: list[str] = identity_field(
        "Do not train parameters whose names match one of these patterns, even if model.train chooses them.", default=[]
    )

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def a_switch_means_all_or_none(cls, value: Any) -> Any:
        word = str(value).lower()
        value = SWITCH_WORDS.get(word, int(word) if word.isascii() and word.isdigit() and len(word) < 10 else value)
        if value not in get_args(Recomputed) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError("give all, none, auto, or a number of blocks that are computed again")
        return value


class ReferenceConfig(Section):
    """Where the frozen reference is kept, and whether it follows the policy."""

    residency: Literal["replicated", "zero3", "cpu", "adapter", "cached"] = free_field(
        "Where the reference is kept. replicated: a frozen copy on each rank. zero3: its weights are divided among all "
        "ranks. cpu: in host memory, moved to the device block by block. adapter: the policy with its low-rank layers "
        "off. cached: nowhere, its errors are read from reference.cache.",
        default="replicated",
    )
    cache: PathText | None = free_field(
        "Folder with the reference's errors, made by scripts/cache.py --reference; only for residency cached.",
        default=None,
    )
    refresh_every_steps: int | None = identity_field(
        "Copy the policy's weights into the reference every N optimizer steps (off if unset).",
        default=None,
        ge=1,
    )
    ema_decay: float | None = identity_field(
        "Move the reference after every update: decay x reference + (1 - decay) x policy, kept in fp32 (off if unset).",
        default=None,
        gt=0,
        lt=1,
    )
    preflight: Preflight = free_field(
        "What the check before the first update allows. exact: policy and reference must predict exactly the same. "
        "near: their errors may differ by what rounding causes, a share of 1e-4 in fp32, 0.02 in fp16, 0.1 in bf16; "
        "the log names the difference and the first module that causes it.",
        default="exact",
    )

    @model_validator(mode="after")
    def a_cache_and_its_residency_go_together(self) -> ReferenceConfig:
        if self.residency == "cached" and self.cache is None:
            raise ValueError(
                "reference.residency cached needs reference.cache, a folder made by scripts/cache.py --reference"
            )
        if self.residency != "cached" and self.cache is not None:
            raise ValueError(
                f"reference.residency {self.residency} ignores reference.cache {self.cache}; set residency to "
                "cached, or cache to none"
            )
        return self

    @model_validator(mode="after")
    def kept_errors_are_near_at_best(self) -> ReferenceConfig:
        if self.residency == "cached" and self.preflight != "exact":
            raise ValueError(
                f"reference.preflight {self.preflight} has no effect with reference.residency cached, whose check "
                "always allows rounding; leave it out"
            )
        return self

    @model_validator(mode="after")
    def a_moving_reference_has_weights_of_its_own(self) -> ReferenceConfig:
        if self.ema_decay is None:
            return self
        if self.refresh_every_steps is not None:
            raise ValueError(
                f"reference.ema_decay {self.ema_decay:g} and reference.refresh_every_steps {self.refresh_every_steps} "
                "are two ways in which the reference follows the policy; set one of them to none"
            )
        if self.residency in ("adapter", "cached"):
            raise ValueError(
                f"reference.ema_decay {self.ema_decay:g} needs a reference with weights of its own, which "
                f"reference.residency {self.residency} lacks; set residency to replicated, zero3 or cpu, or ema_decay "
                "to none"
            )
        return self

    @model_validator(mode="after")
    def only_a_whole_copy_takes_other_weights(self) -> ReferenceConfig:
        if self.refresh_every_steps is not None and self.residency != "replicated":
            raise ValueError(
                f"reference.refresh_every_steps {self.refresh_every_steps} needs reference.residency replicated, not "
                f"{self.residency}; set it to replicated, or refresh_every_steps to none"
            )
        return self
