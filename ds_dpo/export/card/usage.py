"""The Python lines of a model card that load an export, for each format."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from ds_dpo.config.asset_paths import ASSET_PREFIX
from ds_dpo.config.families import DEFAULT_FAMILY
from ds_dpo.models.families.family import Published
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.precision import TORCH_NAMES, Precision

PROMPT = "a pelican riding a bicycle along a pier, golden hour"


class Exported(Protocol):
    """The facts of a card that decide how an export is loaded."""

    @property
    def format(self) -> str: ...
    @property
    def family(self) -> str | None: ...
    @property
    def dtype(self) -> Precision | None: ...
    @property
    def repo_id(self) -> str | None: ...
    @property
    def file_name(self) -> str | None: ...
    @property
    def holds_unet_only(self) -> bool: ...


def usage(exported: Exported, *, base: str | None, name: str) -> str:
    """Return Markdown that loads the export and draws an image.

    base: published name of the pipeline around it. name: hub id or folder of the export.
    """
    return USAGES[exported.format](exported, base or "BASE_MODEL", name)


def _pipeline(exported: Exported, base: str, name: str) -> str:
    load = f"pipeline = DiffusionPipeline.from_pretrained({_text(name)}, torch_dtype={_dtype(exported)})"
    return _python("DiffusionPipeline", [load], exported)


def _unet(exported: Exported, base: str, name: str) -> str:
    dtype = _dtype(exported)
    load = [
        f'unet = UNet2DConditionModel.from_pretrained({_text(name)}, subfolder="unet", torch_dtype={dtype})',
        f"pipeline = DiffusionPipeline.from_pretrained({_base(base)}, unet=unet, torch_dtype={dtype})",
    ]
    return _python("DiffusionPipeline, UNet2DConditionModel", load, exported)


def _single_file(exported: Exported, base: str, name: str) -> str:
    dtype, place = _dtype(exported), _text(_file_address(exported, name))
    if exported.holds_unet_only:
        load = [
            "unet = UNet2DConditionModel.from_single_file(",
            f'    {place}, config={_base(base)}, subfolder="unet", torch_dtype={dtype}',
            ")",
            f"pipeline = DiffusionPipeline.from_pretrained({_base(base)}, unet=unet, torch_dtype={dtype})",
        ]
        folders = "ComfyUI: put the file into `models/diffusion_models`, and load text encoders and VAE of the base."
        return f"{folders}\n\n{_python('DiffusionPipeline, UNet2DConditionModel', load, exported)}"
    pipeline = _published(exported).pipeline_class
    load = [f"pipeline = {pipeline}.from_single_file({place}, torch_dtype={dtype})"]
    folders = "ComfyUI: put the file into `models/checkpoints`; A1111 and Forge: into `models/Stable-diffusion`."
    return f"{folders}\n\n{_python(pipeline, load, exported)}"


def _lora(exported: Exported, base: str, name: str) -> str:
    weights = f", weight_name={_text(exported.file_name)}" if exported.file_name else ""
    load = [
        f"pipeline = DiffusionPipeline.from_pretrained({_base(base)}, torch_dtype={_dtype(exported)})",
        f"pipeline.load_lora_weights({_text(name)}{weights})",
    ]
    return _python("DiffusionPipeline", load, exported)


USAGES: dict[str, Callable[[Exported, str, str], str]] = {
    "pipeline": _pipeline,
    "unet": _unet,
    "single-file": _single_file,
    "lora": _lora,
}


def _python(imports: str, load: list[str], exported: Exported) -> str:
    published = _published(exported)
    given = f"{published.draw_arguments}guidance_scale={published.guidance_scale}"
    draw = [
        'pipeline.to("cuda")',
        f"image = pipeline({_text(PROMPT)}, {given}).images[0]",
        'image.save("pelican.png")',
    ]
    start = ["import torch", f"from diffusers import {imports}"]
    if any("resolve_asset(" in line for line in load):
        start.append("from ds_dpo.config.asset_paths import resolve_asset")
    return "\n".join(["```python", *start, "", *load, *draw, "```"])


def _published(exported: Exported) -> Published:
    return FAMILIES[exported.family or DEFAULT_FAMILY].published


def _file_address(exported: Exported, name: str) -> str:
    file_name = exported.file_name or "model.safetensors"
    if exported.repo_id is None:
        return f"{name}/{file_name}"
    return f"https://huggingface.co/{exported.repo_id}/blob/main/{file_name}"


def _dtype(exported: Exported) -> str:
    return f"torch.{TORCH_NAMES[exported.dtype or 'fp16']}"


def _base(name: str) -> str:
    """Return Python that names the base; a model inside this package has no other address."""
    return f"resolve_asset({_text(name)})" if name.startswith(ASSET_PREFIX) else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
