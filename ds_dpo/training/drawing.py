"""Validation images of the policy during training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.together import on_main
from ds_dpo.evaluation.drawing.sampling import ValidationSampler
from ds_dpo.evaluation.pages.validation_pages import ValidationPages
from ds_dpo.process.say import Say
from ds_dpo.run_folder.metrics import MetricsWriter


@dataclass(frozen=True, kw_only=True)
class ValidationDrawing:
    """Draws on all ranks together; rank 0 writes the images. metrics: rank 0's writer, None on other ranks.

    say: the run's log.
    """

    module: nn.Module
    sampler: ValidationSampler
    pages: ValidationPages
    metrics: MetricsWriter | None
    say: Say

    def is_missing(self, step: int) -> bool:
        """Return on all ranks whether a step has no page, such as after a kill between its save and its images."""
        return on_main(lambda: not self.pages.has(step))

    def draw(self, *, step: int) -> None:
        """Draw the validation prompts with the policy of a step. Raises ConfigError if a page cannot be written."""
        self.say(f"drawing {len(self.sampler.captions)} validation images of step {step}")
        self.module.eval()
        images = self.sampler()
        self.module.train()
        if not is_main():
            return
        self.pages.write(images, step=step)
        if self.metrics is not None:
            self.metrics.write_images("validation", images, captions=self.sampler.captions, step=step)
