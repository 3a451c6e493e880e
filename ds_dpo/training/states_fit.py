"""Whether a run's states fit its device, before any model is loaded."""

from __future__ import annotations

import torch

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.planning.sizes import StateBytes, gb, own_denoiser_config, parameters_of, state_bytes
from ds_dpo.process.host_memory import available_bytes

WAYS_OUT = (
    "take more ranks, a higher ZeRO stage (deepspeed_config zero3_bf16), reference.residency zero3, cpu or cached, or "
    "adapter.type lora; scripts/plan.py lists what fits"
)


def describe_fit(
    config: RunConfig, resolved: ResolvedDeepSpeed, place: RankEnvironment, *, device: torch.device
) -> list[str]:
    """Return a line on the share of the device's memory that a run's states take; it warns if they are more than all.

    There is no line for a denoiser whose settings are not known before its file is read, and with offloaded states.
    """
    parameters = parameters_of(config)
    if parameters is None or own_denoiser_config(config.model.pretrained) is None:
        return []
    if resolved.offloads_optimizer or resolved.offloads_parameters:
        return []
    states = state_bytes(parameters, config, resolved)
    if device.type == "cuda":
        return [share_of_memory(states, torch.cuda.get_device_properties(device).total_memory, owner="this GPU")]
    if device.type != "cpu" or (available := available_bytes()) is None:
        return []
    owner = f"each of the {place.local_world_size} ranks of this host" if place.local_world_size > 1 else "this host"
    return [share_of_memory(states, available / place.local_world_size, owner=owner)]


def share_of_memory(states: StateBytes, memory: float, *, owner: str) -> str:
    """Return a line on the share of a memory that states take, or a warning that they are more.

    memory: bytes. owner: whose memory it is, in words.
    """
    words = f"weights, gradients, optimizer and reference take {gb(states.total)}"
    if states.total > memory:
        return f"warning: {words} on each rank, and {owner} has {gb(memory)}: {WAYS_OUT}"
    return f"memory: {words} of the {gb(memory)} of {owner} ({states.total / memory:.0%})"
