"""The row of a family: everything that sets it apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_dpo.config.families import FamilyName
from ds_dpo.models.families.text import EncodedPrompts, TextTower

Config = Mapping[str, Any]
# the configuration of a text encoder, by the name of its folder in a pipeline
TextConfig = Callable[[str], Config]


@dataclass(frozen=True, kw_only=True)
class Published:
    """What an export states about its family, for people and for programs that load it.

    pipeline_class: in diffusers. guidance_scale, draw_arguments: Python arguments of its call. hub_tag: tag of the
    model card. architecture: modelspec's name; architecture_of_prediction: other names, by prediction type.
    kohya_base, is_kohya_v2: ss_base_model_version and ss_v2 of a LoRA, by which A1111 selects it for a model.
    """

    pipeline_class: str
    guidance_scale: str
    draw_arguments: str = ""
    hub_tag: str
    architecture: str
    architecture_of_prediction: Mapping[str, str] = field(default_factory=dict)
    kohya_base: str
    is_kohya_v2: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: how it is recognised, conditioned, and published.

    is_of: returns whether a denoiser's diffusers configuration is of this family, using the configurations of the
    pipeline's text encoders if they are available. text_encoders: names of their folders in a pipeline. size_ids: turns
    (N, 6) time ids of data.stream.prepare into the denoiser's input; None if sizes do not condition it.
    """

    name: FamilyName
    is_of: Callable[[Config, TextConfig | None], bool]
    text_encoders: tuple[str, ...]
    encode: Callable[[Sequence[TextTower], Sequence[str]], EncodedPrompts]
    size_ids: Callable[[Tensor], Tensor] | None = None
    published: Published
