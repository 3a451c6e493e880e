"""Watch steps whose update was skipped: log and count them, and end the run with a record after N in a row.

DeepSpeed skips an update if the norm of all ranks' gradients is not finite, and Engine.backward_and_step lets a loss
that is not finite reach that norm. So every rank knows of such a step without a message, and weights, moments, rate and
average are unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_dpo.checkpoints.identity import RunIdentity
from ds_dpo.config.command_text import command_text
from ds_dpo.config.run import RunConfig
from ds_dpo.data.stream.order import PairOrder
from ds_dpo.distributed.collectives import gather_objects, is_main
from ds_dpo.distributed.together import said_once
from ds_dpo.engine.engine import Engine
from ds_dpo.errors import DsDpoError, NonFiniteError
from ds_dpo.process.say import Say
from ds_dpo.run_folder.folder import RunFolder
from ds_dpo.run_part import RunPart
from ds_dpo.step.record import OPTIONS_OF_STATISTICS, RecordedPair, StepRecord, write_record
from ds_dpo.storage.manifest import step_folder_name

NUM_PAIRS_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts on the run for a record. order: the pair and visit at each position."""

    identity: RunIdentity
    order: PairOrder
    seed: int
    pairs_per_step: int
    micro_batch_pairs: int


class NonFiniteWatch(RunPart):
    """Follows skipped steps.

    With fp16 and a dynamic loss scale, a skipped step with a finite loss belongs to the search for a scale, as long as
    the scale can be lowered: it neither counts nor ends a row.
    """

    name = "non_finite"

    def __init__(
        self,
        *,
        max_steps_in_a_row: int | None,
        loss_scale: Callable[[], float | None],
        least_loss_scale: float | None,
        facts: RunFacts,
        run: Path,
        say: Say,
    ) -> None:
        """Join the parts.

        loss_scale: returns the present loss scale, or None. least_loss_scale: the smallest value to which overflows
        lower it; None if it is fixed or there is none. run: folder of the run.
        """
        self._max_steps_in_a_row = max_steps_in_a_row
        self._read_loss_scale, self._least_loss_scale = loss_scale, least_loss_scale
        self._facts, self._run, self._say = facts, run, say
        self._count = 0
        self._loss_scale: float | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self._error: NonFiniteError | None = None

    def before_backward(self, pair_ids: Tensor, timesteps: Tensor, pair_quantities: Mapping[str, Tensor]) -> None:
        """Keep a micro-batch's pairs, timesteps and losses for a record until the step ends, and its loss scale."""
        self._loss_scale = self._read_loss_scale()
        self._seen.append((pair_ids, timesteps, pair_quantities["loss"]))

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Count a skipped step, and write the record at the last one allowed. Returns no metrics."""
        seen, self._seen = self._seen, []
        if "gradient_norm" in metrics:  # the update was applied
            self._count = 0
            return {}
        if self._is_search_for_scale(metrics["loss"]):
            self._say(f"step {step}: gradients overflowed at loss scale {self._loss_scale:g}; update skipped")
            return {}
        self._count += 1
        limit = self._max_steps_in_a_row
        what = "gradients are" if math.isfinite(metrics["loss"]) else f"loss is {metrics['loss']}, which is"
        self._say(f"step {step}: {what} not finite; update skipped, {self._count} in a row")
        if limit is not None and self._count >= limit:
            self._error = self._stop(step, metrics, seen)
        return {}

    def _is_search_for_scale(self, loss: float) -> bool:
        if self._least_loss_scale is None or self._loss_scale is None:
            return False
        return math.isfinite(loss) and self._loss_scale > self._least_loss_scale

    def _stop(
        self, step: int, metrics: Mapping[str, float], seen: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> NonFiniteError:
        """Write the record of a step, and return the error that ends the run; all ranks call this together."""
        own = [list(zip(*(part.tolist() for part in batch), strict=True)) for batch in seen]
        of_ranks = gather_objects([pair for batch in own for pair in batch])
        facts, identity = self._facts, self._facts.identity
        first = int(metrics["pairs_seen"]) - facts.pairs_per_step
        pairs = [
            RecordedPair(
                rank=rank,
                position=(position := first + rank * len(own_pairs) + number),
                visit=facts.order.place(position)[1],
                pair_id=pair_id,
                timestep=timestep,
                loss=loss,
            )
            for rank, own_pairs in enumerate(of_ranks)
            for number, (pair_id, timestep, loss) in enumerate(own_pairs)
        ]
        record = StepRecord(
            step=step,
            steps_in_a_row=self._count,
            loss=metrics["loss"],
            loss_scale=self._loss_scale,
            options={name: metrics[name] for name in OPTIONS_OF_STATISTICS if name in metrics},
            seed=facts.seed,
            pairs_seen=first,
            pairs_per_step=facts.pairs_per_step,
            micro_batch_pairs=facts.micro_batch_pairs,
            world_size=identity.world_size,
            stage=identity.stage,
            precision=identity.precision,
            fingerprint=identity.fingerprint,
            checkpoint=step_folder_name(step),
            pairs=tuple(pairs),
        )
        return said_once(NonFiniteError(self._message(record, self._written(record))))

    def _written(self, record: StepRecord) -> str:
        """Write the record on rank 0; returns advice on how to use it."""
        path = self._run / "non_finite" / f"{step_folder_name(record.step)}.json"
        if is_main():
            try:
                write_record(record, path)
            except OSError as error:
                return f"The record {path} cannot be written ({error.strerror})."
        return f"To examine step {record.step}: {command_text('replay', path)}"

    def _message(self, record: StepRecord, advice: str) -> str:
        bad = [pair for pair in record.pairs if not math.isfinite(pair.loss)]
        named = ", ".join(str(pair.pair_id) for pair in bad[:NUM_PAIRS_NAMED])
        more = f" and {len(bad) - NUM_PAIRS_NAMED} more" if len(bad) > NUM_PAIRS_NAMED else ""
        what = (
            f"the loss of pair {named}{more} is not finite" if bad else "gradients are not finite, but all losses are"
        )
        row = f"{record.steps_in_a_row} steps in a row" if record.steps_in_a_row > 1 else "a step"
        return (
            f"the update of {row} was skipped, up to step {record.step}, in which {what}; "
            f"non_finite.max_steps_in_a_row {self._max_steps_in_a_row} ends the run. Step {record.step} is saved with "
            "the weights from before: the same command resumes there, and ends again unless its first step is finite. "
            f"{advice}"
        )

    def take_error(self) -> DsDpoError | None:
        """Return the error that ends the run, or None; once."""
        error, self._error = self._error, None
        return error

    def state(self) -> dict[str, Any]:
        """Return the row so far, so that a resumed run does not get the full number of steps again."""
        return {"count": self._count}

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        self._count = int(state["count"])


def build_non_finite(
    config: RunConfig,
    engine: Engine,
    *,
    identity: RunIdentity,
    bucket_sizes: Sequence[int],
    folder: RunFolder,
    say: Say,
) -> NonFiniteWatch:
    """Return the watch of a run. bucket_sizes: those of the pairs that it trains on."""
    pairs_per_step = config.batch.pairs_per_step
    return NonFiniteWatch(
        max_steps_in_a_row=config.non_finite.max_steps_in_a_row,
        loss_scale=lambda: engine.loss_scale,
        least_loss_scale=engine.least_loss_scale,
        facts=RunFacts(
            identity=identity,
            order=PairOrder(bucket_sizes, pairs_per_step=pairs_per_step, seed=config.seed),
            seed=config.seed,
            pairs_per_step=pairs_per_step,
            micro_batch_pairs=config.batch.micro_batch_pairs,
        ),
        run=folder.path,
        say=say,
    )
