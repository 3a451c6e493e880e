"""The models of an evaluation: labelled, found, and known again by the content of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.drawing.generate import file_name, short_labels
from ds_dpo.evaluation.drawing.model_folder import ModelFolder, denoiser_in
from ds_dpo.evaluation.drawing.named_model import FoundModel, ModelChoice, find_models
from ds_dpo.evaluation.drawing.refiner import find_refiner
from ds_dpo.models.weights.files import read_json
from ds_dpo.models.weights.hashes import remembered_sha256

WEIGHTS = ("*.safetensors", "*/*.safetensors")
CONFIGS = ("*/config.json", "*/scheduler_config.json")
DIGITS = 10  # of a digest in the name of a folder


@dataclass(frozen=True)
class LabelledModel:
    """A model that was found. name: as the user gives it, with its LoRAs.

    digest: of the content of all files that its images depend on. refiner: folder of the refiner that finishes them.
    """

    label: str
    name: str
    found: FoundModel
    digest: str
    refiner: Path | None = None

    @property
    def folder(self) -> str:
        """Name of its folder of images: files that change get another one, so that no image of theirs is stale."""
        return f"{file_name(self.label)}-{self.digest[:DIGITS]}"

    @property
    def facts(self) -> dict[str, Any]:
        """What the record of the evaluation says of it."""
        return {"label": self.label, "model": self.name, "step": self.found.step, "sha256": self.digest}


def find_labelled(
    choices: Sequence[ModelChoice],
    labels: Sequence[str | None],
    *,
    exported: Mapping[str, str] = MappingProxyType({}),
    variant: str | None,
) -> list[LabelledModel]:
    """Find all models, without loading them. labels: None, or nothing, is made from the model's name.

    exported: folders of the models that are runs, by their names.

    Raises ConfigError for labels that do not fit, ModelError for a model that cannot be used.
    """
    asked = list(labels) or [None] * len(choices)
    if len(asked) != len(choices):
        raise ConfigError(f"--labels: {len(asked)} labels for {len(choices)} models; give one for each")
    unnamed = [choice for choice, label in zip(choices, asked, strict=True) if label is None]
    made = iter(short_labels(unnamed) if unnamed else ())
    names = [next(made) if label is None else label for label in asked]
    if len({file_name(name) for name in names}) < len(names):
        raise ConfigError(f"--labels: two of {', '.join(names)} are the same; each model needs a label of its own")
    files = [replace(choice, name=exported.get(choice.name, choice.name)) for choice in choices]
    found = find_models(files, base=None, variant=variant)
    refiners = [None if choice.refiner is None else find_refiner(choice.refiner, variant=variant) for choice in choices]
    return [
        LabelledModel(label, str(choice), model, _digest(model, refiner), refiner)
        for label, choice, model, refiner in zip(names, choices, found, refiners, strict=True)
    ]


def stated_resolution(model: FoundModel) -> int | None:
    """Return the side of the images that a model in a folder was made for; None for one file, which must be loaded."""
    source = model.source
    if not isinstance(source, ModelFolder) or (kind := denoiser_in(source.folder)) is None:
        return None
    denoiser = read_json(source.folder / kind.folder / "config.json")
    blocks = read_json(source.rest / "vae" / "config.json").get("block_out_channels")
    side = denoiser.get("sample_size")
    # as the pipelines of diffusers compute it
    return side * 2 ** (len(blocks) - 1) if isinstance(side, int) and isinstance(blocks, list) and blocks else None


def _digest(model: FoundModel, refiner: Path | None) -> str:
    """Return a digest of weights, configurations and LoRAs; names and dates of files do not count."""
    source = model.source
    own = [source.folder, source.rest] if isinstance(source, ModelFolder) else [source.rest]
    folders = [*own, refiner]
    parts = [] if isinstance(source, ModelFolder) else [["file", remembered_sha256(source.path)]]
    for folder in dict.fromkeys(folder for folder in folders if folder is not None):
        parts += [[_inside(path, folder), remembered_sha256(path)] for path in _paths(folder, WEIGHTS)]
        parts += [[_inside(path, folder), _own_settings(path)] for path in _paths(folder, CONFIGS)]
    loras = zip(model.choice.loras, model.loras, strict=True)
    parts += [[str(lora.scale), remembered_sha256(path)] for lora, path in loras]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _paths(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _inside(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _own_settings(path: Path) -> str:
    # names that begin with _ hold the library's version and the path where the model was saved
    return json.dumps(
        {name: value for name, value in read_json(path).items() if not name.startswith("_")}, sort_keys=True
    )
