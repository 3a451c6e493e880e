"""The parts of a run's model, from a diffusers folder, a hub id, or one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from diffusers import AutoencoderKL

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError, cut
from ds_dpo.models.families.family import Family
from ds_dpo.models.families.table import FAMILIES, KINDS, family_of
from ds_dpo.models.flow_scheduler import FLOW, is_flow
from ds_dpo.models.pipelines.locate import locate_denoiser, locate_pipeline, locate_vae
from ds_dpo.models.pipelines.single_file import VAE_PREFIX, SingleFile, denoiser_places, prefixed
from ds_dpo.models.weights.derived_configs import derived_vae_config
from ds_dpo.models.weights.files import DIFFUSERS_STEM, TEXT_STEM, find_weights, read_header, read_json
from ds_dpo.models.weights.ldm_parts import Places, same_names, vae_places
from ds_dpo.models.weights.parts import FilePart, FolderPart, Part
from ds_dpo.models.weights.soundness import wrapper_hint
from ds_dpo.outside import check_all_regular
from ds_dpo.process.quiet import quiet_output

INDEX_NAME = "model_index.json"


class Pipeline(Protocol):
    """The model that a run starts from. Text encoders and tokenizers have the names of diffusers' folders."""

    def denoiser(self) -> Part: ...
    def vae(self) -> Part: ...

    def text_encoders(self) -> tuple[str, ...]:
        """Return the names of the family's text encoders that this pipeline has, in the family's order."""
        ...

    def text_encoder(self, name: str) -> Part: ...

    def text_config(self, name: str) -> Mapping[str, Any]:
        """Return a text encoder's configuration, whatever family the pipeline is taken for."""
        ...

    def tokenizer(self, name: str) -> Any:
        """Return a tokenizer of transformers, by the name of its folder."""
        ...

    def tokenizer_files(self, name: str) -> list[Path]:
        """Return the files that define a tokenizer."""
        ...

    def scheduler_config(self, prediction_type: str | None) -> dict[str, Any]:
        """Return the scheduler's configuration. prediction_type: the run's, None if it states none."""
        ...


@dataclass(frozen=True, kw_only=True)
class FolderPipeline:
    """A folder of a saved diffusers pipeline; implements Pipeline. family: the run's model.family."""

    folder: Path
    family: Family
    variant: str | None

    def denoiser(self) -> FolderPart:
        kind = self.family.denoiser
        return self._part(kind.folder, kind.model_class(), DIFFUSERS_STEM)

    def vae(self) -> FolderPart:
        return self._part("vae", self.family.vae_class(), DIFFUSERS_STEM)

    def text_encoders(self) -> tuple[str, ...]:
        texts = self.family.text_encoders
        if not any(text.may_be_absent for text in texts.values()):
            return tuple(texts)
        index = read_json(self.folder / INDEX_NAME)
        return tuple(name for name, text in texts.items() if not text.may_be_absent or _is_named(index.get(name)))

    def text_encoder(self, name: str) -> FolderPart:
        return self._part(name, self.family.text_encoders[name].model_class(), TEXT_STEM)

    def text_config(self, name: str) -> Mapping[str, Any]:
        return read_json(self.folder / name / "config.json")

    def tokenizer(self, name: str) -> Any:
        folder = self._tokenizer_folder(name)
        class_name = self.family.text_encoders[text_encoder_of(name)].tokenizer_class
        tokenizer_class = getattr(import_module("transformers"), class_name)
        try:
            check_all_regular(folder)
            with quiet_output():
                return tokenizer_class.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # foreign settings can fail in any line of the library
            raise ModelError(f"{folder}: cannot be loaded as {class_name}: {cut(str(error))}") from error

    def tokenizer_files(self, name: str) -> list[Path]:
        return sorted(path for path in self._tokenizer_folder(name).iterdir() if path.is_file())

    def scheduler_config(self, prediction_type: str | None) -> dict[str, Any]:
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = read_json(path)
        if is_flow(config):
            return {**config, "prediction_type": FLOW}
        # without this, a sampler's config without betas would silently get DDPM's defaults
        if "beta_schedule" not in config:
            raise ModelError(
                f"{path}: {config.get('_class_name')} has no beta_schedule; only models trained with DDPM's noising "
                "or flow matching can be used, not EDM"
            )
        return {"prediction_type": "epsilon", **config}

    def _part(self, name: str, model_class: Any, stem: str) -> FolderPart:
        find = partial(find_weights, stem=stem, variant=self.variant)
        return FolderPart(folder=self.folder / name, model_class=model_class, find=find)

    def _tokenizer_folder(self, name: str) -> Path:
        folder = self.folder / name
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder, so the pipeline is incomplete")
        return folder


def tokenizer_of(text_encoder: str) -> str:
    """Return the name of a text encoder's tokenizer, which has the same number."""
    return text_encoder.replace("text_encoder", "tokenizer")


def text_encoder_of(tokenizer: str) -> str:
    """Return the name of a tokenizer's text encoder, which has the same number."""
    return tokenizer.replace("tokenizer", "text_encoder")


def _is_named(entry: object) -> bool:
    """Return whether an entry of model_index.json names a class; diffusers writes [null, null] for an absent part."""
    return isinstance(entry, list) and entry[:1] != [None]


def _require_its_denoiser(model: ModelConfig, place: Path) -> None:
    """Raise ModelError for a folder whose denoiser is of another class than the family's, and name the family of it."""
    kind = FAMILIES[model.family].denoiser
    if (place / kind.folder / "config.json").is_file():
        return
    for other in {each.folder for each in KINDS.values()} - {kind.folder}:
        path = place / other / "config.json"
        family = family_of(read_json(path)) if path.is_file() else None
        if family is not None:
            raise ModelError(
                f"model.family {model.family}, but {model.pretrained} has a {family.denoiser.title} of family "
                f"{family.name}; set model.family to {family.name}"
            )


def open_pipeline(model: ModelConfig) -> Pipeline:
    """Return the pipeline of model.pretrained, its headers read.

    Raises ModelError if there is none, or a folder's kind of denoiser or a file is of another family than model.family.
    """
    place = locate_pipeline(model)
    if place.is_dir():
        _require_its_denoiser(model, place)
        return FolderPipeline(folder=place, family=FAMILIES[model.family], variant=model.variant)
    unused = {"revision": model.revision, "variant": model.variant}
    for field, value in unused.items():
        if value is not None:
            raise ModelError(f"model.{field} {value} has no effect on one file, {place}; set it to none")
    single = SingleFile(place)
    found = single.family.name
    if found != model.family:
        raise ModelError(
            f"model.family {model.family}, but {model.pretrained} is a checkpoint of {found}; set model.family to "
            f"{found}"
        )
    return single


def fetch_models(model: ModelConfig) -> None:
    """Download the pipeline and the VAE that model names. Raises ModelError if they are not available."""
    open_vae(model)  # also downloads the pipeline


def open_vae(model: ModelConfig) -> Part:
    """Return the VAE of model.vae if it is given, else the pipeline's own. Raises ModelError if there is none."""
    pipeline, family = open_pipeline(model), FAMILIES[model.family]
    if model.vae is None:
        return pipeline.vae()
    place = locate_vae(model.vae)
    if place.is_dir():
        # revision and variant belong to the pipeline; another VAE has its own file names
        find = partial(find_weights, stem=DIFFUSERS_STEM, variant=None)
        return FolderPart(folder=place, model_class=family.vae_class(), find=find)
    if family.vae_class() is not AutoencoderKL:
        raise ModelError(f"model.vae {place}: a VAE of {family.name} is read from a diffusers folder alone")
    return _vae_file(place, pipeline.vae().config)


def _vae_file(path: Path, usual: Mapping[str, Any]) -> FilePart:
    """Return the VAE of one file. It does not state scale and shift, so it gets those of the pipeline's own VAE."""
    header = read_header(path)
    prefix = VAE_PREFIX if header.under(VAE_PREFIX) else ""
    names = header.under(prefix)
    config: Mapping[str, Any] = usual
    places: Places = same_names
    if any(name.startswith("encoder.down.") for name in names):
        config = derived_vae_config(names, dict(config))
        places = prefixed(partial(vae_places, num_blocks=len(config["block_out_channels"])), prefix)
    elif not any(name.startswith("encoder.down_blocks.") for name in names):
        raise ModelError(f"model.vae {path}: not a VAE; its first tensor is {min(names, default='absent')!r}")
    return FilePart(path=path, title="VAE", model_class=AutoencoderKL, config=config, places=places)


def open_denoiser_init(model: ModelConfig, *, field: str = "denoiser_init") -> Part:
    """Return the denoiser of model.denoiser_init: a diffusers folder, a hub id or a file with any of the usual names.

    Its configuration is that of the pipeline's denoiser. field: another field of the section that names it. Raises
    ModelError if there is none.
    """
    name = getattr(model, field)
    assert name is not None
    kind = FAMILIES[model.family].denoiser
    place = locate_denoiser(name, kind=kind, field=field)
    if place.is_dir():
        find = partial(find_weights, stem=DIFFUSERS_STEM, variant=None)
        return FolderPart(folder=place, model_class=kind.model_class(), find=find)
    names, config = read_header(place).shapes, open_pipeline(model).denoiser().config
    if any("lora" in name for name in names):
        raise ModelError(
            f"model.{field} {place}: a LoRA, not a {kind.title}; fuse it into its model first, with "
            "diffusers' load_lora_weights, fuse_lora and save_pretrained"
        )
    prefix = kind.prefix if any(name.startswith(kind.prefix) for name in names) else ""
    if any(name.startswith(prefix + kind.file_beginning) for name in names):
        places = denoiser_places(kind, config, prefix=prefix)
    elif any(name.startswith(kind.own_beginning) for name in names):
        places = same_names
    else:
        first = min(names, default="absent")
        raise ModelError(
            f"model.{field} {place}: not a {kind.title}; its first tensor is {first!r}{wrapper_hint(names)}"
        )
    return FilePart(path=place, title=kind.title, model_class=kind.model_class(), config=config, places=places)
