"""The file that names a run's best checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from ds_dpo.errors import CheckpointError, cut, shown
from ds_dpo.outside import parse_json, read_regular
from ds_dpo.storage.manifest import step_folder_name
from ds_dpo.storage.replace import replace_file

Best = Literal["best"]
BEST: Best = "best"  # in place of a step, where a program is asked for a checkpoint
BEST_NAME = f"{BEST}.json"
MAX_BYTES = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestMark:
    """Which checkpoint of a run is the best by a metric, such as held_out.accuracy, and the metric's value there."""

    metric: str
    step: int
    value: float


def write_best_mark(checkpoints: Path, mark: BestMark) -> None:
    """Replace checkpoints/best.json. Raises OSError if the disk refuses."""
    fields = {"checkpoint": step_folder_name(mark.step), **dataclasses.asdict(mark)}
    replace_file(checkpoints / BEST_NAME, json.dumps(fields) + "\n", sync=True)


def read_best_mark(checkpoints: Path) -> BestMark:
    """Read checkpoints/best.json. Raises CheckpointError if it is missing or cannot be read."""
    path = checkpoints / BEST_NAME
    try:
        fields = parse_json(read_regular(path, max_bytes=MAX_BYTES).decode("utf-8"))
        step, value = fields["step"], fields["value"]
        if type(step) is not int or not 0 <= step < 10**18 or type(value) not in (int, float):
            raise ValueError(f"step {shown(step)}, value {shown(value)}")
        return BestMark(metric=str(fields["metric"]), step=step, value=float(value))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoints} marks no best checkpoint: it has no {BEST_NAME}; train with cadence.keep_best, such as "
            "held_out.accuracy"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: does not name a checkpoint ({cut(str(error))})") from error
