"""Build the run parts that evaluate held-out pairs and watch them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ds_dpo.checkpoints.best import BestCheckpoint
from ds_dpo.config.objective_section import ReferenceNeed
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns
from ds_dpo.encoding.feed import Encoders, PairFeed, build_encode, open_held_out
from ds_dpo.engine.engine import Engine
from ds_dpo.errors import ConfigError
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.reference import Reference
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.objectives.losses import Objective, sft
from ds_dpo.process.say import Say
from ds_dpo.step.preference_step import PreferenceStep
from ds_dpo.watch.fall import FallWatch
from ds_dpo.watch.held_out.evaluation import HeldOut
from ds_dpo.watch.held_out.grid import NUM_DECILES, Grid
from ds_dpo.watch.held_out.pairs import HeldOutPairs, read_held_out
from ds_dpo.watch.held_out.record import HeldOutRecord
from ds_dpo.watch.watchdog import Reading, Rule, Watchdog, WindowReadings

DEFAULT_RATE_FACTOR = 0.5
DEFAULT_WINDOW_STEPS = 50


def open_held_out_feed(config: RunConfig, trained_on: PairFeed, place: RankEnvironment, *, say: Say) -> PairFeed:
    """Open the held-out pairs, without models; all ranks call this. Raises ConfigError and DataError."""
    grid_of(config)  # raises now, before models are loaded
    with node_turns(place):  # the node's first rank downloads and counts; the others find its files
        feed = open_held_out(config, trained_on, say=lambda line: say(f"held out: {line}"))
    return feed


def load_held_out(
    config: RunConfig, feed: PairFeed, encoders: Encoders, *, device: torch.device, say: Say
) -> HeldOutPairs:
    """Read and encode this rank's held-out pairs; all ranks call this. Raises DataError."""
    return read_held_out(
        feed.pairs,
        build_encode(feed, encoders, model=config.model, device=device),
        num_pairs=config.held_out.num_pairs,
        seed=config.held_out.seed,
        max_bad_rows=config.data.max_bad_rows,
        say=say,
    )


def build_held_out(
    config: RunConfig,
    pairs: HeldOutPairs,
    engine: Engine,
    reference: Reference | None,
    *,
    record: HeldOutRecord,
    say: Say,
) -> HeldOut:
    """Join pairs and policy. reference: None if none is loaded."""
    settings, max_train_steps = config.held_out, config.max_train_steps
    every_steps = settings.every_steps
    assert every_steps is not None, "pairs are held out only if they are evaluated"
    schedule = training_schedule(config.model, config.diffusion).to(engine.device)

    def step(compared_with: Reference | None) -> PreferenceStep:
        # it must give errors of both images for any objective; the loss is not used
        need: ReferenceNeed = "none" if compared_with is None else "errors"
        objective = Objective(loss=sft, reference=need)
        return PreferenceStep(
            policy=engine.policy,
            predict=FAMILIES[config.model.family].denoiser.predict,
            reference=compared_with,
            schedule=schedule,
            objective=objective,
            options={},
        )

    return HeldOut(
        pairs,
        grid_of(config),
        policy_step=step(None),
        reference_step=None if reference is None else step(reference),
        module=engine.module,
        device=engine.device,
        micro_batch_pairs=config.batch.micro_batch_pairs,
        beta=getattr(config.objective, "beta", None),
        is_due=lambda step: step % every_steps == 0 or step == max_train_steps,
        starts_as_reference=config.model.policy_init is None,
        record=record,
        rewind=record.rewind,
        say=say,
    )


def build_watchdog(
    config: RunConfig, engine: Engine, held_out: HeldOut | None, best: BestCheckpoint | None, *, say: Say
) -> Watchdog | None:
    """Return the watchdog, or None if it is off.

    It reads held-out pairs if there are any, else training steps, and with watchdog.max_fall the metric of best.
    """
    settings = config.watchdog
    fall = None
    if settings.max_fall is not None:
        assert best is not None, "the configuration requires cadence.keep_best"
        fall = FallWatch(best, max_fall=settings.max_fall, patience=settings.patience)
    action = settings.action or ("off" if held_out is None and fall is None else "warn")
    if action == "off":
        return None
    return Watchdog(
        Rule(max_rise=settings.max_rise, patience=settings.patience),
        action=action,
        rate_factor=settings.rate_factor or DEFAULT_RATE_FACTOR,
        max_interventions=settings.max_interventions,
        read=_readings(config, held_out),
        scale_rate=engine.scale_learning_rate,
        say=say,
        fall=fall,
    )


def _readings(config: RunConfig, held_out: HeldOut | None) -> Callable[[int, Mapping[str, float]], Reading | None]:
    if held_out is not None:
        return held_out.reading
    if config.objective.reference_need == "none":
        return lambda step, metrics: None  # steps of training have no error to compare with
    return WindowReadings(config.watchdog.window_steps or DEFAULT_WINDOW_STEPS)


def grid_of(config: RunConfig) -> Grid:
    """Return a uniform grid over the timesteps that training may draw. Raises ConfigError."""
    diffusion, settings = config.diffusion, config.held_out
    num_train_timesteps = training_schedule(config.model, diffusion).num_train_timesteps
    last = num_train_timesteps - 1 if diffusion.max_timestep is None else diffusion.max_timestep
    if last - diffusion.min_timestep + 1 < NUM_DECILES:
        raise ConfigError(
            f"held_out needs at least {NUM_DECILES} timesteps, but diffusion.min_timestep {diffusion.min_timestep} to "
            f"max_timestep {last} are fewer; set held_out.every_steps to none, or give a wider range"
        )
    return Grid(
        first_timestep=diffusion.min_timestep,
        end_timestep=last + 1,
        draws_per_decile=settings.draws_per_decile,
        seed=settings.seed,
    )
