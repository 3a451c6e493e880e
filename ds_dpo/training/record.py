"""What a run tells while it goes on: a line for people, a line of metrics.jsonl, a point on each curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_dpo.run_folder.log import RunLog
from ds_dpo.run_folder.metrics import MetricsWriter


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Log and metrics of a run. metrics: rank 0's writer, None on the other ranks, where the log is silent too."""

    log: RunLog
    metrics: MetricsWriter | None

    def line(self, text: str) -> None:
        """Say one thing."""
        self.log.line(text)

    def step(self, metrics: Mapping[str, float], *, due: bool) -> None:
        """Record a step; due: with a line in the log."""
        self.log.step(metrics, due=due)
        if self.metrics is not None:
            self.metrics.write(metrics)

    def flush(self) -> None:
        """Put the metrics on the disk. Raises OSError where the disk refuses."""
        if self.metrics is not None:
            self.metrics.flush()

    def rewind(self, step: int) -> None:
        """Set aside what was recorded after a step."""
        if self.metrics is not None:
            self.metrics.rewind(step)

    def close(self) -> None:
        self.log.close()
        if self.metrics is not None:
            self.metrics.close()
