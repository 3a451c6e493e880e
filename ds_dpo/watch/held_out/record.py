"""Write evaluations of held-out pairs to held_out.jsonl, TensorBoard and the log."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_dpo.distributed.collectives import is_main
from ds_dpo.process.say import Say
from ds_dpo.run_folder.metrics import MetricsWriter, cut_metrics
from ds_dpo.watch.held_out.evaluation import Evaluation
from ds_dpo.watch.held_out.statistics import Estimate

# the quantities that TensorBoard shows by decile; the file has all
DECILE_TAGS = ("accuracy", "margin", "chosen_difference")


class HeldOutRecord:
    """Writes each evaluation of a run, on rank 0; elsewhere it does nothing."""

    def __init__(self, path: Path, *, last_step: int, writer: MetricsWriter | None, say: Say) -> None:
        """Continue after last_step, 0 for a new run; later lines of an earlier start move aside. writer: rank 0's."""
        self._path, self._writer, self._say = path, writer, say
        if is_main():
            # a new run is evaluated at step 0, and again if it was killed before its first save
            cut_metrics(self._path, last_step=last_step or -1)

    def rewind(self, last_step: int) -> None:
        """Continue after an earlier step; later lines move to held_out.rolled_back.jsonl."""
        if is_main():
            cut_metrics(self._path, last_step=last_step)

    def __call__(self, found: Evaluation) -> None:
        """Write one evaluation. A value that is not finite becomes null in the file."""
        self._say(describe(found))
        if self._writer is None:
            return
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(as_record(found)) + "\n")
            file.flush()
            os.fsync(file.fileno())  # so that a checkpoint is never newer than this file
        self._writer.write_scalars(_scalars(found), step=found.step)


def describe(found: Evaluation) -> str:
    """Return a line for the log: accuracy on held-out pairs, and both errors compared with the start's."""
    overall = found.summary.overall
    accuracy, margin, chosen = overall["accuracy"], overall["margin"], overall["chosen_difference"]
    parts = [f"accuracy {accuracy.mean:.3f} ({accuracy.low:.2f} to {accuracy.high:.2f})"]
    parts.append(f"margin {margin.mean:+.5f} ({margin.low:+.5f} to {margin.high:+.5f})")
    if "loss" in overall:
        parts.append(f"loss {overall['loss'].mean:.4f}")
        parts.append(f"gradient factor {overall['gradient_factor'].mean:.2f}")
    share = 100 * chosen.mean / found.start_chosen_error
    parts.append(
        f"error against the reference: chosen {chosen.mean:+.5f} ({share:+.1f} %), "
        f"rejected {overall['rejected_difference'].mean:+.5f}"
    )
    return f"held out, step {found.step}: " + ", ".join(parts) + f"; {found.num_pairs} pairs, {found.seconds:.1f} s"


def as_record(found: Evaluation) -> dict[str, Any]:
    """Return an evaluation as plain values; each estimate is [mean, low, high]."""
    return {
        "step": found.step,
        "pairs": found.num_pairs,
        "seconds": round(found.seconds, 3),
        "start_step": found.start_step,
        "start_chosen_error": _finite(found.start_chosen_error),
        "chosen_change": None if found.chosen_change is None else _triple(found.chosen_change),
        "overall": _triples(found.summary.overall),
        "deciles": [
            {"timesteps": list(timesteps), **_triples(decile)}
            for timesteps, decile in zip(found.timesteps, found.summary.deciles, strict=True)
        ],
    }


def _triples(estimates: Mapping[str, Estimate]) -> dict[str, list[float | None]]:
    return {name: _triple(estimate) for name, estimate in estimates.items()}


def _triple(estimate: Estimate) -> list[float | None]:
    return [_finite(value) for value in (estimate.mean, estimate.low, estimate.high)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _scalars(found: Evaluation) -> dict[str, float]:
    tags: dict[str, float] = {}
    for name, estimate in found.summary.overall.items():
        tags |= {
            f"held_out/{name}": estimate.mean,
            f"held_out_interval/{name}_low": estimate.low,
            f"held_out_interval/{name}_high": estimate.high,
        }
    for (first, last), decile in zip(found.timesteps, found.summary.deciles, strict=True):
        tags |= {f"held_out_{name}/timesteps_{first:03d}_{last:03d}": decile[name].mean for name in DECILE_TAGS}
    return tags
