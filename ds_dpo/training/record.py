"""What a run records during training: lines in the log, lines of metrics.jsonl, points of TensorBoard's curves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_dpo.run_folder.log import RunLog
from ds_dpo.run_folder.metrics import MetricsWriter


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Log and metrics of a run. metrics: rank 0's writer, None on other ranks, where the log does nothing either."""

    log: RunLog
    metrics: MetricsWriter | None

    def line(self, text: str) -> None:
        """Print and write a line of the log."""
        self.log.line(text)

    def step(self, metrics: Mapping[str, float], *, due: bool) -> None:
        """Record the metrics of a step. due: whether the log gets a line."""
        self.log.step(metrics, due=due)
        if self.metrics is not None:
            self.metrics.write(metrics)

    def flush(self) -> None:
        """Flush the metrics to the disk. Raises OSError if the disk refuses them."""
        if self.metrics is not None:
            self.metrics.flush()

    def rewind(self, step: int) -> None:
        """Set aside the metrics after a step."""
        if self.metrics is not None:
            self.metrics.rewind(step)

    def close(self) -> None:
        """Close the metrics. The log stays open: its last line is the reason for the end."""
        if self.metrics is not None:
            self.metrics.close()
