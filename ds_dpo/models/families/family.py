"""The row of a family: everything that sets it apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NoReturn

from torch import Tensor

from ds_dpo.config.families import FamilyName
from ds_dpo.errors import ModelError
from ds_dpo.models.denoiser.packing import NO_PACKING, Packing
from ds_dpo.models.denoiser.predict import Predict
from ds_dpo.models.families.text import EncodedPrompts, Frame, Tower
from ds_dpo.models.weights.derived_configs import Config, Shapes
from ds_dpo.models.weights.in_file import InFile
from ds_dpo.models.weights.ldm_parts import Places

CLIP_TOKENS = 77
# the configuration of a text encoder, by the name of its folder in a pipeline
TextConfig = Callable[[str], Mapping[str, Any]]

# (N, 6) time ids into what else conditions N images, (N, ...) each, by name
Extras = Callable[[Tensor], Mapping[str, Tensor]]


def no_extras(time_ids: Tensor) -> dict[str, Tensor]:
    """Return nothing, for a family whose denoisers are not conditioned on sizes."""
    return {}


def any_of_its_class(config: Mapping[str, Any], text_config: TextConfig | None) -> bool:
    """Return True, for a family that has all denoisers of its class."""
    return True


def refused(message: str) -> Callable[..., NoReturn]:
    """Return a function that raises ModelError, in place of one that reads or writes what a family has no form for."""

    def refuse(*_: Any) -> NoReturn:
        raise ModelError(message)

    return refuse


def no_tables(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return nothing, for a denoiser that holds parameters alone."""
    return {}


@dataclass(frozen=True, kw_only=True)
class DenoiserKind:
    """What families share whose denoisers are one class of network.

    class_name: its class in diffusers. title: its name in messages. folder: its folder in a pipeline. prefix: beginning
    of its tensors' names in a whole checkpoint in one file. file_names: returns the names there, with the prefix, of
    the parameters of a configuration. file_beginning: beginning of some of those names without the prefix, by which a
    file is recognised. own_beginning: the same of diffusers' names. shapes: returns the shapes of a configuration's
    parameters by name; None if only diffusers can build it. tables: the same of what a file has beside its parameters,
    and training does not change. derive: returns the configuration that the shapes in a file imply, given that of the
    family's usual denoiser. unseen_settings: settings that change what a denoiser predicts but no shape, with
    diffusers' defaults. predict: calls the denoiser. in_file: returns what is written into one file, by the names
    there; None if file_names says all. packing: of latents into what the network takes.
    """

    class_name: str
    title: str
    folder: str
    prefix: str
    file_beginning: str
    own_beginning: str
    file_names: Callable[[Iterable[str], Mapping[str, Any]], Mapping[str, str]]
    shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]] | None]
    tables: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]] = no_tables
    derive: Callable[[Shapes, Config], Config]
    unseen_settings: Mapping[str, Any]
    predict: Predict
    in_file: Callable[[Iterable[str], Mapping[str, Any]], Mapping[str, InFile]] | None = None
    packing: Packing = NO_PACKING

    def tensors_in_file(self, names: Iterable[str], config: Mapping[str, Any]) -> Mapping[str, InFile]:
        """Return how a whole checkpoint in one file keeps a denoiser's tensors, by the file's names with the prefix.

        names: of the tensors in diffusers. Raises ModelError if such files cannot express the configuration.
        """
        if self.in_file is not None:
            return self.in_file(names, config)
        return {there: InFile((name,)) for name, there in self.file_names(names, config).items()}

    def model_class(self) -> Any:
        """Return the class, importing diffusers, which takes seconds."""
        return getattr(import_module("diffusers"), self.class_name)


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """A text encoder of a family: its class in transformers, and where a whole checkpoint in one file has it.

    prefix: beginning of its tensors' names there. places: returns the tensors there that hold its parameters. derive:
    returns the configuration that their shapes imply, given the family's usual one. tokenizer_class: in transformers.
    num_tokens: number of tokens of a prompt that it reads; None for as many as it has positions. may_be_absent: a
    pipeline may leave it out; it then needs num_tokens. frame: what a chat puts around a prompt, None without one.
    """

    class_name: str
    prefix: str
    places: Places
    derive: Callable[[Shapes, Config], Config]
    tokenizer_class: str = "CLIPTokenizer"
    num_tokens: int | None = None
    may_be_absent: bool = False
    frame: Frame | None = None

    def model_class(self) -> Any:
        """Return the class, importing transformers, which takes seconds."""
        return getattr(import_module("transformers"), self.class_name)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What an export states about its family, for people and for programs that load it.

    pipeline_class: in diffusers. guidance_scale, draw_arguments: Python arguments of its call. hub_tag: tag of the
    model card. architecture: modelspec's name; architecture_of_prediction: other names, by prediction type.
    kohya_base, is_kohya_v2: ss_base_model_version and ss_v2 of a LoRA, by which A1111 selects it for a model.
    reads_flags: whether ComfyUI, Forge and A1111 look for models.weights.file_flags in a whole checkpoint; else they
    take its prediction type for prediction_taken, or find it out by themselves if that is None. reads_loras: whether
    one of them is known to read a LoRA under kohya's form of diffusers' names.
    """

    pipeline_class: str
    guidance_scale: str
    draw_arguments: str = ""
    hub_tag: str
    architecture: str
    architecture_of_prediction: Mapping[str, str] = field(default_factory=dict)
    kohya_base: str
    is_kohya_v2: bool = False
    reads_flags: bool = False
    prediction_taken: str | None = "epsilon"
    reads_loras: bool = True


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: how it is recognised, read, conditioned, and published.

    is_of: returns whether a diffusers configuration of the denoiser's class is of this family, using the configurations
    of the pipeline's text encoders if they are available. text_encoders: under the names of their folders in a
    pipeline. text_tokens: number of text states of a prompt at the widths of the published models. extras: turns (N, 6)
    time ids of data.stream.prepare into Conditioning.extras. unsaid_prediction: advice for a file that does not state
    what it predicts, if models of the family differ in that. vae_class_name: class of its VAEs in diffusers.
    """

    name: FamilyName
    denoiser: DenoiserKind
    is_of: Callable[[Mapping[str, Any], TextConfig | None], bool]
    text_encoders: Mapping[str, TextPart]
    encode: Callable[[Sequence[Tower], Sequence[str]], EncodedPrompts]
    text_tokens: int = CLIP_TOKENS
    extras: Extras = no_extras
    unsaid_prediction: str | None = None
    published: Published
    vae_class_name: str = "AutoencoderKL"

    def vae_class(self) -> Any:
        """Return the class of its VAEs, importing diffusers, which takes seconds."""
        return getattr(import_module("diffusers"), self.vae_class_name)
