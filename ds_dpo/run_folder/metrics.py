"""What a step is measured by: sums over its pairs, one reduction across ranks, one line of metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ds_dpo.distributed.collectives import sum_across_ranks
from ds_dpo.outside import parse_json
from ds_dpo.run_folder.trackers import GuardedTracker, Picture
from ds_dpo.storage.line_file import LineFile, warn
from ds_dpo.storage.replace import replace_file

# Every key of metrics.jsonl and every TensorBoard tag, with its meaning. Means are over all pairs of the step, of all
# ranks, before its update. A key is absent if the objective does not produce it.
METRICS: dict[str, str] = {
    "step": "optimizer steps since the start, counted from 1; a skipped update counts too",
    "loss": "mean loss of the step's pairs",
    "implicit_accuracy": "share of pairs whose chosen image the policy favours more than the reference; ties count 1/2",
    "implicit_margin": "mean of rejected_difference - chosen_difference; training should make it positive",
    "absolute_margin": "mean size of rejected_difference - chosen_difference without its sign; automatic beta uses it",
    "gradient_factor": "mean of sigmoid(-u), Linear-DPO's c: the share of a pair's largest gradient that is left; "
    "0.5 at the start",
    "label_probability": "mean of sigmoid(u), the policy's own probability of the labels; alpha-DPO only",
    "rejected_gradient_scale": "mean lambda of Diffusion-SDPO, the share of the rejected images' gradient that is left",
    "beta": "automatic beta that this step used",
    "mean_probability": "label_probability of the previous step, which alpha-DPO's a followed in this step",
    "baseline": "the baseline of Diffusion-KTO that this step used",
    "policy_chosen_error": "mean squared error of the policy's prediction, chosen images",
    "policy_rejected_error": "mean squared error of the policy's prediction, rejected images",
    "reference_chosen_error": "mean squared error of the reference's prediction, chosen images",
    "reference_rejected_error": "mean squared error of the reference's prediction, rejected images",
    "chosen_difference": "mean policy error minus reference error, chosen images",
    "rejected_difference": "mean policy error minus reference error, rejected images",
    "chosen_distance": "mean squared distance between the policy's and the reference's prediction, chosen images",
    "rejected_distance": "mean squared distance between the policy's and the reference's prediction, rejected images",
    "gradient_norm": "2-norm of the whole gradient before clipping; absent if the update was skipped",
    "learning_rate": "learning rate that this step's update used",
    "pairs_seen": "pairs since the start, including this step's",
    "pairs_per_second": "pairs of this step divided by its duration, all ranks together",
    "step_seconds": "duration of the step: data, encoding, forward, backward, update",
    "data_seconds": "part of step_seconds in which this rank waited for the loader",
    "peak_memory_gib": "most memory held so far on rank 0, in GiB: of the GPU, or resident in the process on a CPU",
    "skipped_steps": "updates skipped since the start because a loss or a gradient was not finite",
    "loss_scale": "fp16 loss scale after the step; fp16 only",
    "failed_saves": "checkpoints since this start that the disk refused; training goes on, and the log gives details",
    "bad_rows": "unreadable rows replaced since this start, all ranks together",
}


# TensorBoard sorts groups by name, which puts five of held_out before train; its tab of custom scalars has this order.
LAYOUT = {
    "train": {name: ["Multiline", [f"train/{name}"]] for name in METRICS if name != "step"},
    "held out": {
        name: ["Margin", [f"held_out/{name}", f"held_out_interval/{name}_low", f"held_out_interval/{name}_high"]]
        for name in ("accuracy", "margin", "chosen_difference", "rejected_difference")
    },
    "held out by timesteps": {
        name: ["Multiline", [f"held_out_{name}/.*"]] for name in ("accuracy", "margin", "chosen_difference")
    },
}


class StepSums:
    """Adds per-pair quantities over a step's micro-batches on the device; one reduction then reads them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._num_pairs = 0

    def add(self, pair_quantities: Mapping[str, Tensor]) -> None:
        """Add a micro-batch: detached (B,) tensors by metric name."""
        self._num_pairs += len(next(iter(pair_quantities.values())))
        for name, values in pair_quantities.items():
            total = values.sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def reduce(self, *, counters: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
        """Return means over all ranks' pairs, and the sums over ranks of some counters, in one collective.

        Every rank must call it with the same names; it waits for the device once.
        """
        names = list(self._sums)
        device = self._sums[names[0]].device
        own = torch.tensor([self._num_pairs, *counters.values()], dtype=torch.float64).to(device)
        reduced = sum_across_ranks(torch.cat([own, torch.stack(list(self._sums.values()))])).tolist()
        num_pairs, rest = reduced[0], reduced[1:]
        totals = dict(zip(counters, rest, strict=False))
        means = {name: total / num_pairs for name, total in zip(names, rest[len(counters) :], strict=True)}
        return means, totals


def cut_metrics(path: Path, *, last_step: int) -> int:
    """Remove the lines after a step, and a torn last line, so that a resumed run has each step once.

    Removed lines are appended to a file beside it, see rolled_back_path. Returns their number.
    """
    if not path.exists():
        return 0
    kept: list[str] = []
    later: list[str] = []
    for line in _lines(path):
        step = _step_of(line)
        if step is not None:
            (kept if step <= last_step else later).append(line + "\n")
    if later:
        with rolled_back_path(path).open("a", encoding="utf-8") as file:
            file.writelines(later)
    replace_file(path, "".join(kept), sync=True)
    return len(later)


def rolled_back_path(path: Path) -> Path:
    """Return where the lines of a file of steps go that a later start does not go on from."""
    return path.with_suffix(".rolled_back.jsonl")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _step_of(line: str) -> int | None:
    try:
        return int(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None  # the line was torn by a kill


class MetricsWriter:
    """metrics.jsonl, TensorBoard and other trackers of a run; for rank 0 only."""

    def __init__(
        self,
        folder: Path,
        *,
        last_step: int,
        has_tensorboard: bool = True,
        trackers: Sequence[GuardedTracker] = (),
    ) -> None:
        """Continue after last_step, 0 for a new run; later lines of an earlier start move to
        metrics.rolled_back.jsonl, and its later events are removed.

        trackers: cannot forget a step, so they get those alone that no start has reached before.
        """
        self._folder, self._path = folder, folder / "metrics.jsonl"
        self._has_tensorboard, self._trackers = has_tensorboard, list(trackers)
        self._hold_back_trackers()
        self.num_rolled_back = cut_metrics(self._path, last_step=last_step)
        self._open(last_step)

    def _open(self, last_step: int) -> None:
        self._lines = LineFile(self._path)
        self._events: SummaryWriter | None = self._open_events(last_step + 1)

    def _open_events(self, purge_step: int | None) -> SummaryWriter | None:
        if not self._has_tensorboard:
            return None
        events = SummaryWriter(str(self._folder / "tensorboard"), purge_step=purge_step)
        events.add_custom_scalars(LAYOUT)
        return events

    def _hold_back_trackers(self) -> None:
        paths = (self._path, rolled_back_path(self._path))
        steps = [step for path in paths if path.exists() for step in map(_step_of, _lines(path)) if step is not None]
        for tracker in self._trackers if steps else ():
            tracker.continue_after(max(steps))

    def _to_events(self, write: Callable[[SummaryWriter], object]) -> None:
        """Write to TensorBoard. A writer that the disk refused cannot be used; the next checkpoint opens another."""
        if self._events is None:
            return
        try:
            write(self._events)
        except OSError as error:
            self._events = None
            warn(f"TensorBoard lacks the steps until the next checkpoint: {error}")

    def rewind(self, last_step: int) -> None:
        """Continue after an earlier step; later lines move to metrics.rolled_back.jsonl."""
        self._close_files()
        self._hold_back_trackers()
        cut_metrics(self._path, last_step=last_step)
        self._open(last_step)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Write one step; metrics["step"] is its number. A value that is not finite becomes null in the file."""
        assert metrics.keys() <= METRICS.keys(), f"not in METRICS: {metrics.keys() - METRICS.keys()}"
        readable = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.write(json.dumps(readable) + "\n")
        scalars = {f"train/{name}": value for name, value in metrics.items() if name != "step"}
        self.write_scalars(scalars, step=int(metrics["step"]))

    def write_scalars(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Write numbers by tag to the trackers only."""
        for tag, value in scalars.items():
            self._to_events(partial(SummaryWriter.add_scalar, tag=tag, scalar_value=value, global_step=step))
        for tracker in self._trackers:
            tracker.scalars(scalars, step=step)

    def write_images(self, name: str, images: Tensor, *, captions: Sequence[str], step: int) -> None:
        """Write images (N, 3, X, Y) in 0..1 with a caption each.

        TensorBoard shows them side by side without captions; its tab of texts has them in the same order.
        """
        table = "\n".join(f"{number}. {caption}" for number, caption in enumerate(captions, start=1))
        self._to_events(lambda events: events.add_images(name, images, step))
        self._to_events(lambda events: events.add_text(f"{name}_captions", table, step))
        if not self._trackers:
            return
        pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        pictures = [Picture(pixels=one, caption=caption) for one, caption in zip(pixels, captions, strict=True)]
        for tracker in self._trackers:
            tracker.images(name, pictures, step=step)

    def flush(self) -> None:
        """Flush everything to the disk, so that a checkpoint is never newer than its metrics.

        Raises OSError if the disk refuses lines of metrics.jsonl.
        """
        self._lines.sync()
        if self._events is None:
            self._events = self._open_events(None)
        self._to_events(SummaryWriter.flush)

    def close(self) -> None:
        self._close_files()
        for tracker in self._trackers:
            tracker.close()

    def _close_files(self) -> None:
        self._lines.close()
        self._to_events(SummaryWriter.close)
