"""Compare base, tuned model and SFT control on the miniature's test prompts; write summary.json and a picture."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from ds_dpo.errors import ConfigError, ModelError
from ds_dpo.evaluation.drawing.model_folder import ModelFolder, find_model, load_pipeline
from ds_dpo.evaluation.drawing.sampling import denoiser_of, draw_images
from ds_dpo.evaluation.miniature.picture import comparison_picture
from ds_dpo.evaluation.miniature.report import BASE, SFT, TUNED, Judged, judge, summarize, table
from ds_dpo.evaluation.pages.picture import save_file, save_png
from ds_dpo.miniature.pairs import SPLITS
from ds_dpo.miniature.world import IMAGE_SIZE, TEST_PROMPTS
from ds_dpo.models.sampler import DDIM_SETTINGS
from ds_dpo.process.say import Say

SUMMARY_NAME, PICTURE_NAME = "summary.json", "grid.png"
FIRST_SEED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare. base, tuned, sft: names of models. seeds: number of seeds per prompt, from first_seed on."""

    base: str
    tuned: str
    sft: str | None = None
    out: Path
    seeds: int = 8
    first_seed: int = FIRST_SEED
    steps: int = 20
    guidance: float = 1.0
    batch: int = 24
    prompts: tuple[str, ...] = TEST_PROMPTS


def evaluate(request: Request, *, say: Say = print) -> dict[str, Any]:
    """Compare the models on the same prompts and noise; returns the content of out/summary.json.

    Raises ConfigError for a request that cannot be drawn or written, ModelError for a model that cannot be used.
    """
    check_request(request)
    models = _find_models(request)
    prompts, seeds = images_to_draw(request)
    say(f"{len(prompts)} images per model: {len(request.prompts)} test prompts x {request.seeds} seeds from {seeds[0]}")
    judged = {name: _draw_and_judge(model, request, say=say) for name, model in models.items()}
    summary = {**summarize(judged), **_describe(request)}
    for name, model in models.items():
        summary["models"][name] |= {"path": model.name, "step": model.step}
    picture = comparison_picture(judged, summary, seeds=request.seeds)
    save_png(picture, request.out / PICTURE_NAME)
    # written last, so that a summary means that all files exist
    save_file(request.out / SUMMARY_NAME, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    say(f"\n{table(summary)}\n")
    if summary["identical_to_base"]:
        say("the tuned model draws exactly the same images as the base: check that --tuned is right")
    say(f"pictures: {request.out / PICTURE_NAME}")
    say(f"summary: {request.out / SUMMARY_NAME}")
    return summary


def check_request(request: Request) -> None:
    """Raise ConfigError for impossible numbers, or seeds from which the training pairs were drawn."""
    for name, value in (("seeds", request.seeds), ("steps", request.steps), ("batch", request.batch)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be 1 or more")
    if not request.guidance >= 1:
        raise ConfigError(f"--guidance {request.guidance}: must be 1 (off) or more")
    own = range(request.first_seed, request.first_seed + len(request.prompts) * request.seeds)
    if own.start < 0 or own.stop > 2**63:
        raise ConfigError(f"--first_seed {request.first_seed}: must be 0 or more and leave room for {len(own)} seeds")
    for split, (prompts, repeats, first) in SPLITS.items():
        used = range(first, first + len(prompts) * repeats)
        if own.start < used.stop and used.start < own.stop:
            raise ConfigError(
                f"--first_seed {request.first_seed}: {own.start}..{own.stop - 1} overlaps "
                f"{used.start}..{used.stop - 1}, from which the pairs of {split} were drawn; give {FIRST_SEED}"
            )
    if request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"--out {request.out} is a file; give a folder")


def images_to_draw(request: Request) -> tuple[list[str], list[int]]:
    """Return prompt and seed of each image. Each image has its own seed, so that prompts do not share noise."""
    prompts = [prompt for prompt in request.prompts for _ in range(request.seeds)]
    return prompts, list(range(request.first_seed, request.first_seed + len(prompts)))


def _find_models(request: Request) -> dict[str, ModelFolder]:
    """Find all models before the first one draws."""
    base = find_model(request.base, base=None)
    models = {BASE: base}
    if request.sft is not None:
        models[SFT] = find_model(request.sft, base=base)
    return {**models, TUNED: find_model(request.tuned, base=base)}


def _draw_and_judge(model: ModelFolder, request: Request, *, say: Say) -> Judged:
    start = time.perf_counter()
    pipeline = load_pipeline(model)
    _require_miniature(model, pipeline)
    prompts, seeds = images_to_draw(request)
    images = draw_images(
        pipeline,
        prompts,
        seeds,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        resolution=IMAGE_SIZE,
        images_at_once=request.batch,
    )
    _require_finite(model, images)
    judged = judge(images, prompts)
    step = "" if model.step is None else f", step {model.step}"
    seconds = time.perf_counter() - start
    say(f"drew {model.name}{step}: reward {judged.found.reward.mean():.3f}, {seconds:.0f} s")
    return judged


def _require_miniature(model: ModelFolder, pipeline: DiffusionPipeline) -> None:
    side = denoiser_of(pipeline).config.sample_size * pipeline.vae_scale_factor
    if side != IMAGE_SIZE:
        raise ModelError(f"{model.name}: draws images of {side} px, but the miniature's reward needs {IMAGE_SIZE} px")


def _require_finite(model: ModelFolder, images: Tensor) -> None:
    bad = int((~images.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise ModelError(f"{model.name}: {bad} of its {len(images)} images are not finite: its training has diverged")


def _describe(request: Request) -> dict[str, Any]:
    """Return how the images were drawn, so that the evaluation can be repeated."""
    return {
        "prompts": list(request.prompts),
        "seeds": request.seeds,
        "first_seed": request.first_seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "scheduler": {"class": DDIMScheduler.__name__, **DDIM_SETTINGS},
        "versions": {
            "python": platform.python_version(),
            **{library.__name__: library.__version__ for library in (torch, diffusers, transformers)},
        },
    }
