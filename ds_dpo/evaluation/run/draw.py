"""Draw the images of an evaluation that are missing, each rank its share of the batches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.errors import ModelError, cut
from ds_dpo.evaluation.drawing.generate import own_resolution
from ds_dpo.evaluation.drawing.named_model import Loading, load_model
from ds_dpo.evaluation.drawing.refiner import load_refiner
from ds_dpo.evaluation.drawing.sampling import draw_images
from ds_dpo.evaluation.run.drawn_images import DrawnImage, ImageWriter, as_drawn, missing_batches, verified_images
from ds_dpo.evaluation.run.models import LabelledModel
from ds_dpo.evaluation.run.pace import Pace
from ds_dpo.evaluation.run.settings import Settings
from ds_dpo.evaluation.run.work import Group, ImageTask, batches_of, share_of
from ds_dpo.process.say import Say


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How the images of a folder are drawn."""

    out: Path
    settings: Settings
    loading: Loading
    place: RankEnvironment


def draw_missing(
    drawing: Drawing, models: Sequence[LabelledModel], groups: Mapping[str, Sequence[Group]], *, say: Say
) -> dict[str, DrawnImage]:
    """Return all images by path, after those that are missing were drawn; the same on all ranks.

    groups: by the label of their model. Raises ModelError for a model that cannot be loaded or has diverged, on the
    rank that found it: the launcher ends the others, and images that are written stay.
    """
    rank, world_size = drawing.place.rank, drawing.place.world_size
    tasks = [task for of_model in groups.values() for group in of_model for task in group.tasks]
    known = verified_images(drawing.out, tasks, rank=rank, world_size=world_size, say=say)
    batches = {
        model.label: [
            batch for group in groups[model.label] for batch in batches_of(group.tasks, drawing.settings.batch)
        ]
        for model in models
    }
    missing = {label: missing_batches(of_model, known) for label, of_model in batches.items()}
    every = [(label, batch) for label, of_model in missing.items() for batch in of_model]
    mine = share_of(every, rank=rank, world_size=world_size)
    writer = ImageWriter(drawing.out, drawing.settings, rank=rank)
    try:
        for model in models:
            start = time.perf_counter()
            own = [batch for label, batch in mine if label == model.label]
            _draw_batches(drawing, model, own, writer, say=say)
            num_images, num_drawn = (sum(map(len, lists[model.label])) for lists in (batches, missing))
            seconds = f"{time.perf_counter() - start:.1f} s"
            what = f"drew {num_drawn} of {num_images} images with {cut(model.name)} in {seconds}"
            say(f"{model.label}: {what if num_drawn else f'all {num_images} images are drawn'}")
    finally:
        writer.close()
    for lines in gather_objects(writer.lines):
        known |= as_drawn(lines)
    return known


def _draw_batches(
    drawing: Drawing, model: LabelledModel, batches: Sequence[Sequence[ImageTask]], writer: ImageWriter, *, say: Say
) -> None:
    if not batches:
        return
    pipeline = load_model(model.found, drawing.loading)
    _require_resolution(pipeline, model, drawing.settings)
    refiner = None
    if model.refiner is not None:
        name = model.found.choice.refiner or ""
        refiner = load_refiner(model.refiner, pipeline, name=name, loading=drawing.loading)
    progress = Pace(f"{model.label}: drew", total=sum(map(len, batches)), say=say)
    for batch in batches:
        images = draw_images(
            pipeline,
            [task.prompt.text for task in batch],
            [task.seed for task in batch],
            num_inference_steps=drawing.settings.steps,
            guidance_scale=drawing.settings.guidance,
            resolution=drawing.settings.resolution,
            images_at_once=len(batch),
            refiner=refiner,
        )
        _require_finite(images, batch, model)
        writer.put(batch, [_pixels(image) for image in images])
        progress.add(len(batch))


def _pixels(image: Tensor) -> np.ndarray:
    """Return an image (3, X, Y) in 0..1 as bytes (X, Y, 3)."""
    return (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def _require_resolution(pipeline: object, model: LabelledModel, settings: Settings) -> None:
    factor = pipeline.vae_scale_factor  # type: ignore[attr-defined]
    if settings.resolution % 8 or settings.resolution % factor:
        raise ModelError(
            f"--resolution {settings.resolution}: {model.label} needs a multiple of 8 and of its VAE's {factor}; its "
            f"own is {own_resolution(pipeline)}"
        )


def _require_finite(images: Tensor, batch: Sequence[ImageTask], model: LabelledModel) -> None:
    bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f"{model.name}: {len(bad)} of its {len(images)} images are not finite, the first of prompt "
            f"{cut(batch[bad[0]].prompt.text)!r}, seed {batch[bad[0]].seed}: its training has diverged, or it "
            "overflows in fp16; try --dtype fp32"
        )
