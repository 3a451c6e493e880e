"""Whether a run's states fit its device, before any model is loaded."""

from __future__ import annotations

import torch

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.errors import ConfigError
from ds_dpo.planning.sizes import StateBytes, gb, state_bytes
from ds_dpo.process.host_memory import available_bytes
from ds_dpo.process.say import Say

WAYS_OUT = (
    "take more ranks, a higher ZeRO stage (deepspeed_config zero3_bf16), reference.residency zero3, cpu or cached, or "
    "adapter.type lora; scripts/plan.py lists what fits"
)


def require_states_fit(
    config: RunConfig, resolved: ResolvedDeepSpeed, place: RankEnvironment, *, device: torch.device, say: Say
) -> None:
    """Say which share of the device's memory the states of a run take, as far as they are known and on the device.

    Raises ConfigError, on this rank alone, if they are more than all of it. Offloaded states are not compared.
    """
    states = state_bytes(config, resolved)
    if states is None or resolved.offloads_optimizer or resolved.offloads_parameters:
        return
    if device.type == "cuda":
        say(share_of_memory(states, torch.cuda.get_device_properties(device).total_memory, owner="this GPU"))
    elif device.type == "cpu" and (available := available_bytes()) is not None:
        owner = (
            f"each of the {place.local_world_size} ranks of this host" if place.local_world_size > 1 else "this host"
        )
        say(share_of_memory(states, available / place.local_world_size, owner=owner))


def share_of_memory(states: StateBytes, memory: float, *, owner: str) -> str:
    """Return a line on the share of a memory that states take.

    memory: bytes. owner: whose memory it is, in words. Raises ConfigError if the states are more.
    """
    words = f"weights, gradients, optimizer and reference take {gb(states.total)}"
    if states.total > memory:
        raise ConfigError(f"{words} on each rank, and {owner} has {gb(memory)}: {WAYS_OUT}")
    return f"memory: {words} of the {gb(memory)} of {owner} ({states.total / memory:.0%})"
