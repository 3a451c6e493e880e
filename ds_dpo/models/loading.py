"""Turn a run's model section into modules and numbers, from a diffusers folder, the hub or one file.

Each rank calls these functions by itself. No code of a model's files runs: weights are only read from safetensors.
"""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from diffusers import AutoencoderKL, DDPMScheduler, ModelMixin
from torch import Tensor, nn

from ds_dpo.config.models import ModelConfig
from ds_dpo.diffusion.noise_schedule import TARGETS, NoiseSchedule
from ds_dpo.errors import ModelError, cut, shown
from ds_dpo.models.families.table import FAMILIES, family_of, kind_of
from ds_dpo.models.families.text import AbsentTower, TextEncoder, TextTower, Tower, say_nothing
from ds_dpo.models.flow_scheduler import FLOW, flow_of, is_flow
from ds_dpo.models.layout import read_row_major
from ds_dpo.models.pipelines.latent_scaling import latent_scaling
from ds_dpo.models.pipelines.pretrained import Pipeline, open_denoiser_init, open_pipeline, open_vae, tokenizer_of
from ds_dpo.models.sampler import Sampler, sampler_from
from ds_dpo.models.weights.parts import Part, fill, skeleton
from ds_dpo.precision import torch_dtype
from ds_dpo.process.say import Say

MAX_TIMESTEPS = 100_000
_Arguments = ParamSpec("_Arguments")
_Returned = TypeVar("_Returned")


def names_the_model(
    function: Callable[Concatenate[ModelConfig, _Arguments], _Returned],
) -> Callable[Concatenate[ModelConfig, _Arguments], _Returned]:
    """Turn what settings of a foreign model without sense raise, wherever they are used, into a ModelError."""

    @functools.wraps(function)
    def named(model: ModelConfig, *arguments: _Arguments.args, **named_arguments: _Arguments.kwargs) -> _Returned:
        try:
            return function(model, *arguments, **named_arguments)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {cut(str(error))}"
            raise ModelError(f"{model.pretrained}: its settings do not make a model ({what})") from error

    return named


@names_the_model
def load_denoiser(model: ModelConfig, *, dtype: torch.dtype, start: Mapping[str, Tensor] | None = None) -> ModelMixin:
    """Return the denoiser to train, on the host, in dtype and training mode; each tensor is cast when it is read.

    start: weights instead of those that the model section names. Raises ModelError if the denoiser is missing,
    incomplete or of another family, or if other weights than the pipeline's do not fit it.
    """
    part = denoiser_part(model)
    if start is None and model.denoiser_init is None:
        denoiser = part.load(dtype=dtype)
    else:
        denoiser = skeleton(FAMILIES[model.family].denoiser.model_class(), part.config)
        weights = with_tables(denoiser, start or file_weights(model), part)
        fill(denoiser, weights, dtype=dtype, source=f"model.denoiser_init {model.denoiser_init}")
    assert isinstance(denoiser, ModelMixin)
    read_row_major(denoiser)
    return denoiser.train()


def denoiser_part(model: ModelConfig) -> Part:
    """Return the denoiser of model.pretrained. Raises ModelError if it is of another family than model.family."""
    pipeline = open_pipeline(model)
    part = pipeline.denoiser()
    _check_family(model, pipeline, part.config)
    return part


def with_tables(denoiser: nn.Module, weights: Mapping[str, Tensor], own: Part) -> Mapping[str, Tensor]:
    """Return weights, with the pipeline's own tables (buffers, such as positions) where they have none.

    A checkpoint holds what is trained, and not tables.
    """
    missing = denoiser.state_dict().keys() - weights.keys() - dict(denoiser.named_parameters()).keys()
    if not missing:
        return weights
    found = own.weights()
    return ChainMap({name: found[name] for name in missing if name in found}, cast(Any, weights))


@names_the_model
def file_weights(model: ModelConfig) -> Mapping[str, Tensor]:
    """Return the weights that the policy starts from, by parameter name, in the dtype of the file.

    Each is read on request: from model.denoiser_init, else from the pipeline.
    """
    return _start_part(model).weights()


@names_the_model
def load_vae(model: ModelConfig) -> AutoencoderKL:
    """Return the frozen VAE, model.vae's or the pipeline's own, on the host in model.vae_dtype.

    Raises ModelError if it is missing, does not fit the denoiser, or would overflow in fp16.
    """
    part = open_vae(model)
    _check_vae(model, part.config)
    vae = part.load(dtype=torch_dtype(model.vae_dtype))
    assert isinstance(vae, ModelMixin)
    cast(Any, vae).register_to_config(**latent_scaling(part))
    return cast(AutoencoderKL, vae.requires_grad_(False).eval())


@names_the_model
def load_text(model: ModelConfig, *, dtype: torch.dtype, say: Say = say_nothing) -> TextEncoder:
    """Return the frozen text encoders with their tokenizers, on the host in dtype.

    say: gets a line on prompts that are too long. Raises ModelError if one is missing or incomplete.
    """
    pipeline, family = open_pipeline(model), FAMILIES[model.family]
    found = pipeline.text_encoders()
    towers: list[Tower] = []
    for name, text in family.text_encoders.items():
        if name not in found:
            assert text.num_tokens is not None, "a test compares the families"
            towers.append(AbsentTower(num_tokens=text.num_tokens, width=_width_of_text(pipeline)))
            continue
        encoder = pipeline.text_encoder(name).load(dtype=dtype).requires_grad_(False).eval()
        tokenizer = pipeline.tokenizer(tokenizer_of(name))
        towers.append(TextTower(tokenizer=tokenizer, encoder=encoder, num_tokens=text.num_tokens, frame=text.frame))
    return TextEncoder(towers, encode=family.encode, say=say)


def _width_of_text(pipeline: Pipeline) -> int:
    """Return the width of the text states that a transformer attends to, as its configuration has it."""
    return int(pipeline.denoiser().config["joint_attention_dim"])


@names_the_model
def read_noise_schedule(model: ModelConfig) -> NoiseSchedule:
    """Return the forward process in the pipeline's scheduler config, which may belong to any sampler.

    model.prediction_type, if given, replaces the config's.

    Raises ModelError for a flow, and for a prediction type without a target.
    """
    config = scheduler_config(model)
    if is_flow(config):
        raise ModelError(f"{model.pretrained}: its scheduler is of a flow, which has no noise schedule")
    schedule: Any = DDPMScheduler.from_config(config)
    return NoiseSchedule(
        alphas_cumprod=schedule.alphas_cumprod.float(), prediction_type=schedule.config["prediction_type"]
    )


@names_the_model
def drawing_scheduler(model: ModelConfig) -> Sampler:
    """Return the sampler for validation images, over the pipeline's own noise schedule or flow."""
    return sampler_from(scheduler_config(model))


@names_the_model
def latent_shape(model: ModelConfig, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return (C, H, W) of an image's latent, from the VAE's config. size: height and width in pixels.

    Raises ModelError if a side is not a multiple of the VAE's factor, times the side of the denoiser's patches if it
    divides latents into patches, or has more patches than the denoiser knows positions of.
    """
    config = open_vae(model).config
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    denoiser = open_pipeline(model).denoiser().config
    patch, most = FAMILIES[model.family].denoiser.packing.patch(denoiser), denoiser.get("pos_embed_max_size")
    height, width = size
    what = f"training images of {height} x {width} pixels (data.resolution, data.bucket_step)"
    if height % (factor * patch) or width % (factor * patch):
        whose = f"the VAE of {model.vae or model.pretrained}" + (f" and patches of {patch}" if patch > 1 else "")
        raise ModelError(f"{what} have a side that is not a multiple of {factor * patch}, the factor of {whose}")
    if most is not None and max(height, width) > factor * patch * most:
        raise ModelError(
            f"{what} have a side of more than {factor * patch * most}, for which {model.pretrained} has no positions"
        )
    return int(config["latent_channels"]), height // factor, width // factor


@names_the_model
def peak_host_gib(
    model: ModelConfig, *, dtype: torch.dtype, ranks_at_once: int, start_bytes: int | None = None, parts: int = 1
) -> float:
    """Return the largest host memory in GiB that loading the denoiser needs on a node, from file headers alone.

    The mapped file counts once, because ranks share its pages; each rank that loads at once adds a copy in dtype.
    start_bytes: size of other weights than those that the model section names. parts: number of ranks that divide the
    copy; each then adds its part, and one tensor at a time, which is not counted.
    """
    denoiser = open_pipeline(model).denoiser()
    source_bytes = _start_part(model).num_bytes() if start_bytes is None else start_bytes
    return (source_bytes + ranks_at_once * denoiser.num_parameters() * dtype.itemsize / parts) / 2**30


def _start_part(model: ModelConfig) -> Part:
    return open_pipeline(model).denoiser() if model.denoiser_init is None else open_denoiser_init(model)


def _check_family(model: ModelConfig, pipeline: Pipeline, config: Mapping[str, Any]) -> None:
    """Raise ModelError if the denoiser is not of model.family, or is not a text-to-image model."""
    title = kind_of(config).title
    family = family_of(config, pipeline.text_config)
    found = None if family is None else family.name
    if found != model.family:
        raise ModelError(
            f"model.family {model.family}, but the {title} of {model.pretrained} (addition_embed_type "
            f"{config.get('addition_embed_type')}, cross_attention_dim {config.get('cross_attention_dim')}) "
            + (f"is of family {found}; set model.family to {found}" if found else f"is none of {', '.join(FAMILIES)}")
        )
    given, returned = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if given != returned:
        raise ModelError(
            f"{model.pretrained}: its {title} has {given} input and {returned} output "
            "channels; only text-to-image models can be trained, not inpainting or upscaling models"
        )


def _check_vae(model: ModelConfig, config: Mapping[str, Any]) -> None:
    if model.vae_dtype == "fp16" and config.get("force_upcast", True):  # a missing value means true in diffusers
        raise ModelError(
            f"model.vae_dtype fp16 with the VAE of {model.vae or model.pretrained}, whose config has force_upcast: "
            "SDXL's own gives NaN in fp16; use vae_dtype fp32 or bf16, or model.vae madebyollin/sdxl-vae-fp16-fix"
        )
    kind = FAMILIES[model.family].denoiser
    channels = kind.packing.latent_channels(open_pipeline(model).denoiser().config)
    if config["latent_channels"] != channels:
        raise ModelError(
            f"the VAE of {model.vae or model.pretrained} has {config['latent_channels']} latent channels, but the "
            f"{kind.title} of {model.pretrained} takes {channels}"
        )


def scheduler_config(model: ModelConfig) -> dict[str, Any]:
    """Return the checked settings of the pipeline's scheduler, with what the denoiser predicts.

    Raises ModelError for settings of which no forward process follows.
    """
    config = open_pipeline(model).scheduler_config(model.prediction_type)
    asked = model.prediction_type
    if asked is not None and (asked == FLOW) != is_flow(config):
        own = "a flow" if is_flow(config) else "a noise schedule"
        raise ModelError(
            f"model.prediction_type {asked}: the scheduler config of {model.pretrained} is of {own}, and a model keeps "
            "the process that it was trained with; leave prediction_type out"
        )
    if is_flow(config):
        flow_of(config, name=model.pretrained)
        return {**config, "prediction_type": FLOW}
    prediction_type = asked or config["prediction_type"]
    if not isinstance(prediction_type, str) or prediction_type not in TARGETS:
        raise ModelError(
            f"{model.pretrained}: its scheduler has prediction_type {prediction_type}; only {', '.join(TARGETS)} can "
            "be trained"
        )
    _check_schedule({**config, "prediction_type": prediction_type}, model.pretrained)
    return {**config, "prediction_type": prediction_type}


def _check_schedule(config: Mapping[str, Any], name: str) -> None:
    """Raise ModelError for settings of a scheduler that give no noise schedule, before they take memory."""
    steps = config.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MAX_TIMESTEPS:
        raise ModelError(
            f"{name}: its scheduler has num_train_timesteps {shown(steps)}; it must be a whole number from 1 to "
            f"{MAX_TIMESTEPS}"
        )
    try:
        levels = cast(Any, DDPMScheduler.from_config(dict(config))).alphas_cumprod
    except Exception as error:  # foreign settings can fail in any line of diffusers
        raise ModelError(f"{name}: its scheduler config gives no noise schedule ({cut(str(error))})") from error
    if not (levels.isfinite().all() and (levels >= 0).all() and (levels <= 1).all()):
        raise ModelError(f"{name}: its scheduler config gives signal levels that are not between 0 and 1")


@names_the_model
def describe_model(model: ModelConfig) -> str:
    """Return a line with the family, and with what the denoiser predicts and where that is stated."""
    used = scheduler_config(model)["prediction_type"]
    own = open_pipeline(model).scheduler_config(model.prediction_type)["prediction_type"]
    source = "its scheduler config" if model.prediction_type is None else "model.prediction_type"
    over = f", instead of {own} in its scheduler config" if used != own else ""
    return f"model: {model.pretrained}, {model.family}, which predicts {used} ({source}{over})"


def describe_loading(model: ModelConfig, *, dtype: torch.dtype, with_encoders: bool) -> str:
    """Return a line with what is about to be loaded and its size, from file headers alone."""
    pipeline = open_pipeline(model)
    part = pipeline.denoiser()
    size = f"{part.num_parameters() / 1e6:.4g} M parameters, {part.num_parameters() * dtype.itemsize / 1e9:.3g} GB"
    source = model.pretrained if model.denoiser_init is None else model.denoiser_init
    text = f"loading the {FAMILIES[model.family].denoiser.title} of {source} ({size})"
    if not with_encoders:
        return text
    encoders = [open_vae(model), *map(pipeline.text_encoder, pipeline.text_encoders())]
    return f"{text}, then VAE and text encoders ({sum(each.num_bytes() for each in encoders) / 1e9:.3g} GB)"
