"""The models of a run under ZeRO-3, from files to each rank's part: no rank ever holds a whole policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.engine.partitioning import Partitioner
from ds_dpo.engine.settings import ResolvedDeepSpeed, reference_settings
from ds_dpo.models.denoiser.adapters import BaseFingerprint, add_adapter, give_memory, needs_whole_weights
from ds_dpo.models.denoiser.attention import AttentionChoice, choose_attention, set_attention
from ds_dpo.models.denoiser.trainable import choose_trained
from ds_dpo.models.streaming import DenoiserStream, open_denoiser_stream
from ds_dpo.precision import torch_dtype
from ds_dpo.reference.cache.fingerprint import StartOfPolicy, joined_sha256, line_of, start_of_policy


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A policy whose weights are read, and how.

    reference: the module of a reference that was read with it. base: the fingerprint of an adapter's base, if it was
    taken while the weights were read. start: see Models.
    """

    policy: ModelMixin
    reference: ModelMixin | None
    attention: AttentionChoice
    base: str | None
    start: StartOfPolicy | None


def can_stream(config: RunConfig, resolved: ResolvedDeepSpeed) -> bool:
    """Return whether a run's policy goes from its files into parts: under ZeRO-3, unless its adapter needs it whole."""
    return resolved.stage == 3 and not needs_whole_weights(config.adapter)


def stream_models(
    config: RunConfig,
    resolved: ResolvedDeepSpeed,
    *,
    device: torch.device,
    earlier: Mapping[str, Tensor] | None,
    with_reference: bool,
    with_start: bool,
) -> Begun:
    """Read each tensor of the denoiser once, on every rank at its own pace, and keep this rank's part of it.

    earlier: other weights than those that the model section names. with_reference: whether a second module gets the
    same values, divided by the settings of a reference. with_start: whether rank 0 describes the start.
    Every rank must call this. Raises on all ranks what load_denoiser raises.
    """
    dtype = torch_dtype(resolved.precision)
    targets = [Partitioner(resolved.settings)]
    if with_reference:
        targets.append(Partitioner(reference_settings(resolved.settings)))
    with raised_everywhere():
        stream = open_denoiser_stream(config.model, dtype=dtype, start=earlier)
        modules = [stream.empty(device=device) for _ in targets]
        policy = modules[0]
        attention = choose_attention(policy, config.model.attention, device=device, dtype=dtype)
        for module in modules:
            set_attention(module, attention)
        hashes = _take_start(policy) if with_start and is_main() else None
        choose(policy, config)  # first, because DeepSpeed may divide frozen weights in another way
        base = _divide(stream, list(zip(targets, modules, strict=True)), hashes)
        give_memory(policy, seed=config.seed, device=device)
    start = None
    if hashes is not None:
        start = start_of_policy(policy, attention, weights=joined_sha256(line for _, line in sorted(hashes.items())))
    return Begun(
        policy=policy,
        reference=modules[1] if with_reference else None,
        attention=attention,
        base=None if config.adapter.type == "none" else base,
        start=start,
    )


def choose(policy: ModelMixin, config: RunConfig) -> None:
    """Put a run's adapter into its policy, with or without memory, or choose the weights that it trains."""
    if config.adapter.type == "none":
        choose_trained(policy, train=config.model.train, freeze=config.model.freeze)
    else:
        add_adapter(policy, config.adapter, seed=config.seed)


def _take_start(policy: nn.Module) -> dict[str, str]:
    """Return the lines of the start's hash by name: those of the tables, which no stream yields."""
    parameters = dict(policy.named_parameters())
    return {name: line_of(name, table) for name, table in policy.state_dict().items() if name not in parameters}


def _divide(
    stream: DenoiserStream, targets: list[tuple[Partitioner, ModelMixin]], hashes: dict[str, str] | None
) -> str:
    """Give all modules their values in one pass; return the fingerprint of the first one's frozen weights.

    hashes: gets a line of each tensor, by its name.
    """
    policy = targets[0][1]
    is_frozen = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    base = BaseFingerprint()
    for name, in_file, values in stream.parameters(policy):
        if name in is_frozen:
            base.add(name, values)
        if hashes is not None:
            hashes[in_file] = line_of(in_file, values)
        for partitioner, module in targets:
            partitioner.put(module, name if module is policy else in_file, values)
        del values  # the next one is read without this one in memory
    return base.hexdigest()
