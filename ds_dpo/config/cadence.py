"""The section that says when a run logs, saves and draws images."""

from __future__ import annotations

from pydantic import model_validator

from ds_dpo.config.base import Section, free_field
from ds_dpo.errors import cut

# Metrics of held-out pairs that may choose the best checkpoint, and whether a higher value is better.
HELD_OUT_METRICS = {"accuracy": True, "margin": True, "chosen_difference": False, "policy_chosen_error": False}


class CadenceConfig(Section):
    """When a run logs, saves and draws images. All of them also happen at the end of the run."""

    log_every_steps: int = free_field(
        "Print a line every N optimizer steps; metrics.jsonl has a line for every step.", default=10, ge=1
    )
    save_every_steps: int | None = free_field(
        "Save a checkpoint every N optimizer steps (off if unset). The last step is always saved.", default=200, ge=1
    )
    save_every_minutes: float | None = free_field(
        "Also save a checkpoint X minutes after the previous one, whatever caused that one (off if unset).",
        default=None,
        gt=0,
    )
    keep_checkpoints: int = free_field("Keep the newest N checkpoints and delete older ones.", default=2, ge=1)
    keep_every_steps: int | None = free_field(
        "Also save every N steps, and never delete those checkpoints (off if unset).", default=None, ge=1
    )
    keep_best: str | None = free_field(
        "Also save where this metric is the best so far, keep that checkpoint, and mark it in checkpoints/best.json: "
        "held_out.accuracy, held_out.margin, held_out.chosen_difference, held_out.policy_chosen_error, or "
        "validation.SCORER (off if unset).",
        default=None,
    )
    save_in_background: bool = free_field(
        "Continue training while a checkpoint is written from a copy in host memory.", default=True
    )
    sample_every_steps: int | None = free_field(
        "Draw validation images before the first step, every N optimizer steps, and at the end (off if unset).",
        default=None,
        ge=1,
    )

    @model_validator(mode="after")
    def the_best_is_by_a_metric_that_is_evaluated(self) -> CadenceConfig:
        if self.keep_best is None:
            return self
        source, _, name = self.keep_best.partition(".")
        if (source == "held_out" and name in HELD_OUT_METRICS) or (source == "validation" and name):
            return self
        raise ValueError(
            f"cadence.keep_best {cut(self.keep_best)} is no metric of an evaluation; "
            f"{', '.join(f'held_out.{name}' for name in HELD_OUT_METRICS)} or validation.SCORER would fit"
        )

    @model_validator(mode="after")
    def something_is_saved_on_the_way(self) -> CadenceConfig:
        if self.save_every_steps is None and self.save_every_minutes is None and self.keep_every_steps is None:
            raise ValueError(
                "cadence.save_every_steps none saves nothing before the end; set cadence.save_every_minutes, such as 30"
            )
        return self
