"""What one making of a cache is about, kept in its work folder so that a rerun goes on with the same."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ds_dpo.config.run import RunConfig
from ds_dpo.data.source import PairSource
from ds_dpo.encoding.cache.record import IMAGE_SHARDS, PROMPT_SHARDS, RECORD_NAME, Quantity, StoredImages, replace_file
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.models.loading import latent_shape
from ds_dpo.models.vae import SCALING_FIELDS
from ds_dpo.models.weights.pretrained import open_vae
from ds_dpo.precision import Precision
from ds_dpo.run_folder.folder import flatten

LOCK_NAME = ".lock"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What scripts/cache.py was asked for.

    quantity: moments, so that a run still draws from the posterior, or its mean alone. dtype: of what is stored of
    images. shard_pairs: pairs of one unit, that is encoded as a whole. images_at_once: None: as online training does.
    """

    config: RunConfig
    text_dtype: Precision
    out: Path
    quantity: Quantity
    dtype: Precision
    mirrored: bool
    shard_pairs: int
    images_at_once: int | None


class WorkLayout(Protocol):
    """Where the files of a making lie: in `work`, inside `out`."""

    @property
    def out(self) -> Path: ...

    @property
    def work(self) -> Path: ...

    @property
    def plan(self) -> Path: ...

    def make_folders(self) -> None: ...

    def remove_unfinished_files(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the files of a cache lie, and those of its making."""

    out: Path
    num_units: int

    @property
    def work(self) -> Path:
        return self.out / "work"

    @property
    def plan(self) -> Path:
        return self.work / "plan.json"

    def scan(self, unit: int) -> Path:
        return self.work / f"scan-{unit:05d}.arrow"

    def images(self, unit: int) -> Path:
        return self.out / IMAGE_SHARDS / f"{unit:05d}.arrow"

    def prompts(self, unit: int) -> Path:
        return self.out / PROMPT_SHARDS / f"{unit:05d}.arrow"

    def make_folders(self) -> None:
        for folder in (self.work, self.out / IMAGE_SHARDS, self.out / PROMPT_SHARDS):
            folder.mkdir(parents=True, exist_ok=True)

    def remove_unfinished_files(self) -> None:
        for path in self.out.rglob(".*.partial"):
            path.unlink(missing_ok=True)

    def unscanned(self) -> list[int]:
        return [unit for unit in range(self.num_units) if not self.scan(unit).exists()]

    def unencoded(self) -> list[int]:
        return [
            unit for unit in range(self.num_units) if not (self.prompts(unit).exists() and self.images(unit).exists())
        ]


def layout_of(request: Request, source: PairSource) -> Layout:
    return Layout(out=request.out, num_units=-(-len(source) // request.shard_pairs))


def stored_images(request: Request, source: PairSource) -> StoredImages:
    """Return what is stored of each image, by the VAE's config alone. Raises ModelError where a bucket does not fit."""
    model = request.config.model
    shapes = [latent_shape(model, shape) for shape in source.bucket_shapes]
    config = open_vae(model).config
    return StoredImages(
        quantity=request.quantity,
        dtype=request.dtype,
        mirrored=request.mirrored,
        channels=shapes[0][0],
        factor=source.bucket_shapes[0][0] // shapes[0][1],
        vae_dtype=model.vae_dtype,
        scaling={name: config.get(name) for name in SCALING_FIELDS},
    )


def plan_of(request: Request, source: PairSource, *, fingerprint: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that a shard's content follows from, but for the number of images that pass at once."""
    return {
        "fingerprint": dict(fingerprint),
        "source": dict(source.fingerprint),
        "num_pairs": len(source),
        "images": stored_images(request, source).model_dump(mode="json"),
        "shard_pairs": request.shard_pairs,
    }


def begin(layout: WorkLayout, plan: Mapping[str, Any]) -> bool:
    """Make the folders, or go on with what is there; returns whether anything is left of an earlier making.

    Raises ConfigError where the folder holds something else, or the making of another cache.
    """
    if layout.plan.is_file():
        require_same_plan(layout, _read_plan(layout.plan), plan)
        layout.make_folders()
        layout.remove_unfinished_files()
        return True
    inside = sorted(path.name for path in layout.out.iterdir() if path.name not in (LOCK_NAME, "work"))
    if inside:
        raise ConfigError(f"--out {layout.out} holds {inside[0]} and is no unfinished cache; name another folder")
    layout.work.mkdir(parents=True, exist_ok=True)
    replace_file(layout.plan, json.dumps(plan, indent=1).encode())
    layout.make_folders()
    return False


def require_same_plan(layout: WorkLayout, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise ConfigError naming each part in which two plans differ."""
    was, now = flatten(old), flatten(json.loads(json.dumps(new)))
    names = [*now, *(name for name in was if name not in now)]
    changes = [
        f"{name}: it has {was.get(name, '(nothing)')}, this command {now.get(name, '(nothing)')}"
        for name in names
        if was.get(name) != now.get(name)
    ]
    if changes:
        listed = "\n  ".join(changes)
        raise ConfigError(
            f"--out {layout.out} holds a cache of something else:\n  {listed}\n"
            "set these back to go on with it, or name another folder"
        )


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); remove the folder to begin anew") from error
    return plan


def is_finished(out: Path) -> bool:
    return (out / RECORD_NAME).is_file()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for this process alone; the lock ends with the process, however that ends.

    Raises ConfigError where another process holds it or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        # not flock: processes that are forked would share it, and hold it on for seconds after this one was killed
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(
            f"--out {out}: another scripts/cache.py is at work in it; let it end, or name another folder"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
