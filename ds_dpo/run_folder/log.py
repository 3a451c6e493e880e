"""What a person reads during a run: lines in log.txt and on standard output, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from ds_dpo.storage.line_file import LineFile

# The columns of a step's line: label, metric, format.
STEP_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "implicit_accuracy", "{:.2f}"),
    ("margin", "implicit_margin", "{:+.5f}"),
    ("gradient", "gradient_norm", "{:.3g}"),
    ("lr", "learning_rate", "{:.2e}"),
    ("pairs/s", "pairs_per_second", "{:.3g}"),
    ("GiB", "peak_memory_gib", "{:.3g}"),
    ("skipped", "skipped_steps", "{:.0f}"),
)


class RunLog:
    """The log of a run. It works on rank 0; on other ranks every call does nothing."""

    def __init__(self, *, speaks: bool) -> None:
        """speaks: True on rank 0. Lines are printed at once, and kept until the file is open."""
        self._speaks = speaks
        self._kept: list[str] = []
        self._file: LineFile | None = None
        self._max_train_steps = 0
        self._bar: tqdm | None = None

    def open(self, path: Path, *, last_step: int, max_train_steps: int) -> None:
        """Append all earlier and later lines to log.txt. The steps go from last_step to max_train_steps."""
        if not self._speaks:
            return
        self._file = LineFile(path)
        self._file.write("".join(self._kept))
        self._kept.clear()
        self._max_train_steps = max_train_steps
        if sys.stdout.isatty():
            self._bar = tqdm(total=max_train_steps, initial=last_step, unit="step", file=sys.stdout, dynamic_ncols=True)

    def line(self, text: str) -> None:
        """Print and write a line."""
        if not self._speaks:
            return
        stamped = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n"
        if self._file is None:
            self._kept.append(stamped)
        else:
            self._file.write(stamped)
        # standard output may be a file on a full disk; log.txt keeps the line for later
        with contextlib.suppress(OSError):
            if self._bar is None:
                print(text, flush=True)
            else:
                self._bar.write(text, file=sys.stdout)

    def step(self, metrics: Mapping[str, float], *, due: bool) -> None:
        """Show a step: move the bar, and write a line if one is due."""
        if not self._speaks:
            return
        columns = [f"{label} {form.format(metrics[name])}" for label, name, form in STEP_COLUMNS if name in metrics]
        if self._bar is not None:
            self._bar.update(int(metrics["step"]) - self._bar.n)
            self._bar.set_postfix_str("  ".join(columns[:2]))
        if due:
            width = len(str(self._max_train_steps))
            self.line(f"step {metrics['step']:>{width}}/{self._max_train_steps}  " + "  ".join(columns))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()
