"""The modules that a run trains and compares with, from its configuration to its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns
from ds_dpo.encoding.feed import Encoders, load_encoders
from ds_dpo.engine.optimizers import require_countable
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.models.conditioning import describe_guidance
from ds_dpo.models.denoiser.adapters import AdapterPart, add_adapter
from ds_dpo.models.denoiser.attention import choose_attention, set_attention
from ds_dpo.models.denoiser.trainable import choose_trained, describe_trained
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.loading import describe_loading, describe_model, load_denoiser, peak_host_gib
from ds_dpo.models.pipelines.pretrained import fetch_models, open_denoiser_init, open_pipeline
from ds_dpo.models.reference import HeldReference
from ds_dpo.models.start import checkpoint_start
from ds_dpo.objectives.losses import OBJECTIVES, Objective, with_terms
from ds_dpo.precision import torch_dtype
from ds_dpo.reference.cache.fingerprint import StartOfPolicy, start_of_policy
from ds_dpo.reference.residency import RESIDENCIES
from ds_dpo.training.load_turns import ranks_at_once
from ds_dpo.training.start import Start


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
    peak = peak_host_gib(
        model, dtype=dtype, ranks_at_once=at_once, start_bytes=None if earlier is None else earlier.num_bytes()
    )
    how = "one after another" if at_once == 1 else f"{at_once} at once, after the first one"
    start.say(f"loading takes up to {peak:.2f} GiB of a node's memory: its ranks load the denoiser {how}")
    start.part(loading)
    with node_turns(place, ranks_at_once=at_once):
        start.turn()
        policy = load_denoiser(model, dtype=dtype, start=earlier)
        attention = choose_attention(policy, model.attention, device=device, dtype=dtype)
        set_attention(policy, attention)
        start_weights = start_of_policy(policy, attention) if residency is None and is_main() else None
        start.turn()
        policy.to(device)
        uses_reference = objective_of(config).uses_reference
        predict = FAMILIES[model.family].denoiser.predict
        copy = residency.copy(policy, predict, dtype, device) if residency is not None and uses_reference else None
        start.turn()
        # here and not where they encode: with a cache they only draw
        encoders = load_encoders(config, dtype=dtype, say=start.say).to(device) if with_encoders else None
    reference = residency.settle(copy, resolved) if residency is not None and copy is not None else None
    adapter = None
    if config.adapter.type != "none":
        add_adapter(policy, config.adapter, seed=config.seed)
        adapter = AdapterPart(policy, seed=config.seed, rank=place.rank)
    else:
        choose_trained(policy, train=model.train, freeze=model.freeze)
    start.say(describe_trained(policy))
    if model.gradient_checkpointing:
        # that of diffusers is not re-entrant, so it recomputes less and works with ZeRO-3
        policy.enable_gradient_checkpointing()
    start.say(attention.sentence)
    return Models(policy=policy, adapter=adapter, start=start_weights, reference=reference, encoders=encoders)


def objective_of(config: RunConfig) -> Objective:
    """Return the objective with the terms that the configuration adds; they say what the reference must give."""
    terms = config.terms
    return with_terms(OBJECTIVES[config.objective.type], sft_weight=terms.sft_weight, anchor_weight=terms.anchor_weight)
