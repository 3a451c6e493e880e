"""Draw prompts with one or several models from the same noise: images, one picture side by side, and a record."""

from __future__ import annotations

import io
import json
import math
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.evaluation.drawing.named_model import FoundModel, Loading, ModelChoice, find_models, load_model
from ds_dpo.evaluation.drawing.prompt_file import Drawing, list_drawings
from ds_dpo.evaluation.drawing.sampling import denoiser_of, draw_images
from ds_dpo.evaluation.drawing.single_file_model import SUFFIX
from ds_dpo.evaluation.pages.picture import Group, Row, Tile, image_grid, save_file, save_png, to_picture
from ds_dpo.precision import Precision
from ds_dpo.process.say import Say

PICTURE_NAME, RECORD_NAME, IMAGES_NAME = "grid.png", "record.json", "images"
UNTELLING = ("export", "model", "pytorch_lora_weights")  # last parts of paths that do not identify a run or a LoRA
SHOWN_PIXELS = 160  # smallest side of an image in the picture, so that its prompt fits beside it


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw, and with which models. guidance: 1 is off. resolution: None is the first model's.

    batch: None is chosen by the resolution. base: pipeline for UNets and single files. labels: names in the picture,
    made from the models' names if empty. device: auto is an accelerator if there is one. dtype: None is fp16, or fp32
    on a CPU.
    """

    models: tuple[ModelChoice, ...]
    out: Path
    prompts: tuple[str, ...] = ()
    prompt_file: Path | None = None
    seeds: tuple[int, ...] = (0,)
    steps: int = 30
    guidance: float = 5.0
    resolution: int | None = None
    batch: int | None = None
    dtype: Precision | None = None
    device: str = "auto"
    scheduler: str = "model"
    base: str | None = None
    vae: str | None = None
    variant: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A model's images (N, 3, X, Y) in 0..1, and facts about it."""

    images: Tensor
    facts: Mapping[str, Any]


def generate(request: Request, *, say: Say = print) -> dict[str, Any]:
    """Draw each prompt and seed with each model; returns the content of out/record.json, which is written last.

    Raises ConfigError for a request that cannot be drawn or written, ModelError for a model that cannot be used.
    """
    _check(request)
    drawings = list_drawings(request.prompts, request.prompt_file, request.seeds)
    found = find_models(request.models, base=request.base, variant=request.variant)
    labels = request.labels or short_labels(request.models)
    loading = _loading(request)
    say(f"{len(drawings)} images with each of {len(found)} models, on {loading.device} in {loading.dtype}")
    drawn: dict[str, Drawn] = {}
    noise, resolution = None, request.resolution or 0
    for label, model in zip(labels, found, strict=True):
        start = time.perf_counter()
        pipeline = load_model(model, loading)
        resolution = resolution or own_resolution(pipeline)
        noise = _same_noise(pipeline, resolution, first=noise, name=str(model.choice))
        images = _draw(pipeline, drawings, resolution, request, name=str(model.choice))
        drawn[label] = Drawn(images, _facts(model, pipeline, loading))
        _save_images(request.out, label, drawings, drawn[label], request)
        del pipeline  # so that the next one fits
        say(f"drew {label}: {model.choice}, {time.perf_counter() - start:.1f} s")
    picture = labelled_picture(drawn, drawings, notes=_notes(drawn, request, loading, resolution))
    save_png(picture, request.out / PICTURE_NAME)
    record = _record(drawn, drawings, request, loading, resolution)
    save_file(request.out / RECORD_NAME, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    say(f"images, {PICTURE_NAME} and {RECORD_NAME} in {request.out}")
    return record


def _check(request: Request) -> None:
    for name in ("steps", "resolution", "batch"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: must be 1 or more")
    if not (request.guidance >= 1 and math.isfinite(request.guidance)):
        raise ConfigError(f"--guidance {request.guidance}: must be 1 (off) or more")
    if request.labels and len(request.labels) != len(request.models):
        raise ConfigError(f"--labels: {len(request.labels)} labels for {len(request.models)} models; give one for each")
    if len(set(request.labels)) < len(request.labels):
        raise ConfigError(f"--labels {' '.join(request.labels)}: two labels are the same; each must differ")
    if request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"--out {request.out} is a file; give a folder")


def _loading(request: Request) -> Loading:
    device = usable_device(request.device)
    dtype = request.dtype or ("fp32" if device.type == "cpu" else "fp16")
    return Loading(dtype=dtype, device=device, variant=request.variant, vae=request.vae, sampler=request.scheduler)


def usable_device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # a device that torch does not know, or was not built for
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"--device {name} cannot be used here ({first_line}); give auto or cpu") from error


def short_labels(choices: Sequence[ModelChoice]) -> tuple[str, ...]:
    """Return names for a picture: the shortest distinct ends of the paths of models and LoRAs."""
    deepest = max(len(_path_parts(choice.name)) for choice in choices)
    for depth in range(1, deepest + 1):
        for keeps_suffix in (False, True):  # a file and a folder may differ only in the suffix
            labels = tuple(_label(choice, depth, keeps_suffix) for choice in choices)
            if len(set(labels)) == len(labels):
                return labels
    raise ConfigError("two --model have the same name and LoRAs; leave one out, or name them with --labels")


def _label(choice: ModelChoice, depth: int, keeps_suffix: bool) -> str:
    loras = []
    for lora in choice.loras:
        name = _last_parts(lora.name, depth, keeps_suffix)
        loras.append(name if lora.scale == 1 else f"{name} x {lora.scale:g}")
    return " + ".join([_last_parts(choice.name, depth, keeps_suffix), *loras])


def _last_parts(name: str, depth: int, keeps_suffix: bool) -> str:
    parts = _path_parts(name if keeps_suffix else name.removesuffix(SUFFIX))
    says_nothing = parts[-1] in UNTELLING
    return "/".join(parts[-depth - says_nothing :])


def _path_parts(name: str) -> list[str]:
    return [part for part in re.split(r"[/\\]+", name) if part] or [name]


def own_resolution(pipeline: DiffusionPipeline) -> int:
    """Return the side of the images, in pixels, that a model was made for."""
    return int(denoiser_of(pipeline).config.sample_size * pipeline.vae_scale_factor)


def _same_noise(
    pipeline: DiffusionPipeline, resolution: int, *, first: tuple[int, int] | None, name: str
) -> tuple[int, int]:
    """Return channels and side of a model's latents. Raises ModelError if they differ from the first model's."""
    if resolution % 8 or resolution % pipeline.vae_scale_factor:
        factor = math.lcm(8, pipeline.vae_scale_factor)
        raise ConfigError(f"--resolution {resolution}: must be a multiple of {factor} for {name}")
    own = (int(denoiser_of(pipeline).config.in_channels), resolution // pipeline.vae_scale_factor)
    if first is not None and own != first:
        raise ModelError(
            f"{name}: its noise has {own[0]} channels and side {own[1]}, but the first model's has {first[0]} and "
            f"{first[1]}; draw with each of them separately"
        )
    return own


def _draw(
    pipeline: DiffusionPipeline, drawings: Sequence[Drawing], resolution: int, request: Request, *, name: str
) -> Tensor:
    images = draw_images(
        pipeline,
        [drawing.prompt for drawing in drawings],
        [drawing.seed for drawing in drawings],
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        resolution=resolution,
        images_at_once=request.batch,
    )
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise ModelError(
            f"{name}: {bad} of its {len(images)} images are not finite: its training has diverged, or it overflows in "
            "fp16; try --dtype fp32"
        )
    return images


def _facts(model: FoundModel, pipeline: DiffusionPipeline, loading: Loading) -> dict[str, Any]:
    return {
        "model": model.choice.name,
        "loras": [{"name": lora.name, "scale": lora.scale} for lora in model.choice.loras],
        "step": model.step,
        "scheduler": type(pipeline.scheduler).__name__,
        "vae": loading.vae,
        "vae_dtype": str(pipeline.vae.dtype).removeprefix("torch."),
    }


# ---- files ----


def labelled_picture(drawn: Mapping[str, Drawn], drawings: Sequence[Drawing], *, notes: Sequence[str]) -> Any:
    """Return a picture with a row per prompt and seed, and a labelled column per model."""
    rows = [
        Row(drawing.prompt, tuple(Tile(of_model.images[place], f"seed {drawing.seed}") for of_model in drawn.values()))
        for place, drawing in enumerate(drawings)
    ]
    largest = max(of_model.images.shape[-1] for of_model in drawn.values())
    title = "The same prompts and noise" if len(drawn) > 1 else next(iter(drawn))
    return image_grid(rows, [Group("", tuple(drawn))], title=title, notes=notes, tile_pixels=_shown_pixels(largest))


def _shown_pixels(side: int) -> int | None:
    """Return a whole multiple of a small image's side, so that its pixels have equal sizes; None: do not enlarge."""
    return None if side >= SHOWN_PIXELS else side * math.ceil(SHOWN_PIXELS / side)


def _notes(drawn: Mapping[str, Drawn], request: Request, loading: Loading, resolution: int) -> list[str]:
    schedulers = sorted({str(of_model.facts["scheduler"]) for of_model in drawn.values()})
    settings = (
        f"{request.steps} steps of {', '.join(schedulers)}, guidance {request.guidance:g}, {resolution} px, "
        f"{loading.dtype}."
    )
    return [settings] if len(drawn) == 1 else [settings, "Images in a row started from the same noise."]


def _save_images(out: Path, label: str, drawings: Sequence[Drawing], drawn: Drawn, request: Request) -> None:
    for place, drawing in enumerate(drawings):
        buffer = io.BytesIO()
        to_picture(drawn.images[place]).save(buffer, "PNG", pnginfo=_png_text(label, drawing, drawn, request))
        save_file(out / image_name(label, place, drawing), buffer.getvalue())


def image_name(label: str, place: int, drawing: Drawing) -> str:
    """Return the path of an image inside the folder."""
    return f"{IMAGES_NAME}/{file_name(label)}/{place:04d}_seed_{drawing.seed}.png"


def file_name(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", label).strip("._") or "model"


def _png_text(label: str, drawing: Drawing, drawn: Drawn, request: Request) -> PngInfo:
    """Return the text inside the PNG. It has the model's label but no path, because images are shared."""
    text = PngInfo()
    values = {
        "prompt": drawing.prompt,
        "seed": drawing.seed,
        "model": label,
        "steps": request.steps,
        "guidance": request.guidance,
        "scheduler": drawn.facts["scheduler"],
    }
    for name, value in values.items():
        text.add_itxt(name, str(value))
    return text


def _record(
    drawn: Mapping[str, Drawn], drawings: Sequence[Drawing], request: Request, loading: Loading, resolution: int
) -> dict[str, Any]:
    return {
        "models": {label: of_model.facts for label, of_model in drawn.items()},
        "images": [
            {
                "prompt": drawing.prompt,
                "seed": drawing.seed,
                "files": {label: image_name(label, place, drawing) for label in drawn},
            }
            for place, drawing in enumerate(drawings)
        ],
        "steps": request.steps,
        "guidance": request.guidance,
        "resolution": resolution,
        "dtype": loading.dtype,
        "device": str(loading.device),
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
        },
    }
