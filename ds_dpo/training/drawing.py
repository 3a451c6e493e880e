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
from ds_dpo.training.validation_scores import ValidationScores


@dataclass(frozen=True, kw_only=True)
class ValidationDrawing:
    """Draws on all ranks together; rank 0 writes the images. metrics: rank 0's writer, None on other ranks.

    say: the run's log. scores: rank 0's, None if images are not scored.
    """

    module: nn.Module
    sampler: ValidationSampler
    pages: ValidationPages
    metrics: MetricsWriter | None
    say: Say
    scores: ValidationScores | None = None

    def is_missing(self, step: int) -> bool:
        """Return on all ranks whether a step has no page or no scores, such as after a kill right after its save."""
        return on_main(lambda: not self.pages.has(step) or not (self.scores is None or self.scores.has(step)))

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
        if self.scores is not None:
            self.scores(images, step=step)
