"""What a run's models take for one pair: parameters, bytes of activations, and FLOP."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning
from ds_dpo.config.asset_paths import PACKAGE, resolve_asset
from ds_dpo.config.models import Checkpointing
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError, cut
from ds_dpo.models.conditioning import PLAIN_GUIDANCE, takes_guidance, with_guidance
from ds_dpo.models.denoiser.adapters import add_adapter
from ds_dpo.models.denoiser.trainable import choose_trained
from ds_dpo.models.families.family import CLIP_TOKENS
from ds_dpo.models.families.table import FAMILIES, kind_of
from ds_dpo.models.vae import PIXELS_AT_ONCE, encode_moments
from ds_dpo.planning.fit.block_trace import trace_blocks
from ds_dpo.planning.fit.blocks import BlockTable, Passes
from ds_dpo.planning.fit.trace import Traced, trace
from ds_dpo.planning.sizes import denoiser_config
from ds_dpo.precision import Precision, torch_dtype

IMAGES = 2  # of a pair
TIME_IDS = 6


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """The work of one pair, in the precision of the run.

    parameters, trained_parameters: of the denoiser and its low-rank layers. policy: forward and backward of both
    images, for all blocks checkpointed, none, and the number that the run asks for. blocks: what each of them takes.
    reference: forward of both images. vae: encodes as many images as are encoded at once; None without a known one.
    vae_bytes, text_bytes: weights. pair_encoding_flop: both images and the prompt.
    """

    parameters: int
    trained_parameters: int
    policy: Mapping[Checkpointing, Passes]
    blocks: BlockTable
    reference: Traced
    vae: Traced | None
    vae_bytes: int
    text_bytes: int
    pair_encoding_flop: int


def model_work(config: RunConfig, *, precision: Precision) -> ModelWork:
    """Trace a run's models on the meta device. Raises ConfigError if the denoiser cannot be built from its settings."""
    dtype = torch_dtype(precision)
    denoiser = _planned_denoiser(config, dtype)
    call, inputs = _call_of_images(denoiser, config, dtype, images=IMAGES)
    blocks = trace_blocks(denoiser, call, inputs=inputs)
    policy: dict[Checkpointing, Passes] = {"all": blocks.passes(blocks.all), "none": blocks.passes([])}
    asked = config.model.gradient_checkpointing
    if isinstance(asked, int):
        policy[asked] = blocks.passes(blocks.best(asked))
    reference = trace(denoiser, call, inputs=inputs, backward=False)
    vae = _vae(config)
    text_parameters, text_flop = _text(config)
    traced_vae, encoding_flop = (None, 0) if vae is None else _encoding(vae, config)
    return ModelWork(
        parameters=_count(denoiser),
        trained_parameters=sum(each.numel() for each in denoiser.parameters() if each.requires_grad),
        policy=policy,
        blocks=blocks,
        reference=reference,
        vae=traced_vae,
        vae_bytes=0 if vae is None else _bytes(vae),
        text_bytes=text_parameters * dtype.itemsize,
        pair_encoding_flop=encoding_flop + text_flop,
    )


def policy_blocks(settings: Mapping[str, Any], config: RunConfig, *, precision: Precision) -> BlockTable:
    """Return what the blocks of a policy of these settings keep for the pairs that a rank has at once."""
    denoiser, call, inputs = policy_call(settings, config, precision=precision)
    return trace_blocks(denoiser, call, inputs=inputs)


def policy_call(
    settings: Mapping[str, Any], config: RunConfig, *, precision: Precision
) -> tuple[Any, Callable[[], Tensor], list[Tensor]]:
    """Return a policy of these settings on the meta device, a call of it for a micro-batch, and the call's tensors."""
    dtype = torch_dtype(precision)
    denoiser = _denoiser(settings, config, dtype)
    call, inputs = _call_of_images(denoiser, config, dtype, images=IMAGES * config.batch.micro_batch_pairs)
    return denoiser, call, inputs


def _planned_denoiser(config: RunConfig, dtype: torch.dtype) -> Any:
    try:
        settings = denoiser_config(config.model.pretrained, config.model.family)
        settings.setdefault("_class_name", FAMILIES[config.model.family].denoiser.class_name)
        return _denoiser(settings, config, dtype)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"model.pretrained {config.model.pretrained}: its denoiser cannot be built from its settings "
            f"({cut(str(error))})"
        ) from error


def _denoiser(settings: Mapping[str, Any], config: RunConfig, dtype: torch.dtype) -> Any:
    """Return a policy on the meta device, with its adapter."""
    with torch.device("meta"):
        denoiser = kind_of(settings).model_class().from_config(settings)
    denoiser.to(dtype).train()
    if config.adapter.type != "none":
        add_adapter(denoiser, config.adapter, seed=0)
        denoiser.to(dtype)
    else:
        choose_trained(denoiser, train=config.model.train, freeze=config.model.freeze)
    return denoiser


def _call_of_images(
    denoiser: Any, config: RunConfig, dtype: torch.dtype, *, images: int
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    family = FAMILIES[config.model.family]
    factor = _vae_factor(config)
    side = config.data.resolution // factor
    latents = torch.empty(images, family.denoiser.packing.latent_channels(denoiser.config), side, side, device="meta")
    time_ids = torch.zeros(images, TIME_IDS, device="meta")
    extras = with_guidance(family.extras, PLAIN_GUIDANCE if takes_guidance(denoiser.config) else None)(time_ids)
    width, pooled = _text_widths(denoiser.config, extras)
    conditioning = Conditioning(
        text_states=torch.empty(images, family.text_tokens, width, device="meta", dtype=dtype),
        pooled=None if pooled is None else torch.empty(images, pooled, device="meta", dtype=dtype),
        extras=extras,
    )
    times = torch.zeros(images, dtype=torch.int64, device="meta")
    inputs = [latents, conditioning.text_states, times, *extras.values()]
    inputs += [] if conditioning.pooled is None else [conditioning.pooled]
    return lambda: family.denoiser.predict(denoiser, latents, times, conditioning), inputs


def _text_widths(settings: Mapping[str, Any], extras: Mapping[str, Tensor]) -> tuple[int, int | None]:
    """Return the width of text states, and of pooled text, None without it."""
    if "joint_attention_dim" in settings:
        return settings["joint_attention_dim"], settings.get("pooled_projection_dim")
    pooled = None
    if settings.get("addition_embed_type") == "text_time":
        sizes = extras["time_ids"].shape[1] * settings["addition_time_embed_dim"]
        pooled = settings["projection_class_embeddings_input_dim"] - sizes
    return settings["cross_attention_dim"], pooled


def _part_config(config: RunConfig, part: str) -> dict[str, Any] | None:
    """Return the settings of a model beside the denoiser: the pipeline's own, or those of its family."""
    own = Path(resolve_asset(config.model.pretrained)).expanduser() / part / "config.json"
    shipped = PACKAGE / "assets" / "model_configs" / config.model.family / part / "config.json"
    path = own if own.is_file() else shipped
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # whoever loads the model says what is wrong with it


def _vae_factor(config: RunConfig) -> int:
    settings = _part_config(config, "vae")
    return 8 if settings is None else 2 ** (len(settings["block_out_channels"]) - 1)


def _vae(config: RunConfig) -> Any:
    settings = _part_config(config, "vae")
    if settings is None:
        return None
    with torch.device("meta"):
        vae = FAMILIES[config.model.family].vae_class().from_config(settings)
    return vae.to(torch_dtype(config.model.vae_dtype)).requires_grad_(False)


def _encoding(vae: Any, config: RunConfig) -> tuple[Traced, int]:
    """Return what encoding images at once takes, and the FLOP of a pair."""
    size = config.data.resolution
    at_once = max(1, PIXELS_AT_ONCE // size**2)
    pixels = torch.empty(at_once, 3, size, size, device="meta")
    traced = trace(vae, lambda: encode_moments(vae, pixels), inputs=[pixels], backward=False)
    return traced, traced.flop * IMAGES // at_once


def _text(config: RunConfig) -> tuple[int, int]:
    """Return the parameters of the text encoders that are known, and the FLOP of a prompt.

    A token takes two for each parameter of a layer; attention among so few tokens is left out.
    """
    parameters, flop = 0, 0
    for name, part in FAMILIES[config.model.family].text_encoders.items():
        settings = _part_config(config, name)
        if settings is None:
            continue
        found = import_module("transformers").AutoConfig.for_model(**{"model_type": "clip_text_model", **settings})
        with torch.device("meta"):
            encoder = part.model_class()(found)
        embeddings = sum(_count(each) for each in encoder.modules() if isinstance(each, nn.Embedding))
        parameters += _count(encoder)
        flop += 2 * (_count(encoder) - embeddings) * CLIP_TOKENS
    return parameters, flop


def _count(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(math.prod(each.shape) * each.element_size() for each in module.parameters())
