"""Pipelines of diffusers around live parts, by the class of the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from diffusers import (
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from ds_dpo.models.denoiser.packing import Packing
from ds_dpo.models.sampler import Sampler


def packed(packing: Packing, latents: Tensor) -> Tensor:
    """Return latents (N, C, H, W) as a denoiser takes them: as they are, or as tokens."""
    return packing.pack(latents)


def grid_of_patches(packing: Packing, latents: Tensor) -> Tensor:
    """Return the tokens of latents (N, C, H, W) as channels of a grid: (N, width of a token, H / side, W / side)."""
    return packing.pack(latents).transpose(1, 2).unflatten(2, (latents.shape[2] // packing.side, -1))


@dataclass(frozen=True)
class Assembly:
    """A pipeline's class, and what goes into it and out of it.

    denoiser: the class of its denoiser, which the pipeline has under the name place. numbers: of text encoders and of
    tokenizers that it takes, the whole number first. settings: what it is given besides. entering: makes the latents
    that it takes. gives_scaled: whether latents that it returns are packed and scaled still.
    """

    title: str
    pipeline: Any
    denoiser: type[nn.Module]
    place: str
    numbers: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    entering: Callable[[Packing, Tensor], Tensor] = packed
    gives_scaled: bool = True

    def names(self, part: str) -> list[str]:
        """Return the names of all text encoders or tokenizers: part, part_2, part_3."""
        return [part if number == 1 else f"{part}_{number}" for number in range(1, self.numbers[0] + 1)]


UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
ASSEMBLIES = (
    Assembly("Stable Diffusion 3", StableDiffusion3Pipeline, SD3Transformer2DModel, "transformer", (3, 2)),
    Assembly("FLUX.1", FluxPipeline, FluxTransformer2DModel, "transformer", (2,)),
    Assembly(
        *("FLUX.2", Flux2KleinPipeline, Flux2Transformer2DModel, "transformer", (1,)),
        entering=grid_of_patches,
        gives_scaled=False,
    ),
    Assembly("Stable Diffusion 1", StableDiffusionPipeline, UNet2DConditionModel, "unet", (1,), UNCHECKED),
    Assembly("SDXL", StableDiffusionXLPipeline, UNet2DConditionModel, "unet", (2,), {"add_watermarker": False}),
)


def assembly_of(pipeline: DiffusionPipeline) -> Assembly:
    """Return the row of a pipeline's class or, of other pipelines of the same denoiser, of that."""
    denoisers = tuple(type(part) for part in pipeline.components.values() if isinstance(part, nn.Module))
    of_class = [each for each in ASSEMBLIES if isinstance(pipeline, each.pipeline)]
    return (of_class or [each for each in ASSEMBLIES if each.denoiser in denoisers])[0]


def build_pipeline(
    *,
    denoiser: nn.Module,
    vae: nn.Module,
    tokenizers: Sequence[Any],
    text_encoders: Sequence[nn.Module],
    scheduler: Sampler,
) -> DiffusionPipeline:
    """Join live parts without copying or moving them: with a UNet, two text encoders make SDXL, one Stable Diffusion 1.

    A transformer of Stable Diffusion 3 takes two CLIPs, or these and T5, one of FLUX.1 CLIP and T5, one of FLUX.2
    Qwen3. Raises ValueError for another number of text encoders or tokenizers.
    """
    found = [each for each in ASSEMBLIES if isinstance(denoiser, each.denoiser)]
    number = len(text_encoders)
    assembly = next((each for each in found if number == len(tokenizers) and number in each.numbers), None)
    if assembly is None:
        needs = " or ".join(f"{' or '.join(map(str, each.numbers))} of each ({each.title})" for each in found)
        raise ValueError(f"{number} text encoders and {len(tokenizers)} tokenizers: a pipeline needs {needs}")
    pipeline: DiffusionPipeline = assembly.pipeline(
        **{assembly.place: denoiser},
        vae=vae,
        scheduler=scheduler,
        **dict(zip_longest(assembly.names("tokenizer"), tokenizers)),
        **dict(zip_longest(assembly.names("text_encoder"), text_encoders)),
        **assembly.settings,
    )
    return pipeline
