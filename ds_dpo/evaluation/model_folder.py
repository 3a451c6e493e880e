"""The models that are compared: diffusers pipeline folders, or a UNet alone with the rest from the base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError

from ds_dpo.config import resolve_asset
from ds_dpo.errors import ModelError
from ds_dpo.models.files import read_json
from ds_dpo.models.sampler import ddim_from
from ds_dpo.quiet import quiet_output

PIPELINES = {pipeline.__name__: pipeline for pipeline in (StableDiffusionXLPipeline, StableDiffusionPipeline)}
INDEX_NAME, UNET_NAME, EXPORT_RECORD_NAME = "model_index.json", "unet", "export.json"


@dataclass(frozen=True)
class ModelFolder:
    """A model as the user names it. rest: folder of the pipeline around its UNet, which may be the base's."""

    name: str
    folder: Path
    rest: Path

    @property
    def step(self) -> int | None:
        """The optimizer step that an exported model was taken at; None for a model that is no export."""
        record = self.folder / EXPORT_RECORD_NAME
        step = read_json(record).get("step") if record.is_file() else None
        return step if isinstance(step, int) else None


def find_model(name: str, *, base: ModelFolder | None) -> ModelFolder:
    """Look at what a folder or ds_dpo:// name holds, without loading it; base: lends what a UNet alone lacks.

    Raises ModelError saying what is there instead of a model.
    """
    folder = Path(resolve_asset(name))
    if (folder / INDEX_NAME).is_file():
        return ModelFolder(name=name, folder=folder, rest=folder)
    if (folder / UNET_NAME / "config.json").is_file():
        if base is None:
            raise ModelError(f"{name}: has a {UNET_NAME}/ but no {INDEX_NAME}; the base must be a whole pipeline")
        return ModelFolder(name=name, folder=folder, rest=base.rest)
    if not folder.is_dir():
        raise ModelError(f"{name}: no such folder; name a diffusers pipeline or an export of scripts/consolidate.py")
    if (folder / "checkpoints").is_dir() or (folder / "zero_to_fp32.py").is_file():
        raise ModelError(f"{name}: holds checkpoints; make a model of them: python scripts/consolidate.py {name} OUT")
    raise ModelError(f"{name}: neither {INDEX_NAME} nor {UNET_NAME}/config.json in it, so no diffusers model")


def load_pipeline(model: ModelFolder) -> DiffusionPipeline:
    """The model in fp32 on the CPU, drawing with DDIM over its own noise schedule; runs no code from the folder.

    Raises ModelError for a family other than SDXL and Stable Diffusion 1, or files that are missing or unreadable.
    """
    family = read_json(model.rest / INDEX_NAME).get("_class_name")
    if family not in PIPELINES:
        raise ModelError(f"{model.rest / INDEX_NAME}: a {family!r}; known are {', '.join(PIPELINES)}")
    with _readable(model), quiet_output():
        unet, loading = UNet2DConditionModel.from_pretrained(
            model.folder,
            subfolder=UNET_NAME,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        pipeline = PIPELINES[family].from_pretrained(
            model.rest, unet=unet, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    if loading["missing_keys"]:
        # diffusers only warns, and leaves these as they were initialized
        missing = sorted(loading["missing_keys"])
        raise ModelError(f"{model.folder / UNET_NAME}: lacks {len(missing)} weights; first: {missing[0]!r}")
    pipeline.unet.eval()
    pipeline.scheduler = ddim_from(pipeline.scheduler.config)
    return pipeline


@contextlib.contextmanager
def _readable(model: ModelFolder) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{model.name}: diffusers cannot load it: {error}") from error
