"""Models in folders: a diffusers pipeline, or a denoiser alone with the rest from a base."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from safetensors import SafetensorError

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.command_text import command_text
from ds_dpo.config.families import LIMITS
from ds_dpo.errors import ModelError, cut
from ds_dpo.evaluation.drawing.pipeline_parts import INDEX_NAME, text_parts
from ds_dpo.models.families.family import DenoiserKind
from ds_dpo.models.families.table import FAMILIES, KINDS, kind_of
from ds_dpo.models.sampler import sampler_from
from ds_dpo.models.weights.files import DIFFUSERS_STEM, TEXT_STEM, read_json
from ds_dpo.models.weights.hub import fetch_folder
from ds_dpo.models.weights.parts import require_plain_numbers
from ds_dpo.process.quiet import quiet_output

# those that draw an image from nothing, by their names in diffusers
PIPELINES: dict[str, Any] = {
    family.published.pipeline_class: getattr(diffusers, family.published.pipeline_class)
    for family in FAMILIES.values()
    if LIMITS[family.name].undrawable is None
}
EXPORT_RECORD_NAME = "export.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
HUB_SETTINGS = ("*/*.json", "*/*.txt", "*/*.model", "*/*.jinja")  # files of schedulers, tokenizers and models
HUB_WEIGHTS = (".safetensors", "-*-of-*.safetensors")
# else diffusers asks for a safety checker, which acts when a pipeline decodes images: never here
WITHOUT_CHECKER = {StableDiffusionPipeline.__name__: {"safety_checker": None, "requires_safety_checker": False}}


@dataclass(frozen=True)
class ModelFolder:
    """A model. name: as the user gives it. rest: folder of the pipeline around its UNet, which may be the base's."""

    name: str
    folder: Path
    rest: Path

    @property
    def step(self) -> int | None:
        """The optimizer step of an exported model; None for other models."""
        record = self.folder / EXPORT_RECORD_NAME
        step = read_json(record).get("step") if record.is_file() else None
        return step if isinstance(step, int) else None


def locate(name: str, *, variant: str | None = None) -> Path:
    """Return the folder or file of a path, a ds_dpo:// name, or a hub id, which is downloaded into the hub's cache.

    variant: variant of the downloaded weights, such as fp16. Raises ModelError if a hub id cannot be downloaded.
    """
    path = Path(resolve_asset(name))
    if path.exists() or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.safetensors)", name) is None:
        return path
    infix = f".{variant}" if variant else ""
    weights = [f"*/{stem}{infix}{end}" for stem in (DIFFUSERS_STEM, TEXT_STEM) for end in HUB_WEIGHTS]
    return fetch_folder(name, revision=None, patterns=(INDEX_NAME, *HUB_SETTINGS, *weights, LORA_NAME))


def find_model(name: str, *, base: ModelFolder | None, variant: str | None = None) -> ModelFolder:
    """Find the model of a folder, a ds_dpo:// name or a hub id, without loading it.

    base: provides what a denoiser alone lacks. variant: see locate. Raises ModelError that says what was found instead.
    """
    folder = locate(name, variant=variant)
    if (folder / INDEX_NAME).is_file():
        return ModelFolder(name=name, folder=folder, rest=folder)
    kind = denoiser_in(folder)
    if kind is not None:
        if base is None:
            raise ModelError(f"{name}: has a {kind.folder}/ but no {INDEX_NAME}; the base must be a whole pipeline")
        return ModelFolder(name=name, folder=folder, rest=base.rest)
    if not folder.is_dir():
        raise ModelError(f"{name}: no such folder; give a diffusers pipeline or an export of consolidate")
    if (folder / "checkpoints").is_dir() or (folder / "zero_to_fp32.py").is_file():
        raise ModelError(f"{name}: holds checkpoints; export a model first: {command_text('consolidate', name, 'OUT')}")
    raise ModelError(f"{name}: not a diffusers model: it has neither {INDEX_NAME} nor {_folders()}/config.json")


def denoiser_in(folder: Path) -> DenoiserKind | None:
    """Return the kind of denoiser that a diffusers folder has; None if it has none."""
    return next((kind for kind in KINDS.values() if (folder / kind.folder / "config.json").is_file()), None)


def _folders() -> str:
    return " or ".join(dict.fromkeys(kind.folder for kind in KINDS.values()))


def load_pipeline(
    model: ModelFolder,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    vae: AutoencoderKL | None = None,
    sampler: Callable[[Mapping[str, Any]], Any] | None = sampler_from,
) -> DiffusionPipeline:
    """Return the model on the CPU, with DDIM over its own noise schedule, or Euler over its own flow.

    No code of the folder runs. variant: used for each part that has it; a part with only one kind of weights uses that.
    vae: replaces the model's own. sampler: makes a sampler from the configuration of its scheduler; None keeps that.
    Raises ModelError for a family other than SDXL and Stable Diffusion 1, or files that are missing or unreadable.
    """
    _family(model.rest)
    denoiser = load_denoiser(model, dtype=dtype, variant=variant)
    return pipeline_around(denoiser, model.rest, name=model.name, variant=variant, vae=vae, sampler=sampler)


def pipeline_around(
    denoiser: ModelMixin,
    rest: Path,
    *,
    name: str,
    variant: str | None = None,
    vae: AutoencoderKL | None = None,
    sampler: Callable[[Mapping[str, Any]], Any] | None = sampler_from,
) -> DiffusionPipeline:
    """Return the pipeline in the folder rest with another denoiser, in its dtype; else as load_pipeline.

    name: name of the model in errors.
    """
    family = _family(rest)
    parts_variant = variant_of(rest / "text_encoder", TEXT_STEM, asked=variant)
    with readable(name), quiet_output():
        pipeline = PIPELINES[family].from_pretrained(
            rest,
            **{kind_of({"_class_name": type(denoiser).__name__}).folder: denoiser.eval()},
            **({} if vae is None else {"vae": vae}),
            **text_parts(rest, family, dtype=denoiser.dtype, variant=parts_variant),
            **WITHOUT_CHECKER.get(family, {}),
            variant=parts_variant,
            dtype=denoiser.dtype,
            use_safetensors=True,
            local_files_only=True,
        )
    if sampler is not None:
        pipeline.scheduler = sampler(pipeline.scheduler.config)
    return pipeline


def _family(rest: Path) -> str:
    family = read_json(rest / INDEX_NAME).get("_class_name")
    if family not in PIPELINES:
        raise ModelError(f"{rest / INDEX_NAME}: a {family!r}, but only {', '.join(PIPELINES)} can be loaded")
    return str(family)


def load_denoiser(model: ModelFolder, *, dtype: torch.dtype, variant: str | None) -> ModelMixin:
    """Return a folder's denoiser on the CPU. Raises ModelError for files that are missing, unreadable or incomplete."""
    kind = denoiser_in(model.folder)
    if kind is None:
        raise ModelError(f"{model.folder}: no {_folders()}/config.json in it")
    folder = model.folder / kind.folder
    require_plain_numbers(read_json(folder / "config.json"), folder)
    with readable(model.name), quiet_output():
        denoiser, loading = kind.model_class().from_pretrained(
            model.folder,
            subfolder=kind.folder,
            variant=variant_of(folder, DIFFUSERS_STEM, asked=variant),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if loading["missing_keys"]:
        # diffusers only prints a warning, and leaves these weights as they were initialized
        missing = sorted(loading["missing_keys"])
        raise ModelError(f"{folder}: lacks {len(missing)} weights; first: {missing[0]!r}")
    return denoiser


def variant_of(folder: Path, stem: str, *, asked: str | None) -> str | None:
    """Return the requested variant if a part has it; else that of its weights, which is None for plain ones."""
    pattern = re.compile(rf"{re.escape(stem)}(?:\.(\w+))?(?:-\d+-of-\d+)?\.safetensors")
    found = {match[1] for path in folder.glob("*.safetensors") if (match := pattern.fullmatch(path.name))}
    if asked in found:
        return asked
    return found.pop() if len(found) == 1 else None


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn diffusers' errors about a model's files into a ModelError that names the model."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{name}: diffusers cannot load it: {cut(str(error), characters=600)}") from error
