"""One optimizer step: forward and backward passes of micro-batches, the update, and the step's numbers."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ds_dpo.engine.engine import Engine
from ds_dpo.process.fault_points import reach
from ds_dpo.run_folder.metrics import StepSums
from ds_dpo.step.preference_step import PreferenceStep
from ds_dpo.training.micro_batches import MicroBatches
from ds_dpo.training.run_parts import RunParts


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """The result of a step. All but the seconds are the same on all ranks.

    means: the mean of each quantity over the pairs of all ranks. totals: counters summed over all ranks.
    gradient_norm: None if the update was skipped. learning_rate: the one that the update used.
    """

    means: Mapping[str, float]
    totals: Mapping[str, float]
    gradient_norm: float | None
    learning_rate: float
    step_seconds: float
    data_seconds: float


@dataclass(frozen=True, kw_only=True)
class OptimizerStep:
    """Does one optimizer step at a time. accumulation_steps: number of a rank's micro-batches in a step."""

    engine: Engine
    preference_step: PreferenceStep
    micro_batches: MicroBatches
    accumulation_steps: int

    def run(
        self, parts: RunParts, *, counters: Callable[[], Mapping[str, float]], beat: Callable[[], None]
    ) -> StepOutcome:
        """Do the next step on all ranks.

        counters: called after the update; its numbers are summed over all ranks. beat: called after each micro-batch.
        """
        start, data_seconds = time.perf_counter(), 0.0
        engine = self.engine
        learning_rate, skipped_before = engine.learning_rate, engine.skipped_steps
        sums = StepSums()
        reach("step.begin")
        for number in range(self.accumulation_steps):
            batch, waited_seconds = self.micro_batches.take()
            data_seconds += waited_seconds
            output = self.preference_step(batch)
            sums.add(output.pair_quantities)
            parts.before_backward(batch, output.pair_quantities)
            engine.backward_and_step(output.loss)
            beat()
            if number == 0:
                reach("step.backward")
        means, totals = sums.reduce(counters=counters())
        return StepOutcome(
            means=means,
            totals=totals,
            gradient_norm=engine.gradient_norm if engine.skipped_steps == skipped_before else None,
            learning_rate=learning_rate,
            step_seconds=time.perf_counter() - start,
            data_seconds=data_seconds,
        )


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, in GiB: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
