"""Repeat one step of a run in one process: the same pairs and draws on the weights with which the step began."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_dpo.checkpoints.identity import RunIdentity, identity_of
from ds_dpo.config.run import RunConfig
from ds_dpo.data.stream.loader import read_position
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.distributed.arithmetic import set_arithmetic
from ds_dpo.distributed.device import pick_device
from ds_dpo.distributed.environment import read_environment
from ds_dpo.encoding.feed import PairFeed, build_encode, open_feed
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.errors import CheckpointError, ConfigError, DataError
from ds_dpo.models.families.table import FAMILIES
from ds_dpo.models.policy_start import open_policy_start
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.outside import parse_json
from ds_dpo.process.say import Say
from ds_dpo.reference.cache.feed import open_covering_errors, with_reference_errors
from ds_dpo.reference.refresh import REFERENCE_FILE, load_reference
from ds_dpo.run_folder.folder import RESTORE, RunFolder, precision_of
from ds_dpo.step.examination import Examination, GradientSums, examine
from ds_dpo.step.preference_step import PreferenceStep
from ds_dpo.step.record import OPTIONS_OF_STATISTICS, read_record
from ds_dpo.storage.manifest import MANIFEST_NAME, checkpoint_folders, read_manifest, step_of
from ds_dpo.training.models import Models, load_models, objective_of
from ds_dpo.training.start import Start
from ds_dpo.zero_shards.reader import open_checkpoint

NUM_PARAMETERS_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step to repeat.

    was_applied: whether the run applied its update, None if that is unknown. pair_ids: in order of positions, None if
    they were not recorded. factor: multiplies each micro-batch's loss before the backward pass. checkpoint: the folder
    with the weights, None for the start of the run.
    """

    number: int
    first_position: int
    micro_batch_pairs: int
    factor: float
    options: Mapping[str, float]
    was_applied: bool | None
    pair_ids: list[int] | None
    checkpoint: Path | None


def replay_record(file: Path, *, run: Path | None, checkpoint: Path | None, detect_anomaly: bool, say: Say) -> bool:
    """Repeat the step of a record. Returns whether it is not finite here either.

    run: folder of the run, None for the one that holds the record. checkpoint: folder with other weights than the
    record's. Raises DsDpoError.
    """
    record = read_record(file)
    replayed = _Run(run or file.absolute().parent.parent)
    own = replayed.identity
    if record.fingerprint not in own.fingerprints():
        raise ConfigError(
            f"{file} belongs to a run with the identity {record.fingerprint[:12]}, but {replayed.folder.path} has "
            f"{own.fingerprint[:12]}; give the folder of the record's run with --run"
        )
    step = Step(
        number=record.step,
        first_position=record.pairs_seen,
        micro_batch_pairs=record.micro_batch_pairs,
        factor=_factor(
            record.loss_scale,
            micro=record.micro_batch_pairs,
            pairs_per_step=record.pairs_per_step,
            world_size=record.world_size,
        ),
        options=record.options,
        was_applied=False,
        pair_ids=[pair.pair_id for pair in record.pairs],
        checkpoint=checkpoint or replayed.folder.checkpoints / record.checkpoint,
    )
    return replayed.do(step, detect_anomaly=detect_anomaly, say=say)


def replay_step(run: Path, number: int, *, checkpoint: Path | None, detect_anomaly: bool, say: Say) -> bool:
    """Repeat any step of a run. Returns whether it ends as its line of metrics.jsonl says, True without a line.

    checkpoint: folder with the weights, None for the newest one before the step. Raises DsDpoError.
    """
    replayed = _Run(run)
    config = replayed.config
    lines = _metrics(run)
    line = lines.get(number, {})
    scale = lines.get(number - 1, {}).get("loss_scale") if number > 1 else _first_scale(replayed.resolved.settings)
    micro, per_step = config.batch.micro_batch_pairs, config.batch.pairs_per_step
    world_size = _last_world_size(replayed.folder)
    seen = int(line["pairs_seen"]) - per_step if line else (number - 1) * per_step
    step = Step(
        number=number,
        first_position=seen,
        micro_batch_pairs=micro,
        factor=_factor(scale, micro=micro, pairs_per_step=per_step, world_size=world_size),
        options={name: line[name] for name in OPTIONS_OF_STATISTICS if name in line},
        was_applied="gradient_norm" in line if line else None,
        pair_ids=None,
        checkpoint=checkpoint or _newest_before(replayed.folder, number, identity=replayed.identity, say=say),
    )
    is_finite = not replayed.do(step, detect_anomaly=detect_anomaly, say=say)
    return step.was_applied in (None, is_finite)


class _Run:
    """A run folder, with its configuration and settings for one process."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        if not self.folder.config.is_file() or not self.folder.deepspeed.is_file():
            raise ConfigError(f"{path} is not a run folder: it must have config.yaml and deepspeed.json")
        config = self.folder.saved_config()
        if config.reference.residency == "zero3":  # its weights are shared by all ranks, but there is only one here
            config = config.model_copy(
                update={"reference": config.reference.model_copy(update={"residency": "replicated"})}
            )
        self.config: RunConfig = config
        self.resolved = _resolved(self.folder)

    @property
    def identity(self) -> RunIdentity:
        return identity_of(self.config, self.resolved)

    def do(self, step: Step, *, detect_anomaly: bool, say: Say) -> bool:
        """Repeat a step and print its numbers. Returns whether something was not finite."""
        if step.checkpoint is not None:
            _require_own(step.checkpoint, self.identity)
        config, place = self.config, read_environment({})
        picked = pick_device(place.local_rank, os.environ, needs_gpu=False)
        say(f"device: {picked.words}")
        say(set_arithmetic(allow_tf32=config.allow_tf32, deterministic=config.deterministic, environ=os.environ))
        device = picked.device
        feed = open_feed(config, precision=self.resolved.precision, say=say)
        errors = open_covering_errors(config, say=say) if config.reference.residency == "cached" else None
        quiet = Start(say=lambda line: None, is_asked=lambda: False)
        # one process computes the step with whole weights, however the run divided them
        whole = replace(self.resolved, stage=0)
        models = load_models(config, whole, place, device=device, with_encoders=feed.needs_encoders, start=quiet)
        if errors is not None:
            feed = with_reference_errors(
                feed, errors, config=config, start=models.start, precision=self.resolved.precision
            )
        _take_weights(config, models, step, say=say)
        if config.adapter.dropout:
            say("the adapter's dropout draws again here: it drops other values than in the run")
        return _do(config, step, feed, models, device=device, detect_anomaly=detect_anomaly, say=say)


def _resolved(folder: RunFolder) -> ResolvedDeepSpeed:
    """Return the run's settings for one process. Raises ConfigError if deepspeed.json lacks some of them."""
    settings = folder.saved_settings()
    precision = precision_of(settings)
    try:
        stage, accumulation_steps = settings["zero_optimization"]["stage"], settings["gradient_accumulation_steps"]
    except KeyError as error:
        raise ConfigError(f"{folder.deepspeed} has no {error}, so it is not the file of a run; {RESTORE}") from error
    return ResolvedDeepSpeed(
        settings=settings,
        stage=stage,
        precision=precision,
        accumulation_precision=precision,
        accumulation_steps=accumulation_steps,
        world_size=1,
        offloads_optimizer=False,
        offloads_parameters=False,
    )


def _last_world_size(folder: RunFolder) -> int:
    world_size = folder.newest_start().get("world_size")
    if not isinstance(world_size, int):
        raise ConfigError(
            f"{folder.environment} does not say how many ranks the last start had; restore the file of this run"
        )
    return world_size


def _do(
    config: RunConfig,
    step: Step,
    feed: PairFeed,
    models: Models,
    *,
    device: torch.device,
    detect_anomaly: bool,
    say: Say,
) -> bool:
    encode = build_encode(feed, models.encoders, model=config.model, device=device)
    preference_step = PreferenceStep(
        policy=models.policy,
        predict=FAMILIES[config.model.family].denoiser.predict,
        reference=models.reference,
        schedule=training_schedule(config.model, config.diffusion).to(device),
        objective=objective_of(config),
        options={**config.objective.loss_options(), **step.options},
    )
    order = PairOrder(feed.pairs.bucket_sizes, pairs_per_step=config.batch.pairs_per_step, seed=config.seed)
    sums = GradientSums()
    losses: list[float] = []
    bad: list[int] = []
    for first in range(0, config.batch.pairs_per_step, step.micro_batch_pairs):
        numbers = range(first, first + step.micro_batch_pairs)
        reads = [read_position(feed.pairs, order, step.first_position + number) for number in numbers]
        batch = encode(feed.pairs.join([read.sample for read in reads]))
        ids = batch.pair_ids.tolist()
        if step.pair_ids is not None and ids != [step.pair_ids[number] for number in numbers]:
            raise DataError(
                f"the positions from {step.first_position + first} on now hold the pairs {ids}, but the record has "
                "others: the dataset is not what it was"
            )
        found = examine(
            models.policy, preference_step, batch, factor=step.factor, sums=sums, detect_anomaly=detect_anomaly
        )
        for place, read in enumerate(reads):
            where = f"position {step.first_position + first + place}, visit {read.visit}, {feed.name_pair(read.index)}"
            say(f"pair {ids[place]} ({where}), timestep {int(batch.timesteps[place])}: {_numbers(found, place)}")
        for text in _complaints(found, num_parameters=len(list(models.policy.parameters()))):
            say(f"  {text}")
        losses += found.quantities["loss"]
        bad += [] if found.is_finite else ids
    outcome = f"not finite in micro-batches of {', '.join(map(str, bad))}" if bad else "all of it is finite"
    loss, norm = torch.tensor(losses, dtype=torch.float64).mean(), sums.norm(factor=step.factor)
    say(f"step {step.number}: loss {loss:.7g}, gradient norm {norm:.7g}; {outcome}")
    return bool(bad)


def _numbers(found: Examination, place: int) -> str:
    quantities = {name: values[place] for name, values in found.quantities.items()}
    loss = quantities["loss"]
    parts = [f"loss {loss:.7g}"]
    for side in ("policy", "reference"):
        names = [f"{side}_{image}_error" for image in ("chosen", "rejected")]
        values = [f"{quantities[name]:.7g}" for name in names if name in quantities]
        if values:
            parts.append(f"{side} errors {' and '.join(values)}")
    bad = [name for name, value in quantities.items() if not math.isfinite(value)]
    parts.append(f"NOT FINITE: {', '.join(bad)}" if bad else "finite")
    return ", ".join(parts)


def _complaints(found: Examination, *, num_parameters: int) -> list[str]:
    lines = []
    if found.bad_module is not None:
        lines.append(f"the first module whose output is not finite although its input is: {found.bad_module}")
    if found.operation is not None:
        lines.append(f"backward: {found.operation}")
    if found.bad_parameters:
        named = ", ".join(found.bad_parameters[:NUM_PARAMETERS_NAMED])
        lines.append(
            f"gradients of this micro-batch are not finite in {len(found.bad_parameters)} of {num_parameters} "
            f"parameters; the first: {named}"
        )
    return lines


@torch.no_grad()
def _take_weights(config: RunConfig, models: Models, step: Step, *, say: Say) -> None:
    """Load a checkpoint's weights into the policy, rounded as in the run.

    A reference that follows the policy also gets its weights from the checkpoint.
    """
    if step.checkpoint is None:
        start = open_policy_start(config.model, models.policy, has_adapter=models.adapter is not None)
        if start is not None:
            for name in start:
                models.policy.get_parameter(name).copy_(start[name])
        say(f"weights: those at the start of the run{_age(0, step)}")
        return
    checkpoint = open_checkpoint(step.checkpoint, verify=True)
    policy: nn.Module = models.policy
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(checkpoint.read(name, dtype=parameter.dtype))
    if (step.checkpoint / REFERENCE_FILE).is_file() and isinstance(models.reference, FrozenCopy):
        load_reference(models.reference.module, step.checkpoint / REFERENCE_FILE)
    if checkpoint.has_average("reference") and isinstance(models.reference, FrozenCopy):
        for name, weight in models.reference.module.named_parameters():
            weight.copy_(checkpoint.read(name, "reference", dtype=weight.dtype))
        models.reference.forget_copies()
    say(f"weights: {step.checkpoint}{_age(step_of(step.checkpoint), step)}")


def _age(saved: int | None, step: Step) -> str:
    """Return a remark if weights saved at a step are not those with which `step` began, else an empty text."""
    if saved is None or saved == step.number - 1 or (step.was_applied is False and saved == step.number):
        return ""
    return f", {abs(step.number - 1 - saved)} steps away from those with which step {step.number} began"


def _factor(loss_scale: float | None, *, micro: int, pairs_per_step: int, world_size: int) -> float:
    """Return the factor of a micro-batch's loss in DeepSpeed: the loss scale divided by the accumulation steps."""
    return (loss_scale or 1.0) * micro * world_size / pairs_per_step


def _first_scale(settings: Mapping[str, Any]) -> float | None:
    fp16 = settings.get("fp16", {})
    if not fp16.get("enabled"):
        return None
    return float(fp16.get("loss_scale") or 2.0 ** fp16.get("initial_scale_power", 16))


def _require_own(checkpoint: Path, identity: RunIdentity) -> None:
    """Raise CheckpointError if a checkpoint with a manifest is another run's."""
    if (checkpoint / MANIFEST_NAME).is_file():
        identity.require_own(checkpoint, read_manifest(checkpoint))


def _newest_before(folder: RunFolder, number: int, *, identity: RunIdentity, say: Say) -> Path | None:
    """Return the run's newest checkpoint of an earlier step; None for the first step, if there is none.

    Raises CheckpointError if a later step has none.
    """
    for path in checkpoint_folders(folder.checkpoints):
        saved = step_of(path)
        if saved is None or saved >= number:
            continue
        try:
            _require_own(path, identity)
        except CheckpointError as error:
            say(f"skipped: {error}")
        else:
            return path
    if number > 1:
        raise CheckpointError(
            f"{folder.checkpoints} has no checkpoint of a step before {number}; give another one with --checkpoint, "
            "such as that of a later step, to examine these pairs with its weights"
        )
    return None


def _metrics(run: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of metrics.jsonl by step, without a line that a kill has torn."""
    path = run / "metrics.jsonl"
    found: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            line = parse_json(text)
            found[int(line["step"])] = line
        except (ValueError, KeyError, TypeError, OverflowError):
            continue
    return found
