"""Models in one .safetensors file, as in A1111 and ComfyUI: a whole checkpoint, or a denoiser alone."""

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
    ModelMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError, safe_open

from ds_dpo.errors import ModelError
from ds_dpo.evaluation.drawing.model_folder import WITHOUT_CHECKER, pipeline_around, readable
from ds_dpo.evaluation.drawing.pipeline_parts import text_parts_of_file
from ds_dpo.models.families.family import DenoiserKind
from ds_dpo.models.pipelines.single_file import kind_in
from ds_dpo.process.quiet import quiet_output

SUFFIX = ".safetensors"
VAE_BEGINNING, SDXL_TEXT_BEGINNING = "first_stage_model.", "conditioner."


@dataclass(frozen=True)
class SingleFile:
    """A file, described by its tensors' names.

    kind: of its denoiser. rest: folder of the pipeline with its configuration and the parts that it lacks; None for a
    whole checkpoint whose configuration diffusers gets from the hub. is_whole: it has text encoders and VAE. is_sdxl:
    they are SDXL's.
    """

    name: str
    path: Path
    kind: DenoiserKind
    rest: Path | None
    is_whole: bool
    is_sdxl: bool


def find_single_file(name: str, path: Path, *, rest: Path | None) -> SingleFile:
    """Find out what a file holds, without loading it. Raises ModelError that says what was found or is missing."""
    keys = tensor_names(name, path)
    is_whole = any(key.startswith(VAE_BEGINNING) for key in keys)
    kind = kind_in(keys)
    if kind is None:
        if is_lora(keys):
            raise ModelError(lora_sentence(name))
        raise ModelError(f"{name}: has no UNet of SDXL or Stable Diffusion 1; its first tensor is {min(keys)!r}")
    if not is_whole and rest is None:
        raise ModelError(f"{name}: holds a {kind.title} alone; give the pipeline around it with --base MODEL")
    is_sdxl = any(key.startswith(SDXL_TEXT_BEGINNING) for key in keys)
    return SingleFile(name=name, path=path, kind=kind, rest=rest, is_whole=is_whole, is_sdxl=is_sdxl)


def tensor_names(name: str, path: Path) -> list[str]:
    """Return the names of a file's tensors from its header. Raises ModelError if it is not a safetensors file."""
    if not path.is_file():
        raise ModelError(f"{name}: no such file or folder")
    if path.suffix != SUFFIX:
        raise ModelError(f"{name}: only {SUFFIX} files are read, because others can run code")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{name}: cannot be read as safetensors ({error})") from error
    if not keys:
        raise ModelError(f"{name}: has no tensor")
    return keys


def is_lora(keys: list[str]) -> bool:
    """Return whether these are a LoRA's tensor names; diffusers, peft and kohya all use 'lora' in them."""
    return any("lora" in key for key in keys)


def lora_sentence(name: str) -> str:
    """Return what to do with a LoRA that was given as a model."""
    return f"{name}: a LoRA, not a model; give its model first: --model BASE --lora {name}"


def load_single_file(
    source: SingleFile,
    *,
    dtype: torch.dtype,
    vae: AutoencoderKL | None,
    variant: str | None = None,
    sampler: Callable[[Mapping[str, Any]], Any] | None = None,
) -> DiffusionPipeline:
    """Return the model on the CPU; reads only the source file, and the hub's configuration if rest is None.

    vae: replaces its own, which for a denoiser alone is that of rest. Raises ModelError if diffusers cannot load it.
    """
    if not source.is_whole:
        assert source.rest is not None, "find_single_file requires it"
        denoiser = _load_denoiser(source, source.rest, dtype=dtype)
        return pipeline_around(denoiser, source.rest, name=source.name, variant=variant, vae=vae, sampler=sampler)
    family = StableDiffusionXLPipeline if source.is_sdxl else StableDiffusionPipeline
    text = {}
    if source.rest is not None:  # else the configuration is diffusers' own
        text = text_parts_of_file(source.path, source.rest, family.__name__, dtype=dtype)
    with _explained(source), quiet_output():
        pipeline = family.from_single_file(
            str(source.path),
            **_configuration(source, None),
            **({} if vae is None else {"vae": vae}),
            **text,
            **WITHOUT_CHECKER.get(family.__name__, {}),
            dtype=dtype,
        )
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            _require_all(source, part)
    if sampler is not None:
        pipeline.scheduler = sampler(pipeline.scheduler.config)
    return pipeline


def load_own_vae(source: SingleFile, *, dtype: torch.dtype) -> AutoencoderKL:
    """Return the VAE of a whole checkpoint. Raises ModelError if diffusers cannot load it."""
    with _explained(source), quiet_output():
        vae = AutoencoderKL.from_single_file(str(source.path), **_configuration(source, "vae"), dtype=dtype)
    _require_all(source, vae)
    return vae


def _load_denoiser(source: SingleFile, rest: Path, *, dtype: torch.dtype) -> ModelMixin:
    kind = source.kind
    with readable(source.name), quiet_output():
        denoiser = kind.model_class().from_single_file(
            str(source.path), config=str(rest), subfolder=kind.folder, local_files_only=True, dtype=dtype
        )
    _require_all(source, denoiser)
    return denoiser


def _configuration(source: SingleFile, part: str | None) -> dict[str, Any]:
    if source.rest is None:
        return {}
    subfolder = {} if part is None else {"subfolder": part}
    return {"config": str(source.rest), "local_files_only": True, **subfolder}


def _require_all(source: SingleFile, module: torch.nn.Module) -> None:
    missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(
            f"{source.name}: lacks {len(missing)} weights of its configuration; the first is {missing[0]!r}"
        )


@contextlib.contextmanager
def _explained(source: SingleFile) -> Iterator[None]:
    try:
        with readable(source.name):
            yield
    except ModelError as error:
        if source.rest is not None:
            raise
        # then the error is about the hub's configuration
        cure = "give the diffusers folder of its base, which has its configuration, with --base MODEL"
        raise ModelError(f"{error}; {cure}") from error
