"""Draw images with diffusers' own pipelines; each image has its own seed of the noise.

N images, C latent channels, X = Y = resolution in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ds_dpo.evaluation.drawing.live_pipeline import assembly_of, build_pipeline
from ds_dpo.models.denoiser.packing import Packing
from ds_dpo.models.families.table import FAMILIES, KINDS
from ds_dpo.models.pipelines.pretrained import tokenizer_of
from ds_dpo.models.sampler import Sampler
from ds_dpo.models.vae import PIXELS_AT_ONCE, decode_latents

MAX_IMAGES_AT_ONCE = 24
REFINER_SHARE = 0.2  # as in diffusers' documentation of SDXL


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """Return a pipeline's denoiser, a diffusers model."""
    return next(getattr(pipeline, kind.folder) for kind in KINDS.values() if hasattr(pipeline, kind.folder))


def packing_of(pipeline: DiffusionPipeline) -> Packing:
    """Return how a pipeline packs latents into what its denoiser takes."""
    return KINDS[type(denoiser_of(pipeline)).__name__].packing


@torch.no_grad()
def draw_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    resolution: int,
    images_at_once: int | None = None,
    refiner: DiffusionPipeline | None = None,
) -> Tensor:
    """Draw an image for each prompt from the noise of its seed: (N, 3, X, Y) in 0..1, fp32, on the CPU.

    An image depends on its prompt and seed, not on other images. images_at_once: None is as many as have the pixels of
    one 1024 x 1024 image, at most 24. The VAE decodes in its own dtype, which may differ from the denoiser's.
    refiner: takes the last REFINER_SHARE of the noise levels over, with the rest of the steps.
    Raises ValueError for unequal lengths, no image, a resolution that the VAE cannot make, or text encoders in
    another dtype than the denoiser.
    """
    at_once = images_at_once or min(MAX_IMAGES_AT_ONCE, max(1, PIXELS_AT_ONCE // resolution**2))
    _check_request(pipeline, prompts, seeds, resolution)
    for each in (pipeline, *([] if refiner is None else [refiner])):
        each.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), at_once):
        part = slice(start, start + at_once)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        shared = {
            "prompt": list(prompts[part]),
            "generator": generators,  # samplers that add noise at each step continue after the starting noise
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            **_text_length(pipeline),
            "output_type": "latent",  # the pipeline would decode in the denoiser's dtype, or convert the VAE for good
        }
        latents = pipeline(
            **shared,
            latents=assembly_of(pipeline).entering(packing_of(pipeline), _noise(pipeline, generators, resolution)),
            height=resolution,
            width=resolution,
            **({} if refiner is None else {"denoising_end": 1 - REFINER_SHARE}),
        ).images
        if refiner is not None:
            latents = refiner(**shared, image=latents, denoising_start=1 - REFINER_SHARE).images
        images.append(_decoded(pipeline, latents, side=resolution // pipeline.vae_scale_factor).cpu())
    return torch.cat(images)


def _text_length(pipeline: DiffusionPipeline) -> dict[str, int]:
    """Return the number of tokens of a prompt, as in training: a pipeline does not ask its tokenizer for fewer."""
    found = (each for each in FAMILIES.values() if each.published.pipeline_class == type(pipeline).__name__)
    family = next(found, None)
    for name, text in ({} if family is None else family.text_encoders).items():
        tokenizer = getattr(pipeline, tokenizer_of(name), None)
        if text.num_tokens is not None and tokenizer is not None:
            return {"max_sequence_length": min(text.num_tokens, tokenizer.model_max_length)}
    return {}


def _decoded(pipeline: DiffusionPipeline, latents: Tensor, *, side: int) -> Tensor:
    """Return the images of what a pipeline gives: scaled latents in its packing, or whole unscaled ones."""
    if not assembly_of(pipeline).gives_scaled:
        return decode_latents(pipeline.vae, latents, are_scaled=False)
    return decode_latents(pipeline.vae, packing_of(pipeline).unpack(latents, height=side, width=side))


def _check_request(pipeline: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], resolution: int) -> None:
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: give at least one prompt, and one seed for each"
        )
    side, factor = packing_of(pipeline).side, pipeline.vae_scale_factor
    if resolution % 8 or resolution % (factor * side):
        patches = f" times {side}" if side > 1 else ""
        raise ValueError(f"resolution {resolution}: must be a multiple of 8 and of the VAE's {factor}{patches}")
    text_dtype, dtype = pipeline.text_encoder.dtype, denoiser_of(pipeline).dtype
    if text_dtype != dtype:
        raise ValueError(f"text encoders in {text_dtype}, denoiser in {dtype}: the pipeline needs one dtype for both")


def _noise(pipeline: DiffusionPipeline, generators: Sequence[torch.Generator], resolution: int) -> Tensor:
    """Return starting latents (N, C, X / factor, Y / factor) in the denoiser's dtype.

    Drawn in fp32 on the CPU, so that they are the same noise on every device and in every dtype.
    """
    side = resolution // pipeline.vae_scale_factor
    shape = (packing_of(pipeline).latent_channels(denoiser_of(pipeline).config), side, side)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    return noise.to(pipeline.device, denoiser_of(pipeline).dtype)


class ValidationSampler:
    """Draws each prompt with each seed, always from the same noise, with modules that are being trained.

    The modules are not changed; the caller sets eval mode. Under ZeRO-3 every rank must call this with the same inputs,
    because a forward pass gathers the weights: pass the engine's module as denoiser. The constructor raises ValueError
    as draw_images does.
    """

    def __init__(
        self,
        *,
        denoiser: nn.Module,
        vae: nn.Module,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[nn.Module],
        scheduler: Sampler,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_inference_steps: int,
        guidance_scale: float,
        resolution: int,
    ) -> None:
        self._pipeline = build_pipeline(
            denoiser=denoiser, vae=vae, tokenizers=tokenizers, text_encoders=text_encoders, scheduler=scheduler
        )
        self._prompts = [prompt for prompt in prompts for _ in seeds]
        self._seeds = [seed for _ in prompts for seed in seeds]
        self._num_inference_steps, self._guidance_scale = num_inference_steps, guidance_scale
        self._resolution = resolution
        # raises now, not at the first drawing some hundred steps into a run
        _check_request(self._pipeline, self._prompts, self._seeds, resolution)

    @property
    def prompts(self) -> list[str]:
        """Prompt of each image of a drawing."""
        return list(self._prompts)

    @property
    def captions(self) -> list[str]:
        """Prompt and seed of each image of a drawing."""
        return [f"{prompt}, seed {seed}" for prompt, seed in zip(self._prompts, self._seeds, strict=True)]

    def __call__(self) -> Tensor:
        """Return images (prompts * seeds, 3, X, Y) in 0..1, all seeds of the first prompt first."""
        return draw_images(
            self._pipeline,
            self._prompts,
            self._seeds,
            num_inference_steps=self._num_inference_steps,
            guidance_scale=self._guidance_scale,
            resolution=self._resolution,
        )
