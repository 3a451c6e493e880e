"""The content of a run's model files, by component: a run belongs to it, while the configuration only names places."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ds_dpo.config.models import ModelConfig
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.pipelines.locate import locate_denoiser, locate_pipeline, locate_vae
from ds_dpo.models.pipelines.pretrained import Pipeline, open_denoiser_init, open_pipeline, open_vae, tokenizer_of
from ds_dpo.models.start import checkpoint_start
from ds_dpo.models.weights.files import read_json
from ds_dpo.models.weights.hashes import remembered_sha256
from ds_dpo.models.weights.hub import commit_of
from ds_dpo.models.weights.parts import FolderPart, Part
from ds_dpo.storage.manifest import MANIFEST_NAME

DENOISER, SCHEDULER, POLICY = "denoiser", "scheduler", "policy"
HASHING_THREADS = 4
# what a tokenizer of CLIP or T5 is read from; other files may come and go beside them
TOKENIZER_FILES = {
    *("vocab.json", "merges.txt", "merges.txt.gz", "tokenizer.json", "tokenizer_config.json", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json"),
}


@dataclass(frozen=True, kw_only=True)
class ModelContents:
    """What a run's models are made of.

    hashes: by component, such as denoiser, vae, text_encoder. fields: which configuration field names each component.
    commits: by field, what a model of the hub resolved to.
    """

    hashes: dict[str, str]
    fields: dict[str, str]
    commits: dict[str, str]


def read_contents(model: ModelConfig, *, with_encoders: bool, with_policy: bool = True) -> ModelContents:
    """Return the contents of the models that a run uses; hub models are downloaded first.

    Files are hashed whole, once: see remembered_sha256. with_encoders: also those of VAE, text encoders and tokenizers.
    with_policy: also those of model.policy_init, if it is set; a run that has a checkpoint reads them no more.
    Raises ModelError if a file is missing.
    """
    pipeline = open_pipeline(model)
    files = {DENOISER: _denoiser_files(model, pipeline), SCHEDULER: _scheduler_files(model)}
    if with_encoders:
        files["vae"] = _files(open_vae(model))
        for name in pipeline.text_encoders():
            files[name] = _files(pipeline.text_encoder(name))
            found = pipeline.tokenizer_files(tokenizer_of(name))
            files[tokenizer_of(name)] = [path for path in found if path.name in TOKENIZER_FILES]
    if with_policy and model.policy_init is not None:
        files[POLICY] = _files_of(model, "policy_init")
    fields = dict.fromkeys(files, "model.pretrained") | {POLICY: "model.policy_init"}
    if model.denoiser_init is not None:
        fields[DENOISER] = "model.denoiser_init"
    if with_encoders and model.vae is not None:
        fields["vae"] = "model.vae"
    distinct = list(dict.fromkeys(path for paths in files.values() for path in paths))
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        hashes = dict(zip(distinct, threads.map(_sha256, distinct), strict=True))
    return ModelContents(
        hashes={name: _joined(paths, hashes) for name, paths in files.items() if paths},
        fields=fields,
        commits=hub_commits(model if with_policy else model.model_copy(update={"policy_init": None})),
    )


def hub_commits(model: ModelConfig) -> dict[str, str]:
    """Return the commit of each model that came from the hub, by the field that names it."""
    places = {"model.pretrained": locate_pipeline(model)}
    if model.vae is not None:
        places["model.vae"] = locate_vae(model.vae)
    kind = FAMILIES[model.family].denoiser
    for field in ("denoiser_init", "policy_init"):
        name = getattr(model, field)
        if name is not None and checkpoint_start(model, field=field) is None:
            places[f"model.{field}"] = locate_denoiser(name, kind=kind, field=field)
    commits = {field: commit_of(place) for field, place in places.items()}
    return {field: commit for field, commit in commits.items() if commit is not None}


def _denoiser_files(model: ModelConfig, pipeline: Pipeline) -> list[Path]:
    """Return the files of the denoiser's start; another start still takes its configuration from the pipeline."""
    own = pipeline.denoiser()
    if model.denoiser_init is None:
        return _files(own)
    config = [own.folder / "config.json"] if isinstance(own, FolderPart) else []
    return config + _files_of(model, "denoiser_init")


def _files_of(model: ModelConfig, field: str) -> list[Path]:
    """Return the files of the weights that a field names, a checkpoint's or a denoiser's."""
    start = checkpoint_start(model, field=field)
    if start is None:
        return _files(open_denoiser_init(model, field=field))
    folder = start.checkpoint.folder
    manifest = folder / MANIFEST_NAME  # it has the checksums of all files
    return [manifest] if manifest.is_file() else sorted(folder.glob("*.pt"))


def _scheduler_files(model: ModelConfig) -> list[Path]:
    place = locate_pipeline(model)
    return [place / "scheduler" / "scheduler_config.json"] if place.is_dir() else []


def _files(part: Part) -> list[Path]:
    """Return a model's weights, and its configuration if that is a file; one file's is derived from its weights."""
    config = [part.folder / "config.json"] if isinstance(part, FolderPart) else []
    return [*config, *part.files.paths]


def _joined(paths: Sequence[Path], hashes: dict[Path, str]) -> str:
    if len(paths) == 1:
        return hashes[paths[0]]
    return hashlib.sha256("\n".join(f"{path.name} {hashes[path]}" for path in paths).encode()).hexdigest()


def _sha256(path: Path) -> str:
    if path.name not in ("config.json", "scheduler_config.json"):
        return remembered_sha256(path)
    # names that begin with _ hold the library's version and the path where the model was saved
    config = {name: value for name, value in read_json(path).items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
