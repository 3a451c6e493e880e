"""What a person reads during a run: lines in log.txt and on standard output, and a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from ds_dpo.errors import DsDpoError
from ds_dpo.run_folder.progress import Length, Pace, progress_text
from ds_dpo.storage.line_file import LineFile

# The columns of a step's line: label, metric, format.
STEP_COLUMNS = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy", "implicit_accuracy", "{:.2f}"),
    ("margin", "implicit_margin", "{:+.5f}"),
    ("gradient", "gradient_norm", "{:.3g}"),
    ("lr", "learning_rate", "{:.2e}"),
    ("pairs/s", "pairs_per_second", "{:.3g}"),
    ("memory", "peak_memory_gib", "{:.3g} GiB"),
    ("skipped", "skipped_steps", "{:.0f}"),
)


class RunLog:
    """The log of a run. It works on rank 0; on other ranks every call does nothing."""

    def __init__(self, *, speaks: bool) -> None:
        """speaks: True on rank 0. Lines are printed at once, and kept until the file is open."""
        self._speaks = speaks
        self._kept: list[str] = []
        self._file: LineFile | None = None
        self._length = Length(max_train_steps=0)
        self._pace = Pace()
        self._bar: tqdm | None = None

    def open(self, path: Path, *, last_step: int, length: Length) -> None:
        """Append all earlier and later lines to log.txt. The steps go from last_step to the run's length."""
        if not self._speaks:
            return
        self._file = LineFile(path)
        self._file.write("".join(self._kept))
        self._kept.clear()
        self._length = length
        if sys.stderr.isatty():
            self._bar = tqdm(total=length.max_train_steps, initial=last_step, unit="step", dynamic_ncols=True)

    def line(self, text: str) -> None:
        """Print and write a line."""
        if not self._speaks:
            return
        if self._file is None:
            self._kept.append(_stamped(text))
        else:
            self._file.write(_stamped(text))
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
        if "step_seconds" in metrics:
            self._pace.add(metrics["step_seconds"])
        if self._bar is not None:
            self._bar.update(int(metrics["step"]) - self._bar.n)
            self._bar.set_postfix_str("  ".join(columns[:2]))
        if due:
            self.line("  ".join([self._progress(metrics), *columns]))

    def _progress(self, metrics: Mapping[str, float]) -> str:
        step = int(metrics["step"])
        return progress_text(
            self._length,
            step=step,
            pairs_seen=int(metrics["pairs_seen"]) if "pairs_seen" in metrics else None,
            seconds_left=self._pace.seconds_left(self._length.max_train_steps - step),
        )

    def note(self, text: str) -> None:
        """Write a line to log.txt alone, once the file is open; its text is printed elsewhere."""
        if self._file is not None:
            self._file.write(_stamped(" ".join(text.split())))

    @contextmanager
    def ended_by(self) -> Iterator[None]:
        """Close the log after the body. If an error ends the body, the last line of log.txt says which."""
        try:
            yield
        except DsDpoError as error:
            self.note(f"ended: {error}")
            raise
        except BaseException as error:
            self.note(f"failed: {type(error).__name__}: {error}")
            raise
        finally:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._file is not None:
            self._file.close()
            self._file = None


def _stamped(text: str) -> str:
    return f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n"
