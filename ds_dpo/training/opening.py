"""The first phase of a run, without models: compare the run folder, start communication, open the pairs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns
from ds_dpo.encoding.feed import PairFeed, open_feed
from ds_dpo.engine.device import pick_device, silence_deepspeed, start_communication
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.models.start import pin_start
from ds_dpo.planning.description import describe
from ds_dpo.reference.cache.errors import ReferenceErrors
from ds_dpo.reference.cache.feed import open_covering_errors
from ds_dpo.run_folder.folder import RunFolder
from ds_dpo.run_folder.log import RunLog


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run before its models.

    config: with the policy's start pinned. errors: those of a cached reference, None if the run reads no such cache.
    """

    config: RunConfig
    resolved: ResolvedDeepSpeed
    place: RankEnvironment
    folder: RunFolder
    log: RunLog
    device: torch.device
    feed: PairFeed
    errors: ReferenceErrors | None

    @property
    def keeps_encoders(self) -> bool:
        """Whether VAE and text encoders are needed during training."""
        return self.feed.needs_encoders or self.config.cadence.sample_every_steps is not None


def open_run(config: RunConfig, resolved: ResolvedDeepSpeed, place: RankEnvironment) -> OpenedRun:
    """Compare the run folder, start communication and open the pairs; every rank of `place` calls it.

    Nothing is written. The environment must have this rank's variables (export_environment). Raises DsDpoError.
    """
    silence_deepspeed()
    config = pin_start(config)
    log = RunLog(speaks=place.rank == 0)
    folder = RunFolder(Path(config.output_dir))
    changes = folder.require_same_run(config, precision=resolved.precision)
    for line in [*describe(config, resolved), *changes]:
        log.line(line)
    device = pick_device(place.local_rank)
    timeout = timedelta(minutes=config.supervision.collective_timeout_minutes)
    start_communication(timeout=timeout, device=device)
    with node_turns(place):  # the node's first rank downloads and counts; the others find its files
        feed = open_feed(config, precision=resolved.precision, say=log.line)
    errors = open_covering_errors(config, say=log.line) if config.reference.residency == "cached" else None
    return OpenedRun(
        config=config,
        resolved=resolved,
        place=place,
        folder=folder,
        log=log,
        device=device,
        feed=feed,
        errors=errors,
    )
