"""Which metric of a run's evaluations chooses its best checkpoint."""

from __future__ import annotations

from ds_dpo.checkpoints.best import BestCheckpoint, Readings, held_out_readings, validation_readings
from ds_dpo.config.cadence import HELD_OUT_METRICS
from ds_dpo.config.run import RunConfig
from ds_dpo.process.say import Say
from ds_dpo.run_folder.folder import RunFolder


def best_checkpoint(config: RunConfig, folder: RunFolder, *, say: Say) -> BestCheckpoint | None:
    """Return what marks the best checkpoint by cadence.keep_best; None if it is off."""
    metric = config.cadence.keep_best
    if metric is None:
        return None
    source, _, name = metric.partition(".")

    def read_held_out() -> Readings:
        return held_out_readings(folder.held_out, name, higher_is_better=HELD_OUT_METRICS[name])

    def read_validation() -> Readings:
        return validation_readings(folder.validation, name)

    read, every_steps = {
        "held_out": (read_held_out, config.held_out.every_steps),
        "validation": (read_validation, config.cadence.sample_every_steps),
    }[source]
    assert every_steps is not None, "the configuration requires an evaluation of the metric"
    last = config.max_train_steps
    return BestCheckpoint(
        folder.checkpoints,
        metric,
        read=read,
        is_due=lambda step: step % every_steps == 0 or step == last,
        delay_steps=0 if source == "held_out" else 1,  # images are drawn after their step is saved
        say=say,
    )
