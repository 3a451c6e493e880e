"""The parts of a pipeline that transformers reads, loaded as training loads them, so that a foreign model runs no code.

diffusers hands each folder to the class that `model_index.json` names, and transformers fetches the attention kernels,
which are programs, that a part's own settings name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin, SchedulerMixin

from ds_dpo.config.families import FamilyName
from ds_dpo.errors import ModelError, shown
from ds_dpo.models.families.family import Family
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.pipelines.pretrained import FolderPipeline, tokenizer_of
from ds_dpo.models.pipelines.single_file import SingleFile
from ds_dpo.models.weights.files import read_json
from ds_dpo.outside import check_all_regular

INDEX_NAME = "model_index.json"
READ_BY_DIFFUSERS = {"scheduler": SchedulerMixin, "vae": ModelMixin, "unet": ModelMixin, "transformer": ModelMixin}
# a checker of decoded images, and the encoder of images that condition a pipeline: neither is used here
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def text_parts(rest: Path, pipeline_class: str, *, dtype: torch.dtype, variant: str | None) -> dict[str, Any]:
    """Return the text encoders, tokenizers and unused parts (None) of the folder rest, as arguments of its pipeline.

    variant: of the text encoders' weights. Raises ModelError for what is missing or unreadable, or if the folder names
    something else than a class of diffusers for a part that diffusers reads.
    """
    pipeline = FolderPipeline(folder=rest, family=_family(pipeline_class), variant=variant)
    encoders = {name: pipeline.text_encoder(name) for name in pipeline.text_encoders()}
    return _with_encoders(pipeline, encoders, dtype=dtype)


def text_parts_of_file(path: Path, rest: Path, pipeline_class: str, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return the same of a whole checkpoint in one file, whose configuration is in the folder rest."""
    pipeline = FolderPipeline(folder=rest, family=_family(pipeline_class), variant=None)
    single = SingleFile(path)
    encoders = {
        name: single.text_encoder(name, config=pipeline.text_config(name)) for name in pipeline.family.text_encoders
    }
    return _with_encoders(pipeline, encoders, dtype=dtype)


def family_in(folder: Path) -> FamilyName:
    """Return the name of the family of a folder's pipeline: the first one of its class."""
    return _family(str(read_json(folder / INDEX_NAME).get("_class_name"))).name


def _family(pipeline_class: str) -> Family:
    # families of one pipeline have the same text encoders, each of the same class
    return next(family for family in FAMILIES.values() if family.published.pipeline_class == pipeline_class)


def _with_encoders(pipeline: FolderPipeline, encoders: Mapping[str, Any], *, dtype: torch.dtype) -> dict[str, Any]:
    index = read_json(pipeline.folder / INDEX_NAME)
    try:
        for folder in (pipeline.folder, *(path for path in pipeline.folder.iterdir() if path.is_dir())):
            check_all_regular(folder)
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for name, base in READ_BY_DIFFUSERS.items():
        if name in index and not _is_class_of_diffusers(index[name], base):
            problem = f"{name} is {shown(index[name])}; a {base.__name__} of diffusers would fit"
            raise ModelError(f"{pipeline.folder / INDEX_NAME}: {problem}")
    absent = pipeline.family.text_encoders.keys() - encoders.keys()
    return {
        **dict.fromkeys(name for name in UNUSED_PARTS if name in index),
        **dict.fromkeys([*absent, *map(tokenizer_of, absent)]),
        **{tokenizer_of(name): pipeline.tokenizer(tokenizer_of(name)) for name in encoders},
        **{name: part.load(dtype=dtype).eval() for name, part in encoders.items()},
    }


def _is_class_of_diffusers(named: Any, base: type) -> bool:
    if not isinstance(named, list) or len(named) != 2 or named[0] != "diffusers" or not isinstance(named[1], str):
        return False
    found = getattr(diffusers, named[1], None)
    return isinstance(found, type) and issubclass(found, base)
