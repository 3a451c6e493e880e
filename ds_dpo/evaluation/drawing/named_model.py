"""Models that a user may draw with: a pipeline, a UNet or a single file, each with LoRAs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import is_peft_available

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.evaluation.drawing.model_folder import (
    LORA_NAME,
    ModelFolder,
    denoiser_in,
    find_model,
    load_pipeline,
    locate,
    readable,
    variant_of,
)
from ds_dpo.evaluation.drawing.pipeline_parts import INDEX_NAME, family_in
from ds_dpo.evaluation.drawing.single_file_model import (
    SUFFIX,
    SingleFile,
    find_single_file,
    is_lora,
    load_own_vae,
    load_single_file,
    lora_sentence,
    tensor_names,
)
from ds_dpo.models.loading import load_vae
from ds_dpo.models.pipelines.pretrained import open_vae
from ds_dpo.models.sampler import dpmpp_from, euler_from, sampler_from
from ds_dpo.models.weights.files import DIFFUSERS_STEM
from ds_dpo.precision import Precision, torch_dtype
from ds_dpo.process.quiet import quiet_output

SAMPLERS: dict[str, Callable[[Mapping[str, Any]], Any] | None] = {
    "model": None,
    "ddim": sampler_from,
    "euler": euler_from,
    "dpmpp": dpmpp_from,
}


@dataclass(frozen=True)
class Lora:
    """A LoRA, and its strength. name: as the user gives it."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class ModelChoice:
    """A model with its LoRAs, and the refiner that finishes its images. name: as the user gives it."""

    name: str
    loras: tuple[Lora, ...] = ()
    refiner: str | None = None

    def __str__(self) -> str:
        loras = [f"{lora.name}:{lora.scale:g}" for lora in self.loras]
        return " + ".join([self.name, *loras, *([] if self.refiner is None else [self.refiner])])


@dataclass(frozen=True)
class FoundModel:
    """A choice that was found. loras: the files of its LoRAs."""

    choice: ModelChoice
    source: ModelFolder | SingleFile
    loras: tuple[Path, ...]

    @property
    def step(self) -> int | None:
        """The optimizer step of an export, if its folder states it."""
        return self.source.step if isinstance(self.source, ModelFolder) else None


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded. vae: replaces their own. sampler: a name in SAMPLERS."""

    dtype: Precision
    device: torch.device
    variant: str | None = None
    vae: str | None = None
    sampler: str = "model"


def parse_lora(text: str) -> Lora:
    """Read NAME or NAME:SCALE. Raises ConfigError for a scale that is not finite, or no name."""
    name, colon, last = text.rpartition(":")
    try:
        scale = float(last) if colon else 1.0
    except ValueError:
        name, scale = text, 1.0
    name = name if colon else text
    if not name or not math.isfinite(scale):
        raise ConfigError(f"--lora {text}: must be a name with an optional scale, such as my_lora.safetensors:0.8")
    return Lora(name, scale)


def find_models(choices: Sequence[ModelChoice], *, base: str | None, variant: str | None) -> list[FoundModel]:
    """Find each model, without loading it.

    base: the pipeline around a UNet alone, and the configuration of a single file; None is the first choice that is a
    whole pipeline. variant: variant of weights from the hub. Raises ModelError that names what is missing.
    """
    lender = _lender(choices, base=base, variant=variant)
    return [
        FoundModel(
            choice=choice,
            source=_find_source(choice.name, lender, variant=variant),
            loras=tuple(_find_lora(lora.name) for lora in choice.loras),
        )
        for choice in choices
    ]


def _lender(choices: Sequence[ModelChoice], *, base: str | None, variant: str | None) -> ModelFolder | None:
    names = [choice.name for choice in choices] if base is None else [base]
    whole = [name for name in names if (locate(name, variant=variant) / INDEX_NAME).is_file()]
    if base is not None and not whole:
        raise ModelError(f"--base {base}: has no {INDEX_NAME}; give a whole diffusers pipeline")
    return find_model(whole[0], base=None, variant=variant) if whole else None


def _find_source(name: str, lender: ModelFolder | None, *, variant: str | None) -> ModelFolder | SingleFile:
    path = locate(name, variant=variant)
    if path.is_file() or path.suffix == SUFFIX:
        return find_single_file(name, path, rest=None if lender is None else lender.rest)
    is_whole, kind = (path / INDEX_NAME).is_file(), denoiser_in(path)
    if not is_whole and kind is None and (path / LORA_NAME).is_file():
        raise ModelError(lora_sentence(name))
    if kind is not None and not is_whole and lender is None:
        raise ModelError(f"{name}: holds a {kind.title} alone; give the pipeline around it with --base MODEL")
    return find_model(name, base=lender, variant=variant)


def _find_lora(name: str) -> Path:
    path = locate(name)
    if path.is_dir():
        files = [path / LORA_NAME] if (path / LORA_NAME).is_file() else sorted(path.glob(f"*{SUFFIX}"))
        if len(files) != 1:
            raise ModelError(f"--lora {name}: has {len(files)} {SUFFIX} files; give one file")
        (path,) = files
    if not is_lora(tensor_names(f"--lora {name}", path)):
        raise ModelError(f"--lora {name}: not a LoRA: none of its tensors has a LoRA's name")
    if not is_peft_available():
        raise ModelError(f"--lora {name}: needs the library peft: pip install '.[lora]'")
    return path


# ---- loading ----


def load_model(found: FoundModel, loading: Loading) -> DiffusionPipeline:
    """Return the pipeline of a model on its device, with its LoRAs, VAE and sampler.

    A VAE with force_upcast in its configuration is in fp32 if the rest is in fp16, where it would overflow. Raises
    ModelError for files that are unreadable or incomplete, or that do not fit together.
    """
    source = found.source
    load: Callable[..., DiffusionPipeline] = load_pipeline if isinstance(source, ModelFolder) else load_single_file
    pipeline = load(
        source,
        dtype=torch_dtype(loading.dtype),
        variant=loading.variant,
        vae=_load_vae(source, loading),
        sampler=SAMPLERS[loading.sampler],
    )
    for place, (lora, path) in enumerate(zip(found.choice.loras, found.loras, strict=True)):
        _add_lora(pipeline, lora, path, adapter=f"lora_{place}")
    if found.loras:
        adapters = [f"lora_{place}" for place in range(len(found.loras))]
        pipeline.set_adapters(adapters, [lora.scale for lora in found.choice.loras])
    return pipeline.to(loading.device)


def _load_vae(source: ModelFolder | SingleFile, loading: Loading) -> AutoencoderKL:
    if isinstance(source, SingleFile) and source.is_whole and loading.vae is None:
        vae = load_own_vae(source, dtype=torch.float32)
        return vae.to(torch_dtype(_vae_dtype(vae.config, loading)))
    if source.rest is None:
        raise ModelError(
            f"--vae {loading.vae} for {source.name}: give the pipeline that it belongs to with --base MODEL"
        )
    variant = variant_of(source.rest / "vae", DIFFUSERS_STEM, asked=loading.variant)
    family = family_in(source.rest)
    wanted = ModelConfig(pretrained=str(source.rest), family=family, vae=loading.vae, variant=variant)
    dtype = _vae_dtype(open_vae(wanted).config, loading)
    return load_vae(wanted.model_copy(update={"vae_dtype": dtype}))


def _vae_dtype(config: Mapping[str, Any], loading: Loading) -> Precision:
    is_fragile = config.get("force_upcast", True)  # a missing value means true in diffusers
    return "fp32" if loading.dtype == "fp16" and is_fragile else loading.dtype


def _add_lora(pipeline: DiffusionPipeline, lora: Lora, path: Path, *, adapter: str) -> None:
    with readable(f"--lora {lora.name}"), quiet_output():
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter, local_files_only=True)
    if not any(adapter in adapters for adapters in pipeline.get_list_adapters().values()):
        # diffusers only prints a warning
        raise ModelError(f"--lora {lora.name}: none of its tensors belongs to this model")
