"""The settings that decide what a rank holds, and which of them a run may have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ds_dpo.config.models import Checkpointing
from ds_dpo.config.run import RunConfig
from ds_dpo.precision import Precision

Residency = Literal["replicated", "zero3", "cpu", "adapter", "cached", "none"]
# files of ds_configs/ by stage, for each precision
FILES: dict[Precision, dict[int, str]] = {
    "bf16": {stage: f"zero{stage}_bf16" for stage in (1, 2, 3)},
    "fp16": {stage: f"zero{stage}_fp16" for stage in (2, 3)},
    "fp32": {stage: f"zero{stage}_fp32_cpu" for stage in (1, 2, 3)},
}
EXTREMES: tuple[Checkpointing, ...] = ("all", "none")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """residency: of the reference; none for an objective without one. micro_batch_pairs: of a rank."""

    stage: int
    residency: Residency
    checkpointing: Checkpointing
    micro_batch_pairs: int

    def options(self, *, precision: Precision) -> str:
        """Return the choice as options of train.py."""
        parts = [
            f"--deepspeed_config {FILES[precision][self.stage]}",
            f"--micro_batch_pairs {self.micro_batch_pairs}",
            f"--gradient_checkpointing {self.checkpointing}",
        ]
        if self.residency != "none":
            parts.append(f"--reference.residency {self.residency}")
        return " ".join(parts)


def residencies(config: RunConfig) -> tuple[Residency, ...]:
    """Return where the reference of a run may be; that of a run with a cache stays there."""
    if config.objective.reference_need == "none":
        return ("none",)
    if config.reference.residency == "cached":
        return ("cached",)
    if config.adapter.type != "none":
        return ("adapter",)
    if config.reference.refresh_every_steps is not None:
        return ("replicated",)
    return ("replicated", "zero3", "cpu")


def own_choice(config: RunConfig, *, stage: int) -> Choice:
    """Return the choice that a configuration states."""
    has_reference = config.objective.reference_need != "none"
    return Choice(
        stage=stage,
        residency=config.reference.residency if has_reference else "none",
        checkpointing=config.model.gradient_checkpointing,
        micro_batch_pairs=config.batch.micro_batch_pairs,
    )


def choices(config: RunConfig, *, ranks: int, precision: Precision) -> Iterator[Choice]:
    """Return all choices whose micro-batches divide the pairs of a step among the ranks."""
    for stage in FILES[precision]:
        for residency in residencies(config):
            for checkpointing in EXTREMES:
                for pairs in MICRO_BATCHES:
                    if config.batch.pairs_per_step % (pairs * ranks) == 0:
                        yield Choice(
                            stage=stage,
                            residency=residency,
                            checkpointing=checkpointing,
                            micro_batch_pairs=pairs,
                        )
