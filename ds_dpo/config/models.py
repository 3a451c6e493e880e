"""The configuration of the models: what is trained, what encodes for it, and where the reference lives."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ds_dpo.config.base import Section, free_field, identity_field
from ds_dpo.config.families import DEFAULT_FAMILY, FamilyName
from ds_dpo.precision import Precision


class ModelConfig(Section):
    """What is trained, and what encodes for it."""

    pretrained: str = identity_field(
        "pipeline to start from: hub id, diffusers folder, whole .safetensors checkpoint, or ds_dpo://assets/..."
    )
    revision: str | None = identity_field("commit or branch on the hub; none: its default branch", default=None)
    variant: str | None = identity_field("weight files of this variant, such as fp16; none: full ones", default=None)
    family: FamilyName = identity_field("how prompts and sizes condition the UNet", default=DEFAULT_FAMILY)
    prediction_type: Literal["epsilon", "v_prediction"] | None = identity_field(
        "what the UNet predicts; none: as the model's scheduler config says", default=None
    )
    denoiser_init: str | None = identity_field(
        "Other weights that policy and reference start from: a diffusers folder, a hub id, a .safetensors file, or a "
        "run's folder or checkpoint (the pipeline's own if unset).",
        default=None,
    )
    vae: str | None = identity_field(
        "another VAE: hub id, folder or .safetensors; none: the pipeline's own", default=None
    )
    vae_dtype: Precision = identity_field("precision of image encoding", default="fp32")
    attention: Literal["auto", "xformers", "sdpa"] = free_field(
        "attention kernels; auto: xformers where it works on this device, else PyTorch's SDPA", default="auto"
    )
    gradient_checkpointing: bool = free_field(
        "recompute activations in the backward pass: much less memory, about a third more time", default=True
    )
    train: list[str] = identity_field(
        "patterns of the UNet's parameters to train, such as *.attn2.*; none given: all", default=[]
    )
    freeze: list[str] = identity_field("patterns of those among them that stay as they are", default=[])


class ReferenceConfig(Section):
    """Where the frozen reference lives, and whether it follows the policy."""

    residency: Literal["replicated", "zero3", "cpu", "adapter", "cached"] = free_field(
        "replicated: a frozen copy on each rank; zero3: its weights shared by all ranks; cpu: in host memory, on the "
        "device block by block; adapter: the policy with its low-rank layers off; cached: none, its errors are read "
        "from reference.cache",
        default="replicated",
    )
    cache: str | None = free_field(
        "folder of scripts/cache.py --reference with the reference's errors, for residency cached", default=None
    )
    refresh_every_steps: int | None = identity_field(
        "optimizer steps after which the reference takes the policy's weights, again and again; none: never",
        default=None,
        ge=1,
    )

    @model_validator(mode="after")
    def a_cache_and_its_residency_go_together(self) -> ReferenceConfig:
        if self.residency == "cached" and self.cache is None:
            raise ValueError(
                "reference.residency cached needs reference.cache, a folder made by scripts/cache.py --reference"
            )
        if self.residency != "cached" and self.cache is not None:
            raise ValueError(
                f"reference.residency {self.residency} ignores reference.cache {self.cache}; take residency cached, or "
                "cache none"
            )
        return self

    @model_validator(mode="after")
    def only_a_whole_copy_takes_other_weights(self) -> ReferenceConfig:
        if self.refresh_every_steps is not None and self.residency != "replicated":
            raise ValueError(
                f"reference.refresh_every_steps {self.refresh_every_steps} needs reference.residency replicated, and "
                f"it is {self.residency}; take that, or refresh_every_steps none"
            )
        return self
