"""Whole checkpoints in one .safetensors file, as in A1111 and ComfyUI: their family, and their parts.

Their configurations are in this package, under assets/model_configs. If the shapes of a file's tensors differ from
them, as with fewer transformer layers, the shapes decide.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTokenizer

from ds_dpo.config.asset_paths import ASSET_PREFIX, resolve_asset
from ds_dpo.errors import ModelError
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.weights.derived_configs import (
    Config,
    Shapes,
    derived_clip_config,
    derived_open_clip_config,
    derived_unet_config,
    derived_vae_config,
)
from ds_dpo.models.weights.files import Header, read_header, read_json
from ds_dpo.models.weights.ldm_keys import UNET_PREFIX, ldm_names
from ds_dpo.models.weights.ldm_parts import Stored, clip_places, open_clip_places, vae_places
from ds_dpo.models.weights.parts import TEXT_ENCODERS, FilePart, Places, skeleton
from ds_dpo.models.weights.unet_shapes import known_shapes

VAE_PREFIX = "first_stage_model."
# names of tensors that are flags of ComfyUI, written by trainers of SDXL
V_PREDICTION_FLAG, ZERO_TERMINAL_SNR_FLAG, EDM_FLAGS = "v_pred", "ztsnr", ("edm_mean", "edm_vpred.sigma_max")
_MODELSPEC_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}
_FOREIGN = {  # beginnings of names in files of other kinds
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux's transformer alone",
    "joint_blocks.": "Stable Diffusion 3's transformer alone",
}


@dataclass(frozen=True, kw_only=True)
class _Text:
    """The place of a text encoder in a file."""

    prefix: str
    places: Places
    config: Callable[[Shapes, Config], Config]


_CLIP = partial(_Text, places=clip_places, config=derived_clip_config)
_OPEN_CLIP = partial(_Text, places=open_clip_places, config=partial(derived_open_clip_config, unused_layers=0))
_TEXTS: dict[str, dict[str, _Text]] = {
    "sdxl": {
        "text_encoder": _CLIP(prefix="conditioner.embedders.0.transformer."),
        "text_encoder_2": _OPEN_CLIP(prefix="conditioner.embedders.1.model."),
    },
    "sdxl_refiner": {"text_encoder_2": _OPEN_CLIP(prefix="conditioner.embedders.0.model.")},
    "sd15": {"text_encoder": _CLIP(prefix="cond_stage_model.transformer.")},
    "sd21": {
        "text_encoder": _OPEN_CLIP(
            prefix="cond_stage_model.model.", config=partial(derived_open_clip_config, unused_layers=1)
        )
    },
}


class SingleFile:
    """A checkpoint with UNet, VAE and text encoders; implements pretrained.Pipeline."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises ModelError that says what the file is instead."""
        self.path = path
        self._header = read_header(path)
        self.family = _family_of(self._header)

    def denoiser(self) -> FilePart:
        return FilePart(
            path=self.path,
            title="UNet",
            model_class=UNet2DConditionModel,
            config=self._unet_config,
            places=unet_places(self._unet_config, prefix=UNET_PREFIX),
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

    def text_encoder(self, name: str) -> FilePart:
        text = _TEXTS[self.family][name]
        return FilePart(
            path=self.path,
            title=name,
            model_class=TEXT_ENCODERS[name],
            config=self._derived(text.config, name, prefix=text.prefix),
            places=prefixed(text.places, text.prefix),
        )

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
        return [_shipped("clip") / "merges.txt.gz", _shipped(self.family) / name / "tokenizer_config.json"]

    def scheduler_config(self, prediction_type: str | None) -> Config:
        """Return the family's scheduler configuration, with the prediction type that the file states.

        prediction_type: the run's. Raises ModelError if neither states what SD2.1's UNet predicts, or if the file was
        not trained with DDPM's noising.
        """
        config = read_json(_shipped(self.family) / "scheduler" / "scheduler_config.json")
        names, metadata = self._header.shapes, self._header.metadata
        if any(flag in names for flag in EDM_FLAGS):
            raise ModelError(
                f"{self.path}: was trained with EDM's noising; only models trained with DDPM's can be used"
            )
        if ZERO_TERMINAL_SNR_FLAG in names:
            config["rescale_betas_zero_snr"] = True
        if V_PREDICTION_FLAG in names:
            return {**config, "prediction_type": "v_prediction"}
        stated = _MODELSPEC_PREDICTION.get(metadata.get("modelspec.prediction_type", ""))
        if stated is not None:
            return {**config, "prediction_type": stated}
        if self.family == "sd21" and prediction_type is None:
            raise ModelError(
                f"{self.path}: does not state what its UNet predicts, and SD2.1 has two kinds; set "
                "model.prediction_type to v_prediction (SD2.1 of 768 pixels) or epsilon (SD2.1-base, of 512)"
            )
        return config

    @cached_property
    def _unet_config(self) -> Config:
        """The configuration of the family's UNet if the shapes agree, else the one that the shapes give."""
        usual = read_json(_shipped(self.family) / "unet" / "config.json")
        shapes = self._header.under(UNET_PREFIX)
        expected = known_shapes(usual)
        assert expected is not None, "a test compares the shipped configurations"
        names = ldm_names(expected, usual)
        if {names[name].removeprefix(UNET_PREFIX): shape for name, shape in expected.items()} == shapes:
            return usual
        config = self._derived(derived_unet_config, "unet", prefix=UNET_PREFIX)
        self._require_no_more_than(config, shapes)
        return config

    def _require_no_more_than(self, config: Config, shapes: Shapes) -> None:
        own = ldm_names(skeleton(UNet2DConditionModel, config).state_dict(), config).values()
        unknown = sorted(shapes.keys() - {name.removeprefix(UNET_PREFIX) for name in own})
        if unknown:
            raise ModelError(
                f"{self.path}: its UNet has {len(unknown)} tensors that no UNet of {self.family} has, such as "
                f"{unknown[0]}; give a diffusers folder, which has its configuration"
            )

    def _derived(self, derive: Callable[[Shapes, Config], Config], name: str, *, prefix: str) -> Config:
        usual = read_json(_shipped(self.family) / name / "config.json")
        try:
            return derive(self._header.under(prefix), usual)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from error


def _family_of(header: Header) -> str:
    names = header.shapes
    if any("lora" in name for name in names):
        raise ModelError(
            f"{header.path}: a LoRA, not a model; give its base model, or write a folder with both by diffusers' "
            "load_lora_weights, fuse_lora and save_pretrained"
        )
    for beginning, what in _FOREIGN.items():
        if any(name.startswith(beginning) for name in names):
            raise ModelError(f"{header.path}: {what}; only UNets of {', '.join(FAMILIES)} can be trained")
    fitting = [family for family, texts in _TEXTS.items() if all(header.under(text.prefix) for text in texts.values())]
    has_unet, has_vae = bool(header.under(UNET_PREFIX)), bool(header.under(VAE_PREFIX))
    if fitting and has_unet and has_vae:
        return fitting[0]
    if has_unet or any(name.startswith(("input_blocks.", "down_blocks.")) for name in names):
        lacking = [] if fitting else ["text encoder"]
        lacking += [] if has_vae else ["VAE"]
        raise ModelError(
            f"{header.path}: a UNet without {' or '.join(lacking)}; give a whole pipeline as model.pretrained and this "
            "file as model.denoiser_init"
        )
    raise ModelError(
        f"{header.path}: not a checkpoint of {', '.join(FAMILIES)}; its first tensor is "
        f"{min(names, default='absent')!r}"
    )


def unet_places(config: Mapping[str, Any], *, prefix: str) -> Places:
    """Return the places of a UNet's parameters in a file with that prefix."""

    def places(names: Iterable[str]) -> Mapping[str, Stored]:
        found = ldm_names(names, config)
        return {name: Stored(prefix + ldm.removeprefix(UNET_PREFIX)) for name, ldm in found.items()}

    return places


def prefixed(places: Places, prefix: str) -> Places:
    """Return the same places in a file in which this part's names begin with a prefix."""

    def found(names: Iterable[str]) -> Mapping[str, Stored]:
        return {name: place.under(prefix) for name, place in places(names).items()}

    return found


def clip_vocabulary() -> tuple[dict[str, int], list[Any]]:
    """Return tokens and merges of CLIP's tokenizer: bytes, bytes that end a word, then one token per merge.

    Source: openai/CLIP, simple_tokenizer.py, whose merges are in this package.
    """
    text = gzip.decompress((_shipped("clip") / "merges.txt.gz").read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.splitlines()[1:]]
    characters = [chr(code) for code in _byte_characters()]
    tokens = [*characters, *(f"{character}</w>" for character in characters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: place for place, token in enumerate(tokens)}, merges


def _byte_characters() -> list[int]:
    """Return a visible character's code for each byte, in CLIP's order: visible bytes first, then the others."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*visible, *range(256, 512 - len(visible))]


def _shipped(name: str) -> Path:
    return Path(resolve_asset(f"{ASSET_PREFIX}assets/model_configs")) / name
