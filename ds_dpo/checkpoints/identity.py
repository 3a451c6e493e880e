"""What a checkpoint belongs to: a run, and the ranks and ZeRO stage that it is cut for."""

from __future__ import annotations

from dataclasses import dataclass

from ds_dpo.config.identity import fingerprint, identity
from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import ResolvedDeepSpeed


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a checkpoint belongs to. fingerprint: hash of the run's identity. The rest says how its shards were cut."""

    world_size: int
    stage: int
    precision: str
    fingerprint: str


def identity_of(config: RunConfig, resolved: ResolvedDeepSpeed) -> RunIdentity:
    """Return what a run's checkpoints belong to; the fingerprint is over the fields that are identity."""
    return RunIdentity(
        world_size=resolved.world_size,
        stage=resolved.stage,
        precision=resolved.precision,
        fingerprint=fingerprint(identity(config, resolved.precision)),
    )
