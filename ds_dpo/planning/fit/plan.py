"""The plan of a run: each choice of settings with its memory and its time, and which to take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.planning.fit.choices import Choice, choices, own_choice
from ds_dpo.planning.fit.gpus import Gpu
from ds_dpo.planning.fit.model_work import ModelWork
from ds_dpo.planning.fit.rank_memory import rank_memory
from ds_dpo.planning.fit.step_time import Assumptions, StepTime, step_time
from ds_dpo.planning.sizes import BYTES_OF, optimizer_bytes
from ds_dpo.precision import Precision

# free for fragments of memory and for what the sum leaves out
MARGIN = 0.06
FEWEST_TRIED = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A choice on a GPU. parts: bytes by rank_memory.PARTS."""

    choice: Choice
    ranks: int
    parts: dict[str, float]
    time: StepTime
    fits: bool

    @property
    def total_bytes(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """own: what the configuration states. rows: all choices. fastest, leanest: of those that fit, None if none does.

    fewest: the fastest choice on the smallest number of GPUs on which one fits. checkpoint_bytes: of one checkpoint;
    kept_checkpoints: how many exist at once.
    """

    own: Row
    rows: list[Row]
    fastest: Row | None
    leanest: Row | None
    fewest: Row | None
    checkpoint_bytes: float
    kept_checkpoints: int
    precision: Precision


SHIPPED = {"use_multi_rank_bucket_allreduce": False}  # as ds_configs/ has it for stages that are not the run's own


def make_plan(work: ModelWork, config: RunConfig, resolved: ResolvedDeepSpeed, gpu: Gpu, assumed: Assumptions) -> Plan:
    """Return the plan of a run on resolved.world_size GPUs of one kind."""

    def row(choice: Choice, ranks: int, work: ModelWork = work) -> Row:
        parts = rank_memory(
            work,
            choice,
            config,
            ranks=ranks,
            precision=resolved.precision,
            accumulation_precision=resolved.accumulation_precision,
            zero=resolved.settings["zero_optimization"],
        )
        time = step_time(
            work,
            choice,
            config,
            gpu,
            assumed,
            ranks=ranks,
            precision=resolved.precision,
            sent_precision=resolved.settings.get("communication_data_type") or resolved.precision,
            zero=resolved.settings["zero_optimization"] if choice.stage == resolved.stage else SHIPPED,
        )
        fits = sum(parts.values()) <= gpu.memory_bytes * (1 - MARGIN)
        return Row(choice=choice, ranks=ranks, parts=parts, time=time, fits=fits)

    def rows_on(ranks: int) -> list[Row]:
        return [row(choice, ranks) for choice in choices(config, ranks=ranks, precision=resolved.precision)]

    def own_row() -> Row:
        own = own_choice(config, stage=resolved.stage)
        if own.checkpointing != "auto":
            return row(own, resolved.world_size)
        kept = row(replace(own, checkpointing="none"), resolved.world_size)
        others = kept.total_bytes - kept.parts["activations"]
        limit = (gpu.memory_bytes * (1 - MARGIN) - others) / own.micro_batch_pairs
        passes = work.blocks.passes(work.blocks.fewest(limit))
        return row(own, resolved.world_size, replace(work, policy={**work.policy, "auto": passes}))

    rows = rows_on(resolved.world_size)
    # an export of an adapter reads the frozen weights from their own files
    has_frozen = config.adapter.type == "none" or config.model.denoiser_init is not None
    weights = work.parameters if has_frozen else work.trained_parameters
    saved = work.trained_parameters * optimizer_bytes(config) + weights * BYTES_OF[resolved.precision]
    return Plan(
        own=own_row(),
        rows=rows,
        fastest=fastest(rows),
        leanest=min((each for each in rows if each.fits), key=lambda each: each.total_bytes, default=None),
        fewest=next((found for ranks in FEWEST_TRIED if (found := fastest(rows_on(ranks))) is not None), None),
        checkpoint_bytes=float(saved),
        kept_checkpoints=config.cadence.keep_checkpoints + 1,
        precision=resolved.precision,
    )


def fastest(rows: list[Row]) -> Row | None:
    """Return the row that fits and takes the shortest time; of nearly equal times the one that computes more at once.

    Large micro-batches use a GPU better than the stated share says of all.
    """
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    shortest = min(row.time.seconds for row in fitting)
    near = [row for row in fitting if row.time.seconds <= 1.01 * shortest]
    return min(near, key=lambda row: (-row.choice.micro_batch_pairs, row.total_bytes))
