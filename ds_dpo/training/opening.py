"""The first phase of a run, without models: refuse what can be refused, start communication, open the pairs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from ds_dpo.checkpoints.identity import identity_of
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.arithmetic import set_arithmetic
from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.device import PickedDevice, pick_device
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns, raised_everywhere
from ds_dpo.encoding.feed import PairFeed, open_feed
from ds_dpo.engine.device import silence_deepspeed, start_communication
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.evaluation.scorers.scorer import Scorer
from ds_dpo.models.start import pin_policy_start, pin_start
from ds_dpo.planning.description import describe
from ds_dpo.reference.cache.errors import ReferenceErrors
from ds_dpo.reference.cache.feed import open_covering_errors
from ds_dpo.run_folder.folder import RunFolder, flatten
from ds_dpo.run_folder.log import RunLog
from ds_dpo.run_folder.resuming import Resume, require_resumable
from ds_dpo.run_folder.trackers import GuardedTracker, open_trackers
from ds_dpo.run_folder.usable import require_usable
from ds_dpo.training.belonging import require_own_checkpoint
from ds_dpo.training.start import Start
from ds_dpo.training.states_fit import describe_fit
from ds_dpo.training.validation_scores import open_validation_scorers, validation_choices
from ds_dpo.watch.held_out.setup import open_held_out_feed


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run before its models.

    config: with the policy's start pinned. held_out: None if no pairs are held out. errors: those of a cached
    reference, None if the run reads no such cache. trackers: rank 0's services beside TensorBoard, [] elsewhere.
    """

    config: RunConfig
    resolved: ResolvedDeepSpeed
    place: RankEnvironment
    folder: RunFolder
    log: RunLog
    picked: PickedDevice
    start: Start
    resume: Resume
    feed: PairFeed
    held_out: PairFeed | None
    errors: ReferenceErrors | None
    trackers: list[GuardedTracker]
    scorers: Sequence[Scorer]

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.picked.device

    @property
    def keeps_encoders(self) -> bool:
        """Whether VAE and text encoders are needed during training."""
        return self.feed.needs_encoders or self.config.cadence.sample_every_steps is not None


def open_run(
    config: RunConfig,
    resolved: ResolvedDeepSpeed,
    place: RankEnvironment,
    *,
    log: RunLog,
    start: Start,
    resume: Resume = None,
) -> OpenedRun:
    """Compare the run folder, start communication and open all pairs; every rank of `place` calls it.

    Whatever can be refused without a model is refused here. Nothing is written. The environment must have this rank's
    variables (export_environment). Raises DsDpoError.
    """
    silence_deepspeed()
    scorers_asked = validation_choices(config)
    config = pin_start(config)
    folder = RunFolder(Path(config.output_dir))
    require_usable(folder.path)
    began_from = folder.saved_config().model.policy_init if folder.config.exists() else None
    config = pin_policy_start(config, began_from=began_from)
    require_resumable(folder.checkpoints, resume, max_train_steps=config.max_train_steps)
    changes = folder.require_same_run(config, precision=resolved.precision)
    own = identity_of(config, resolved, accepted=folder.accepted_changes(config))
    require_own_checkpoint(folder.checkpoints, own, resume=resume)
    for line in [*describe(config, resolved), *changes]:
        log.line(line)
    arithmetic = set_arithmetic(allow_tf32=config.allow_tf32, deterministic=config.deterministic, environ=os.environ)
    picked = pick_device(place.local_rank, os.environ)  # as before the meeting
    fit = describe_fit(config, resolved, place, device=picked.device)
    for line in [f"device: {picked.words}", *picked.remarks(precision=resolved.precision), *fit, arithmetic]:
        log.line(line)
    timeout = timedelta(minutes=config.supervision.collective_timeout_minutes)
    start_communication(timeout=timeout, device=picked.device)
    start.part(f"opening the pairs of {config.data.cache or config.data.dataset}")
    with node_turns(place):  # the node's first rank downloads and counts; the others find its files
        start.turn()
        feed = open_feed(config, precision=resolved.precision, say=log.line)
        folder.require_same_data(config, feed.data_set)
    held_out = None
    if config.held_out.every_steps is not None:
        start.part("opening the held-out pairs")
        held_out = open_held_out_feed(config, feed, place, say=log.line)
    errors = open_covering_errors(config, say=log.line) if config.reference.residency == "cached" else None
    trackers: list[GuardedTracker] = []
    with raised_everywhere():
        if is_main():
            trackers = open_trackers(config.trackers, folder.path, flatten(config.model_dump()))
    scorers: Sequence[Scorer] = []
    if scorers_asked:
        start.part("loading the scorers of validation images")
        with raised_everywhere():
            if is_main():
                scorers = open_validation_scorers(scorers_asked, picked.device)
    return OpenedRun(
        config=config,
        resolved=resolved,
        place=place,
        folder=folder,
        log=log,
        picked=picked,
        start=start,
        resume=resume,
        feed=feed,
        held_out=held_out,
        errors=errors,
        trackers=trackers,
        scorers=scorers,
    )
