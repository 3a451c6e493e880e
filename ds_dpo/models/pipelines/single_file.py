"""Whole checkpoints in one .safetensors file, as in A1111 and ComfyUI: their family, and their parts.

Their configurations are in this package, under assets/model_configs. If the shapes of a file's tensors differ from
them, as with fewer transformer layers, the shapes decide.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from ds_dpo.errors import ModelError
from ds_dpo.models.families.family import DenoiserKind, Family
from ds_dpo.models.families.table import FAMILIES, KINDS
from ds_dpo.models.families.unet import UNET
from ds_dpo.models.weights import file_flags
from ds_dpo.models.weights.derived_configs import Config, Shapes, derived_vae_config
from ds_dpo.models.weights.files import Header, read_header, read_json, shipped_configs
from ds_dpo.models.weights.ldm_parts import Places, Stored, vae_places
from ds_dpo.models.weights.parts import FilePart, skeleton

VAE_PREFIX = "first_stage_model."
_MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}
_FOREIGN = {  # beginnings of names in files of which the transformer alone is read
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "FLUX.1",
    "double_blocks.": "FLUX.1's transformer",
    "joint_blocks.": "Stable Diffusion 3's transformer",
}


# the families whose checkpoints in one file are read
_READ = {name: family for name, family in FAMILIES.items() if family.denoiser is UNET}


class SingleFile:
    """A checkpoint with denoiser, VAE and text encoders; implements pretrained.Pipeline."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ModelError that says what the file is instead."""
        self.path = path
        self._header = read_header(path)
        self.family = _family_of(self._header)

    def denoiser(self) -> FilePart:
        kind, config = self.family.denoiser, self._denoiser_config
        return FilePart(
            path=self.path,
            title=kind.title,
            model_class=kind.model_class(),
            config=config,
            places=denoiser_places(kind, config, prefix=kind.prefix),
        )

    def vae(self) -> FilePart:
        config = self._derived(derived_vae_config, "vae", prefix=VAE_PREFIX)
        places = partial(vae_places, num_blocks=len(config["block_out_channels"]))
        return FilePart(
            path=self.path,
            title="VAE",
            model_class=AutoencoderKL,
            config=config,
            places=prefixed(places, VAE_PREFIX),
        )

    def text_encoders(self) -> tuple[str, ...]:
        return tuple(self.family.text_encoders)

    def text_encoder(self, name: str, *, config: Mapping[str, Any] | None = None) -> FilePart:
        """Return a text encoder. config: its configuration if it is known, else the shapes decide."""
        text = self.family.text_encoders[name]
        return FilePart(
            path=self.path,
            title=name,
            model_class=text.model_class(),
            config=self._derived(text.derive, name, prefix=text.prefix) if config is None else config,
            places=prefixed(text.places, text.prefix),
        )

    def text_config(self, name: str) -> Mapping[str, Any]:
        return self.text_encoder(name).config

    def tokenizer(self, name: str) -> CLIPTokenizer:
        """Return CLIP's tokenizer, from the merges in this package."""
        settings = read_json(self.tokenizer_files(name)[1])
        vocabulary, merges = clip_vocabulary()
        return CLIPTokenizer(
            vocab=vocabulary,
            merges=merges,
            pad_token=settings["pad_token"],
            model_max_length=settings["model_max_length"],
        )

    def tokenizer_files(self, name: str) -> list[Path]:
        return [shipped_configs("clip") / "merges.txt.gz", self._shipped / name / "tokenizer_config.json"]

    def scheduler_config(self, prediction_type: str | None) -> Config:
        """Return the family's scheduler configuration, with the prediction type that the file states.

        prediction_type: the run's. Raises ModelError if neither states what the denoiser predicts and the family has
        both kinds, or if the file was not trained with DDPM's noising.
        """
        config = read_json(self._shipped / "scheduler" / "scheduler_config.json")
        names, metadata = self._header.shapes, self._header.metadata
        if any(flag in names for flag in file_flags.EDM):
            raise ModelError(
                f"{self.path}: was trained with EDM's noising; only models trained with DDPM's can be used"
            )
        if file_flags.ZERO_TERMINAL_SNR in names:
            config["rescale_betas_zero_snr"] = True
        if file_flags.V_PREDICTION in names:
            return {**config, "prediction_type": "v_prediction"}
        stated = _MODELSPEC_PREDICTION.get(metadata.get("modelspec.prediction_type", ""))
        if stated is not None:
            return {**config, "prediction_type": stated}
        if self.family.unsaid_prediction is not None and prediction_type is None:
            title, advice = self.family.denoiser.title, self.family.unsaid_prediction
            raise ModelError(f"{self.path}: does not state what its {title} predicts, and {advice}")
        return config

    @property
    def _shipped(self) -> Path:
        """The configurations of the family's usual models."""
        return shipped_configs(self.family.name)

    @cached_property
    def _denoiser_config(self) -> Config:
        """The configuration of the family's usual denoiser if the shapes agree, else the one that the shapes give."""
        kind = self.family.denoiser
        usual = read_json(self._shipped / kind.folder / "config.json")
        shapes = self._header.under(kind.prefix)
        expected = kind.shapes(usual)
        assert expected is not None, "a test compares the shipped configurations"
        names = kind.file_names(expected, usual)
        if {names[name].removeprefix(kind.prefix): shape for name, shape in expected.items()} == shapes:
            return usual
        config = self._derived(kind.derive, kind.folder, prefix=kind.prefix)
        self._require_no_more_than(config, shapes)
        return config

    def _require_no_more_than(self, config: Config, shapes: Shapes) -> None:
        kind = self.family.denoiser
        own = kind.file_names(skeleton(kind.model_class(), config).state_dict(), config).values()
        unknown = sorted(shapes.keys() - {name.removeprefix(kind.prefix) for name in own})
        if unknown:
            raise ModelError(
                f"{self.path}: its {kind.title} has {len(unknown)} tensors that no {kind.title} of {self.family.name} "
                f"has, such as {unknown[0]}; give a diffusers folder, which has its configuration"
            )

    def _derived(self, derive: Callable[[Shapes, Config], Config], name: str, *, prefix: str) -> Config:
        usual = read_json(self._shipped / name / "config.json")
        try:
            return derive(self._header.under(prefix), usual)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from error


def _family_of(header: Header) -> Family:
    names = header.shapes
    if any("lora" in name for name in names):
        raise ModelError(
            f"{header.path}: a LoRA, not a model; give its base model, or write a folder with both by diffusers' "
            "load_lora_weights, fuse_lora and save_pretrained"
        )
    for beginning, what in _FOREIGN.items():
        if any(name.startswith(beginning) for name in names):
            raise ModelError(
                f"{header.path}: {what} in one file; give a diffusers folder as model.pretrained and this file as "
                f"model.denoiser_init; only single files of {', '.join(_READ)} are read whole"
            )
    fitting = [
        family for family in _READ.values() if all(header.under(text.prefix) for text in family.text_encoders.values())
    ]
    has_vae = bool(header.under(VAE_PREFIX))
    if fitting and header.under(fitting[0].denoiser.prefix) and has_vae:
        return fitting[0]
    kind = kind_in(names)
    if kind is not None:
        lacking = [] if fitting else ["text encoder"]
        lacking += [] if has_vae else ["VAE"]
        raise ModelError(
            f"{header.path}: a {kind.title} without {' or '.join(lacking)}; give a whole pipeline as model.pretrained "
            "and this file as model.denoiser_init"
        )
    raise ModelError(
        f"{header.path}: not a checkpoint of {', '.join(_READ)}; its first tensor is {min(names, default='absent')!r}"
    )


def kind_in(names: Iterable[str]) -> DenoiserKind | None:
    """Return the kind of denoiser that a file has, alone or in a whole checkpoint, under any of the usual names."""
    for kind in KINDS.values():
        if any(name.startswith((kind.prefix, kind.file_beginning, kind.own_beginning)) for name in names):
            return kind
    return None


def denoiser_places(kind: DenoiserKind, config: Mapping[str, Any], *, prefix: str) -> Places:
    """Return the places of a denoiser's parameters in a file with that prefix."""

    def places(names: Iterable[str]) -> Mapping[str, Stored]:
        found: dict[str, Stored] = {}
        shapes = {} if kind.in_file is None else shapes_of(kind, config)
        for there, kept in kind.tensors_in_file(names, config).items():
            own = Stored(prefix + there.removeprefix(kind.prefix), halves_swapped=kept.halves_swapped)
            shares = (1,) if len(kept.parts) == 1 else tuple(shapes[part][0] for part in kept.parts)
            found |= {part: replace(own, shares=shares, place=place) for place, part in enumerate(kept.parts)}
        return found

    return places


def shapes_of(kind: DenoiserKind, config: Mapping[str, Any]) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a configuration's parameters, by name."""
    shapes = kind.shapes(config)
    if shapes is None:
        shapes = {name: tuple(one.shape) for name, one in skeleton(kind.model_class(), config).state_dict().items()}
    return shapes


def prefixed(places: Places, prefix: str) -> Places:
    """Return the same places in a file in which this part's names begin with a prefix."""

    def found(names: Iterable[str]) -> Mapping[str, Stored]:
        return {name: place.under(prefix) for name, place in places(names).items()}

    return found


def clip_vocabulary() -> tuple[dict[str, int], list[Any]]:
    """Return tokens and merges of CLIP's tokenizer: bytes, bytes that end a word, then one token per merge.

    Source: openai/CLIP, simple_tokenizer.py, whose merges are in this package.
    """
    text = gzip.decompress((shipped_configs("clip") / "merges.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.splitlines()[1:]]
    characters = [chr(code) for code in _byte_characters()]
    tokens = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: place for place, token in enumerate(tokens)}, merges


def _byte_characters() -> list[int]:
    """Return a visible character's code for each byte, in CLIP's order: visible bytes first, then the others."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*visible, *range(256, 512 - len(visible))]
