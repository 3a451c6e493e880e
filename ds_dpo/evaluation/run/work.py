"""The work of an evaluation as lists that every rank computes alike: images in batches, and each rank's share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ds_dpo.evaluation.run.prompt_sets import Prompt, PromptSet
from ds_dpo.evaluation.run.settings import Settings, seed_of

T = TypeVar("T")
IMAGES_NAME = "images"


@dataclass(frozen=True)
class ImageTask:
    """An image to be drawn. path: below the evaluation's folder, with slashes."""

    prompt: Prompt
    seed: int
    path: str


@dataclass(frozen=True)
class Group:
    """All images of a model and a prompt set: all seeds of the first prompt first. label: the model's."""

    label: str
    prompt_set: PromptSet
    tasks: tuple[ImageTask, ...]


def list_group(label: str, folder: str, prompt_set: PromptSet, settings: Settings) -> Group:
    """Return the images of a model and a set. folder: the name of the model's folder of images."""
    tasks = []
    for place, prompt in enumerate(prompt_set.prompts):
        for number in range(settings.seeds):
            seed = seed_of(settings, place=place, number=number)
            path = f"{IMAGES_NAME}/{folder}/{prompt_set.name}/{place:05d}_seed_{seed}.png"
            tasks.append(ImageTask(prompt, seed, path))
    return Group(label, prompt_set, tuple(tasks))


def batches_of(things: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return things in pieces of one size, the last one smaller. They are the same for any number of ranks.

    A batch is computed as a whole: an image that is computed among others may differ in its last bits.
    """
    return [things[start : start + size] for start in range(0, len(things), size)]


def share_of(things: Sequence[T], *, rank: int, world_size: int) -> Sequence[T]:
    """Return every world_size-th thing of a list that is the same on all ranks, from the rank-th on."""
    return things[rank::world_size]
