"""SDXL's refiner after a base: the base stops while some noise is left, and the refiner removes the rest."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from ds_dpo.errors import ModelError, shown
from ds_dpo.evaluation.drawing.model_folder import ModelFolder, load_denoiser, locate, readable, variant_of
from ds_dpo.evaluation.drawing.named_model import SAMPLERS, Loading
from ds_dpo.evaluation.drawing.pipeline_parts import INDEX_NAME, text_parts
from ds_dpo.models.weights.files import TEXT_STEM, read_json
from ds_dpo.precision import torch_dtype
from ds_dpo.process.quiet import quiet_output

CLASS_NAME = StableDiffusionXLImg2ImgPipeline.__name__


def find_refiner(name: str, *, variant: str | None) -> Path:
    """Return the folder of a refiner by path or hub id. Raises ModelError for anything else."""
    folder = locate(name, variant=variant)
    index = folder / INDEX_NAME
    found = read_json(index).get("_class_name") if index.is_file() else None
    if found != CLASS_NAME:
        what = f"has no {INDEX_NAME}" if found is None else f"is a {shown(found)}"
        raise ModelError(f"--refiner {name}: {what}; give a diffusers folder of a {CLASS_NAME}, as SDXL's refiner is")
    return folder


def load_refiner(folder: Path, base: DiffusionPipeline, *, name: str, loading: Loading) -> DiffusionPipeline:
    """Return the refiner on its device, with the base's VAE, which decodes for both.

    Raises ModelError if the base is not SDXL's or a file is missing or unreadable.
    """
    if not isinstance(base, StableDiffusionXLPipeline):
        raise ModelError(f"--refiner {name}: only SDXL takes a refiner, and its model is a {type(base).__name__}")
    vae: AutoencoderKL = base.vae
    dtype = torch_dtype(loading.dtype)
    model = ModelFolder(name=name, folder=folder, rest=folder)
    denoiser = load_denoiser(model, dtype=dtype, variant=loading.variant)
    variant = variant_of(folder / "text_encoder_2", TEXT_STEM, asked=loading.variant)
    with readable(name), quiet_output():
        pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
            folder,
            unet=denoiser.eval(),
            vae=vae,
            **text_parts(folder, CLASS_NAME, dtype=dtype, variant=variant),
            variant=variant,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    sampler = SAMPLERS[loading.sampler]
    if sampler is not None:
        pipeline.scheduler = sampler(pipeline.scheduler.config)
    return pipeline.to(loading.device)
