"""The section that says when things are due."""

from __future__ import annotations

from pydantic import model_validator

from ds_dpo.config.base import Section, free_field


class CadenceConfig(Section):
    """When things are due, in optimizer steps unless they say minutes; all are due at the end too."""

    log_every_steps: int = free_field("steps between lines shown; metrics.jsonl has each", default=10, ge=1)
    save_every_steps: int | None = free_field("steps between checkpoints; none: by time alone", default=200, ge=1)
    save_every_minutes: float | None = free_field(
        "minutes from one checkpoint to the next, whatever their reason; none: by steps alone", default=None, gt=0
    )
    keep_checkpoints: int = free_field("newest checkpoints that stay on disk", default=2, ge=1)
    keep_every_steps: int | None = free_field(
        "multiples of it are saved, and stay on disk for ever; none: no step is", default=None, ge=1
    )
    save_in_background: bool = free_field(
        "train on while a checkpoint is written, from a copy in host memory of what is saved", default=True
    )
    sample_every_steps: int | None = free_field("steps between validation images; none: never", default=None, ge=1)

    @model_validator(mode="after")
    def something_is_saved_on_the_way(self) -> CadenceConfig:
        if self.save_every_steps is None and self.save_every_minutes is None and self.keep_every_steps is None:
            raise ValueError(
                "save_every_steps none would save nothing before the end: give save_every_minutes, such as 30, too"
            )
        return self
