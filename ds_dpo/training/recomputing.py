"""Which blocks of a run's policy compute their activations again: decided once, alike for all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import barrier, gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import on_main
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.errors import ConfigError
from ds_dpo.models.denoiser.recomputation import recompute_all, recompute_blocks
from ds_dpo.planning.fit.blocks import BlockTable
from ds_dpo.planning.fit.model_work import policy_blocks
from ds_dpo.planning.fit.plan import MARGIN
from ds_dpo.planning.fit.rank_memory import CONTEXT_BYTES, bytes_to_come
from ds_dpo.planning.sizes import Parameters, gb
from ds_dpo.process.host_memory import available_bytes


@dataclass(frozen=True)
class Decision:
    """Blocks that compute their activations again, by name, and a line that says why."""

    names: list[str]
    line: str


def settle_recomputing(
    policy: ModelMixin,
    config: RunConfig,
    resolved: ResolvedDeepSpeed,
    place: RankEnvironment,
    *,
    device: torch.device,
) -> list[str]:
    """Let the policy's blocks compute their activations again as model.gradient_checkpointing says.

    Every rank calls it, with all its models loaded and its adapter added. Returns lines for the log. Raises ConfigError
    on all ranks for a number of blocks that the policy does not have.
    """
    asked = config.model.gradient_checkpointing
    if asked == "all":
        recompute_all(policy)
    if asked in ("all", "none"):
        return []
    barrier()  # until every rank has loaded its models
    room = _room(free_bytes(device, place), policy, config, resolved, device=device)
    rooms = gather_objects(room)
    least = None if None in rooms else min(each for each in rooms if each is not None)

    settings = {**policy.config, "_class_name": type(policy).__name__}

    def decide() -> Decision:
        blocks = policy_blocks(settings, config, precision=resolved.precision)
        return decide_blocks(blocks, asked if isinstance(asked, int) else "auto", room=least)

    decision = on_main(decide)
    if decision.names:
        recompute_blocks(policy, decision.names)
    return [decision.line]


def free_bytes(device: torch.device, place: RankEnvironment) -> int | None:
    """Return the bytes that this rank may still take where its tensors are; None if they are not known.

    A GPU's free memory is the driver's and what torch's allocator keeps; ranks on CPUs share that of their host.
    """
    if device.type == "cpu":
        available = available_bytes()
        return None if available is None else available // place.local_world_size
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _room(
    free: int | None, policy: ModelMixin, config: RunConfig, resolved: ResolvedDeepSpeed, *, device: torch.device
) -> float | None:
    """Return the bytes that are free for activations, None if they are not known."""
    if free is None:
        return None
    sizes = [(getattr(each, "ds_numel", each.numel()), each.requires_grad) for each in policy.parameters()]
    parameters = Parameters(total=sum(n for n, _ in sizes), trained=sum(n for n, is_trained in sizes if is_trained))
    libraries = 0 if device.type == "cpu" else CONTEXT_BYTES
    return free * (1 - MARGIN) - bytes_to_come(parameters, config, resolved) - libraries


def decide_blocks(table: BlockTable, asked: int | str, *, room: float | None) -> Decision:
    """Return a number of blocks, or with auto the fewest with which both passes take no more than the room.

    room: bytes for activations; None if they are not known, in which case auto takes all that save any.
    """
    count = len(table.blocks)
    if isinstance(asked, int):
        if asked > count:
            raise ConfigError(
                f"model.gradient_checkpointing {asked}: the denoiser has {count} blocks that can compute their "
                f"activations again; give a number up to {count}, or all"
            )
        chosen = table.best(asked)
    else:
        chosen = table.fewest(0 if room is None else room)
    passes = table.passes(chosen)
    more = passes.flop / table.flop - 1
    line = (
        f"gradient checkpointing: {len(chosen)} of {count} blocks compute their activations again ({more:.0%} more "
        f"work); activations take up to {gb(passes.peak_bytes)}"
    )
    if asked == "auto":
        line += _against(passes.peak_bytes, room)
    return Decision(names=table.names(chosen), line=line)


def _against(taken: int, room: float | None) -> str:
    if room is None:
        return "; free memory is not known here"
    if taken <= room:
        return f" of {gb(room)} that are free for them"
    return (
        f", and only {gb(max(room, 0))} are free for them: if memory runs out, take a smaller batch.micro_batch_pairs"
    )
