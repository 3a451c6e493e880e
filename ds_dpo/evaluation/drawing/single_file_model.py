"""Models in one .safetensors file, as A1111 and ComfyUI have them: a whole checkpoint, or a UNet alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import SafetensorError, safe_open

from ds_dpo.errors import ModelError
from ds_dpo.evaluation.drawing.model_folder import UNUSED_PARTS, pipeline_around, readable
from ds_dpo.process.quiet import quiet_output

SUFFIX = ".safetensors"
# beginnings of tensor names: of a UNet under its single-file names and under diffusers' own
UNET_BEGINNINGS = ("model.diffusion_model.", "input_blocks.", "down_blocks.")
VAE_BEGINNING, SDXL_TEXT_BEGINNING = "first_stage_model.", "conditioner."


@dataclass(frozen=True)
class SingleFile:
    """A file as its tensors' names tell it.

    rest: folder of the pipeline that tells its configuration, and lends what it lacks; none: of a whole checkpoint,
    whose configuration diffusers then takes from the hub. is_whole: it has text encoders and VAE. is_sdxl: those are
    SDXL's.
    """

    name: str
    path: Path
    rest: Path | None
    is_whole: bool
    is_sdxl: bool


def find_single_file(name: str, path: Path, *, rest: Path | None) -> SingleFile:
    """Look at what a file holds, without loading it. Raises ModelError saying what is there, or lacking, instead."""
    keys = tensor_names(name, path)
    is_whole = any(key.startswith(VAE_BEGINNING) for key in keys)
    if not any(key.startswith(UNET_BEGINNINGS) for key in keys):
        if is_lora(keys):
            raise ModelError(lora_sentence(name))
        raise ModelError(f"{name}: no UNet of SDXL or Stable Diffusion 1 in it; its first tensor is {min(keys)!r}")
    if not is_whole and rest is None:
        raise ModelError(f"{name}: holds a UNet alone; name the pipeline around it with --base MODEL")
    is_sdxl = any(key.startswith(SDXL_TEXT_BEGINNING) for key in keys)
    return SingleFile(name=name, path=path, rest=rest, is_whole=is_whole, is_sdxl=is_sdxl)


def tensor_names(name: str, path: Path) -> list[str]:
    """Names of the tensors of a file, from its header. Raises ModelError if it is no safetensors file."""
    if not path.is_file():
        raise ModelError(f"{name}: no such file or folder")
    if path.suffix != SUFFIX:
        raise ModelError(f"{name}: only {SUFFIX} files are read, as others can run code")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{name}: not readable as safetensors ({error})") from error
    if not keys:
        raise ModelError(f"{name}: no tensor in it")
    return keys


def is_lora(keys: list[str]) -> bool:
    """Tell a LoRA by the names of its tensors, which diffusers, peft and kohya all write so."""
    return any("lora" in key for key in keys)


def lora_sentence(name: str) -> str:
    """What to do with a LoRA that was named as a model."""
    return f"{name}: a LoRA; give what it goes over first, then the LoRA: --model BASE --lora {name}"


def load_single_file(
    source: SingleFile,
    *,
    dtype: torch.dtype,
    vae: AutoencoderKL | None,
    variant: str | None = None,
    sampler: Callable[[Mapping[str, Any]], Any] | None = None,
) -> DiffusionPipeline:
    """The model on the CPU; reads no other file than the source, and the hub for the configuration where rest is none.

    vae: in place of its own, which for a UNet alone is that of rest. Raises ModelError if diffusers cannot load it.
    """
    if not source.is_whole:
        assert source.rest is not None, "find_single_file wants it"
        unet = _load_unet(source, source.rest, dtype=dtype)
        return pipeline_around(unet, source.rest, name=source.name, variant=variant, vae=vae, sampler=sampler)
    family = StableDiffusionXLPipeline if source.is_sdxl else StableDiffusionPipeline
    with _explained(source), quiet_output():
        pipeline = family.from_single_file(
            str(source.path),
            **_configuration(source, None),
            **({} if vae is None else {"vae": vae}),
            **UNUSED_PARTS.get(family.__name__, {}),
            dtype=dtype,
        )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            _require_all(source, part)
    if sampler is not None:
        pipeline.scheduler = sampler(pipeline.scheduler.config)
    return pipeline


def load_own_vae(source: SingleFile, *, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE that a whole checkpoint holds. Raises ModelError if diffusers cannot load it."""
    with _explained(source), quiet_output():
        vae = AutoencoderKL.from_single_file(str(source.path), **_configuration(source, "vae"), dtype=dtype)
    _require_all(source, vae)
    return vae


def _load_unet(source: SingleFile, rest: Path, *, dtype: torch.dtype) -> UNet2DConditionModel:
    with readable(source.name), quiet_output():
        unet = UNet2DConditionModel.from_single_file(
            str(source.path), config=str(rest), subfolder="unet", local_files_only=True, dtype=dtype
        )
    _require_all(source, unet)
    return unet


def _configuration(source: SingleFile, part: str | None) -> dict[str, Any]:
    if source.rest is None:
        return {}
    subfolder = {} if part is None else {"subfolder": part}
    return {"config": str(source.rest), "local_files_only": True, **subfolder}


def _require_all(source: SingleFile, module: torch.nn.Module) -> None:
    missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(f"{source.name}: lacks {len(missing)} weights of the configuration; first: {missing[0]!r}")


@contextlib.contextmanager
def _explained(source: SingleFile) -> Iterator[None]:
    try:
        with readable(source.name):
            yield
    except ModelError as error:
        if source.rest is not None:
            raise
        # what diffusers says then is of the hub's configuration
        cure = "name the diffusers folder of its base with --base MODEL, which tells how it is built"
        raise ModelError(f"{error}; {cure}") from error
