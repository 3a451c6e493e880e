"""Evaluate the policy on held-out pairs at fixed timesteps and noise, compared with its start.

Legend: P pairs of all ranks; I items per pair (timestep and noise, see Grid); B items of a micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ds_dpo.batch import PreferenceBatch, split_pair, stack_pair
from ds_dpo.distributed.collectives import gather_objects, is_main
from ds_dpo.errors import CheckpointError
from ds_dpo.objectives.pair_errors import PairErrors
from ds_dpo.process.say import Say
from ds_dpo.run_part import RunPart
from ds_dpo.step.preference_step import PreferenceStep
from ds_dpo.storage.state_files import StateFile
from ds_dpo.watch.held_out.grid import NUM_DECILES, Grid
from ds_dpo.watch.held_out.pairs import HeldOutPairs
from ds_dpo.watch.held_out.statistics import Estimate, GridErrors, Summary, by_pair, normal_interval, summarize
from ds_dpo.watch.watchdog import Reading

START_FILE = "held_out_start.npy"

# chosen and rejected error of each (pair, item), (P, I, 2) float64
Errors = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one evaluation of the held-out pairs.

    start_chosen_error: mean error of the reference, chosen images. chosen_change: change of the policy's chosen error
    since the previous evaluation, with its interval over pairs; None at the first. start_step: step at which the
    start's errors were computed: 0, unless the pairs changed during a run without a loaded reference. timesteps: first
    and last of each decile.
    """

    step: int
    num_pairs: int
    summary: Summary
    start_chosen_error: float
    chosen_change: Estimate | None
    start_step: int
    timesteps: tuple[tuple[int, int], ...]
    seconds: float


class HeldOut(RunPart):
    """Evaluates when it is due. Checkpoints hold the errors of the start, so that a resumed run has the same."""

    name = "held_out"

    def __init__(
        self,
        pairs: HeldOutPairs,
        grid: Grid,
        *,
        policy_step: PreferenceStep,
        reference_step: PreferenceStep | None,
        module: nn.Module,
        device: torch.device,
        micro_batch_pairs: int,
        beta: float | None,
        is_due: Callable[[int], bool],
        starts_as_reference: bool = True,
        record: Callable[[Evaluation], None],
        rewind: Callable[[int], None],
        say: Say,
    ) -> None:
        """Join the parts.

        policy_step: computes the errors of both images of a pair. reference_step: compares them with the reference;
        only used when the pairs change during a run, None if no reference is loaded. module: set to evaluation mode
        meanwhile. starts_as_reference: whether the policy of step 0 has the reference's weights. record: called with
        each evaluation, on all ranks. rewind: called when the run goes back to a step.
        """
        self._pairs, self._grid = pairs, grid
        self._policy_step, self._reference_step = policy_step, reference_step
        self._module, self._device = module, device
        self._micro_batch_pairs, self._beta = micro_batch_pairs, beta
        self._starts_as_reference = starts_as_reference
        self._is_due, self._record, self._rewind, self._say = is_due, record, rewind, say
        self._batches = _cut(pairs, grid, micro_batch_pairs)
        # under ZeRO-3 each forward pass is a collective: a rank with fewer pairs repeats one
        self._num_forwards = max(gather_objects(len(self._batches)))
        self._start: Errors | None = None
        self._start_step = 0
        self._chosen_before: NDArray[np.float64] | None = None
        self._latest: Evaluation | None = None

    @property
    def latest(self) -> Evaluation | None:
        """The newest evaluation since this start of the run; None before the first."""
        return self._latest

    def begin(self, step: int) -> None:
        """Evaluate a new run; in a resumed run, compute the errors of the start if the checkpoint has none."""
        if step == 0:
            if not self._starts_as_reference:
                self._start, self._start_step = self._errors_of_start(step)
            self._evaluate(step)
        elif self._start is None:
            self._start, self._start_step = self._errors_of_start(step)

    def reading(self, step: int, metrics: Mapping[str, float]) -> Reading | None:
        """Return the watchdog's reading of a step, None if the step had no evaluation; call it after after_step."""
        found = self._latest
        if found is None or found.step != step:
            return None
        chosen, change = found.summary.overall["chosen_difference"], found.chosen_change
        return Reading(
            rise=chosen.mean / found.start_chosen_error,
            low=chosen.low / found.start_chosen_error,
            is_falling=change is not None and change.high < 0,
        )

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Evaluate if an evaluation is due."""
        if self._is_due(step):
            self._evaluate(step)
        return {}

    def state(self) -> dict[str, Any]:
        """Return the identity of the start's errors, and the newest chosen errors."""
        before = self._chosen_before
        return {
            "key": self._key(),
            "start_step": self._start_step,
            "chosen_before": None if before is None else before.tolist(),
        }

    def files(self) -> list[StateFile]:
        """Return the start's errors, on rank 0."""
        if not is_main() or self._start is None:
            return []
        return [StateFile(name=START_FILE, state=self._start, write=_write_start)]

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Continue with the errors of the start, unless they belong to other pairs. Raises CheckpointError."""
        if state["key"] != self._key():
            return
        path = folder / START_FILE
        try:
            start = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
        self._start, self._start_step = start, int(state["start_step"])
        before = state["chosen_before"]
        self._chosen_before = None if before is None else np.array(before)

    def rewind(self, step: int) -> None:
        """Remove later evaluations from the record."""
        self._rewind(step)

    def _evaluate(self, step: int) -> None:
        began = time.perf_counter()
        errors = self._errors(self._policy_errors)
        if self._start is None:
            self._start = errors  # the policy of step 0 is the reference
        grid_errors = _by_decile(errors, self._start)
        before, self._chosen_before = self._chosen_before, by_pair(grid_errors.chosen)
        self._latest = Evaluation(
            step=step,
            num_pairs=len(self._pairs.pair_ids),
            summary=summarize(grid_errors, beta=self._beta),
            start_chosen_error=float(grid_errors.start_chosen.mean()),
            chosen_change=None if before is None else normal_interval(self._chosen_before - before),
            start_step=self._start_step,
            timesteps=tuple((each[0], each[-1]) for each in map(self._grid.decile_range, range(NUM_DECILES))),
            seconds=time.perf_counter() - began,
        )
        self._record(self._latest)

    def _errors_of_start(self, step: int) -> tuple[Errors, int]:
        """Return the reference's errors of pairs that are new to a running run, and the step that they belong to."""
        if self._reference_step is not None:
            return self._errors(partial(_reference_errors, self._reference_step)), 0
        why = "the held-out pairs are new to this run" if step else "the policy starts from model.policy_init"
        self._say(f"{why}, and no reference is loaded: held-out pairs are compared with step {step}")
        return self._errors(self._policy_errors), step

    @torch.no_grad()
    def _errors(self, errors_of: Callable[[PreferenceBatch], Tensor]) -> Errors:
        """Return (P, I, 2) on every rank. errors_of: computes (B, 2) from a batch."""
        was_training = self._module.training
        self._module.eval()
        found = [
            errors_of(self._batch(self._batches[number % len(self._batches)])) for number in range(self._num_forwards)
        ]
        self._module.train(was_training)
        own = torch.cat([values.double() for values in found[: len(self._batches)]]).cpu().numpy()
        places = [(self._pairs.positions[pair], item) for batch in self._batches for pair, item in batch]
        errors = np.empty((len(self._pairs.pair_ids), self._grid.num_items, 2))
        for part_places, part in gather_objects((places, own)):
            for (position, item), values in zip(part_places, part, strict=True):
                errors[position, item] = values
        return errors

    def _policy_errors(self, batch: PreferenceBatch) -> Tensor:
        return _both(self._policy_step.errors(batch))

    def _batch(self, items: Sequence[tuple[int, int]]) -> PreferenceBatch:
        pairs = [self._pairs.own[pair] for pair, _ in items]
        drawn = [
            self._grid.draw(int(pair.pair_ids), item, latent_shape=_shape(pair))
            for pair, (_, item) in zip(pairs, items, strict=True)
        ]
        timesteps = torch.tensor([timestep for timestep, _ in drawn], dtype=torch.int64)
        return _join(pairs, timesteps, torch.stack([noise for _, noise in drawn])).to(self._device)

    def _key(self) -> str:
        """Return a hash of all that the start's errors depend on."""
        text = json.dumps([self._pairs.pair_ids, vars(self._grid)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _write_start(start: Errors, path: Path) -> None:
    np.save(path, start, allow_pickle=False)


def _cut(pairs: HeldOutPairs, grid: Grid, at_once: int) -> list[list[tuple[int, int]]]:
    """Return a rank's items, (index in pairs.own, item), in batches whose latents have one shape."""
    of_shape: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for place, pair in enumerate(pairs.own):
        of_shape.setdefault(_shape(pair), []).extend((place, item) for item in range(grid.num_items))
    return [items[first : first + at_once] for items in of_shape.values() for first in range(0, len(items), at_once)]


def _shape(pair: PreferenceBatch) -> tuple[int, int, int]:
    channels, height, width = pair.latents.shape[1:]
    return channels, height, width


def _join(pairs: Sequence[PreferenceBatch], timesteps: Tensor, noise: Tensor) -> PreferenceBatch:
    """Join single pairs, some of them perhaps several times, into a batch with these timesteps and this noise."""

    def stacked(values: Sequence[Tensor]) -> Tensor:
        chosen, rejected = zip(*map(split_pair, values), strict=True)
        return stack_pair(torch.cat(chosen), torch.cat(rejected))

    def joined(name: str) -> Any:
        values = [getattr(pair, name) for pair in pairs]
        return None if values[0] is None else torch.cat(values)

    return replace(
        pairs[0],
        latents=stacked([pair.latents for pair in pairs]),
        noise=noise,
        timesteps=timesteps,
        text_states=joined("text_states"),
        pooled=joined("pooled"),
        extras={name: stacked([pair.extras[name] for pair in pairs]) for name in pairs[0].extras},
        pair_ids=joined("pair_ids"),
        target_probabilities=joined("target_probabilities"),
        weights=joined("weights"),
    )


def _reference_errors(step: PreferenceStep, batch: PreferenceBatch) -> Tensor:
    """Return the reference's errors of chosen and rejected images, (B, 2)."""
    errors = step.errors(batch)
    return _both(errors) - torch.stack([errors.chosen_difference, errors.rejected_difference], dim=1)


def _both(errors: PairErrors) -> Tensor:
    """Return the policy's errors of chosen and rejected images, (B, 2)."""
    return torch.stack([errors.policy_chosen_error, errors.policy_rejected_error], dim=1)


def _by_decile(errors: Errors, start: Errors) -> GridErrors:
    def side(values: Errors, number: int) -> Errors:
        return values[:, :, number].reshape(len(values), NUM_DECILES, -1)

    return GridErrors(
        chosen=side(errors, 0), rejected=side(errors, 1), start_chosen=side(start, 0), start_rejected=side(start, 1)
    )
