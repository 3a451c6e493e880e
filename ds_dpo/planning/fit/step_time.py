"""How long a step takes at a stated share of the GPU's arithmetic: computing, sending and waiting one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_dpo.config.run import RunConfig
from ds_dpo.planning.fit.choices import Choice
from ds_dpo.planning.fit.gpus import GPUS_OF_A_HOST, Gpu
from ds_dpo.planning.fit.model_work import ModelWork
from ds_dpo.planning.sizes import BYTES_OF, gradient_passes
from ds_dpo.precision import Precision

HOST_LINK = 20e9  # bytes per second from host memory to a GPU, over PCIe 4.0: assumed
GATHERS_OF_A_MICRO_BATCH = 2  # of the weights at stage 3: one for the forward pass, one for the backward pass


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """utilization: share of the GPU's arithmetic that computing reaches. network: bytes per second and GPU."""

    utilization: float
    network_bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step. sent_bytes: by each rank."""

    compute_seconds: float
    communication_seconds: float
    sent_bytes: float
    flop: float

    @property
    def seconds(self) -> float:
        """Nothing overlaps: an upper bound."""
        return self.compute_seconds + self.communication_seconds


def flop_of_pair(work: ModelWork, choice: Choice, config: RunConfig) -> int:
    """Return the FLOP of a pair: policy, what is computed again, the reference if it is loaded, and encoding."""
    flop = work.policy[choice.checkpointing].flop
    if choice.residency not in ("none", "cached"):
        flop += work.reference.flop
    return flop + (work.pair_encoding_flop if config.data.cache is None else 0)


def step_time(
    work: ModelWork,
    choice: Choice,
    config: RunConfig,
    gpu: Gpu,
    assumed: Assumptions,
    *,
    ranks: int,
    precision: Precision,
    sent_precision: Precision,
    zero: Mapping[str, Any],
) -> StepTime:
    """Return the time of a step on each rank. sent_precision: in which gradients are sent.

    zero: the section zero_optimization of the engine's settings.
    """
    pairs = config.batch.pairs_per_step // ranks
    micro_batches = pairs // choice.micro_batch_pairs
    flop = flop_of_pair(work, choice, config) * pairs
    # fp32 on tensor cores (TF32) has half the rate of bf16
    rate = gpu.flop_per_second * assumed.utilization / (2 if precision == "fp32" else 1)
    share = (ranks - 1) / ranks
    copy = work.parameters * BYTES_OF[precision]
    gradients = work.trained_parameters * BYTES_OF[sent_precision]
    passes = gradient_passes(choice.stage, micro_batches=micro_batches, zero=zero)
    gathers = micro_batches * GATHERS_OF_A_MICRO_BATCH if choice.stage == 3 else 1
    gathered = copy if choice.stage == 3 else work.trained_parameters * BYTES_OF[precision]
    sent = share * (passes * gradients + gathers * gathered)
    if choice.residency == "zero3":
        sent += share * micro_batches * copy
    link = gpu.link_bytes_per_second if ranks <= GPUS_OF_A_HOST else assumed.network_bytes_per_second
    from_host = micro_batches * copy / HOST_LINK if choice.residency == "cpu" else 0.0
    return StepTime(
        compute_seconds=flop / rate,
        communication_seconds=sent / link + from_host,
        sent_bytes=sent,
        flop=float(flop),
    )
