"""The modules that a run trains and compares with, from its configuration to its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns
from ds_dpo.encoding.feed import Encoders, load_encoders
from ds_dpo.engine.optimizers import require_countable
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.models.conditioning import describe_guidance
from ds_dpo.models.denoiser.adapters import AdapterPart
from ds_dpo.models.denoiser.attention import choose_attention, set_attention
from ds_dpo.models.denoiser.trainable import describe_trained
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.loading import describe_loading, describe_model, load_denoiser, peak_host_gib
from ds_dpo.models.pipelines.pretrained import fetch_models, open_denoiser_init, open_pipeline
from ds_dpo.models.reference import FrozenCopy, HeldReference
from ds_dpo.models.start import CheckpointWeights, checkpoint_start
from ds_dpo.objectives.losses import OBJECTIVES, Objective, with_terms
from ds_dpo.precision import torch_dtype
from ds_dpo.reference.cache.fingerprint import StartOfPolicy, start_of_policy
from ds_dpo.reference.residency import RESIDENCIES
from ds_dpo.training.load_turns import ranks_at_once
from ds_dpo.training.recomputing import settle_recomputing
from ds_dpo.training.start import Start
from ds_dpo.training.streamed import Begun, can_stream, choose, stream_models


@dataclass(frozen=True, kw_only=True)
class Models:
    """The modules of a run on their device. reference, encoders: None if nothing needs them.

    adapter: the run part of the policy's low-rank layers; None if it has none.
    start: describes the start of the policy, for the check of a cached reference; None without one, and except on
    rank 0.
    """

    policy: ModelMixin
    adapter: AdapterPart | None
    start: StartOfPolicy | None
    reference: HeldReference | None
    encoders: Encoders | None


def load_models(
    config: RunConfig,
    resolved: ResolvedDeepSpeed,
    place: RankEnvironment,
    *,
    device: torch.device,
    with_encoders: bool,
    start: Start,
) -> Models:
    """Load policy, reference and encoders, a node's ranks in turns; every rank calls it.

    Raises on all ranks StopAskedError if any is asked to stop meanwhile, and ModelError or ConfigError if a model is
    not available or does not fit.
    """
    model, dtype = config.model, torch_dtype(resolved.precision)
    earlier = checkpoint_start(model)
    residency = RESIDENCIES[config.reference.residency]  # None: its errors are in a cache
    start.part(f"looking for the model files of {model.pretrained}")
    with node_turns(place):
        start.turn()
        fetch_models(model)
        if model.denoiser_init is not None and earlier is None:
            open_denoiser_init(model)
        loading = describe_loading(model, dtype=dtype, with_encoders=with_encoders)
    start.say(describe_model(model))
    for line in describe_guidance(model):
        start.say(line)
    num_parameters = open_pipeline(model).denoiser().num_parameters()
    if config.adapter.type == "none" and not model.train and not model.freeze:
        zero = resolved.settings["zero_optimization"]
        require_countable(config.optimizer, num_trained=num_parameters, zero=zero, world_size=resolved.world_size)
    at_once = ranks_at_once(
        place,
        denoiser_bytes=num_parameters * dtype.itemsize,
        device=device,
        keeps_reference=config.reference.residency == "cpu",
    )
    is_streamed = can_stream(config, resolved)
    start.say(_describe_peak(config, resolved, place, ranks_at_once=at_once, earlier=earlier))
    start.part(loading)
    streamed = None
    if is_streamed:
        streamed = stream_models(
            config,
            resolved,
            device=device,
            earlier=earlier,
            with_reference=_uses_reference(config) and config.reference.residency == "zero3",
            with_start=residency is None,
        )
    with node_turns(place, ranks_at_once=at_once):
        start.turn()
        begun = streamed or _load_whole(config, dtype=dtype, device=device, earlier=earlier)
        start.turn()
        begun.policy.to(device)
        copy = _copy_for_reference(config, begun, dtype=dtype, device=device, earlier=earlier, is_streamed=is_streamed)
        start.turn()
        # here and not where they encode: with a cache they only draw
        encoders = load_encoders(config, dtype=dtype, say=start.say).to(device) if with_encoders else None
    policy = begun.policy
    reference = residency.settle(copy, resolved) if residency is not None and copy is not None else None
    if streamed is None:
        choose(policy, config)
    adapter = None
    if config.adapter.type != "none":
        adapter = AdapterPart(policy, seed=config.seed, rank=place.rank, base=begun.base)
    start.say(describe_trained(policy))
    for line in settle_recomputing(policy, config, resolved, place, device=device):
        start.say(line)
    start.say(begun.attention.sentence)
    return Models(policy=policy, adapter=adapter, start=begun.start, reference=reference, encoders=encoders)


def _describe_peak(
    config: RunConfig,
    resolved: ResolvedDeepSpeed,
    place: RankEnvironment,
    *,
    ranks_at_once: int,
    earlier: CheckpointWeights | None,
) -> str:
    """Return a line with the host memory that loading takes on a node, and how its ranks read the denoiser."""
    # a reference on each rank is loaded whole after the policy, in turns
    is_streamed = can_stream(config, resolved) and not _copies_whole(config)
    peak = peak_host_gib(
        config.model,
        dtype=torch_dtype(resolved.precision),
        ranks_at_once=place.local_world_size if is_streamed else ranks_at_once,
        start_bytes=None if earlier is None else earlier.num_bytes(),
        parts=resolved.world_size if is_streamed else 1,
    )
    how = "one after another" if ranks_at_once == 1 else f"{ranks_at_once} at once, after the first one"
    read = "read each tensor of the denoiser once, and keep their parts" if is_streamed else f"load the denoiser {how}"
    return f"loading takes up to {peak:.2f} GiB of a node's memory: its ranks {read}"


def _load_whole(
    config: RunConfig, *, dtype: torch.dtype, device: torch.device, earlier: Mapping[str, Tensor] | None
) -> Begun:
    """Return a policy that is whole on this rank, on the host. device: where it will predict."""
    policy = load_denoiser(config.model, dtype=dtype, start=earlier)
    attention = choose_attention(policy, config.model.attention, device=device, dtype=dtype)
    set_attention(policy, attention)
    has_start = RESIDENCIES[config.reference.residency] is None and is_main()
    start = start_of_policy(policy, attention) if has_start else None
    return Begun(policy=policy, reference=None, attention=attention, base=None, start=start)


def _copy_for_reference(
    config: RunConfig,
    begun: Begun,
    *,
    dtype: torch.dtype,
    device: torch.device,
    earlier: Mapping[str, Tensor] | None,
    is_streamed: bool,
) -> Any:
    """Return what all ranks then settle as the reference; None if the run needs none."""
    residency, predict = RESIDENCIES[config.reference.residency], FAMILIES[config.model.family].denoiser.predict
    if residency is None or not _uses_reference(config):
        return None
    if begun.reference is not None:
        return FrozenCopy.of_own(begun.reference, predict=predict)
    if is_streamed and _copies_whole(config):
        begun = _load_whole(config, dtype=dtype, device=device, earlier=earlier)
    return residency.copy(begun.policy, predict, dtype, device)


def _copies_whole(config: RunConfig) -> bool:
    """Return whether each rank holds a reference of its own, beside a policy of any ZeRO stage."""
    return _uses_reference(config) and config.reference.residency in ("replicated", "cpu")


def _uses_reference(config: RunConfig) -> bool:
    """Return whether a reference predicts during training."""
    return RESIDENCIES[config.reference.residency] is not None and objective_of(config).uses_reference


def objective_of(config: RunConfig) -> Objective:
    """Return the objective with the terms that the configuration adds; they say what the reference must give."""
    terms = config.terms
    return with_terms(OBJECTIVES[config.objective.type], sft_weight=terms.sft_weight, anchor_weight=terms.anchor_weight)
