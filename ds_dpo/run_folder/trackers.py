"""Where a run's curves go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio; one row of a table each.

The packages of the last two are extras, imported only if the configuration asks for them.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ds_dpo.errors import ConfigError, cut
from ds_dpo.outside import parse_json, read_regular
from ds_dpo.storage.line_file import warn
from ds_dpo.storage.replace import replace_file

IDS = "trackers.json"  # in the run folder: the id of its run at each tracker
PROJECT = "ds_dpo"
MAX_IDS_BYTES = 10_000


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image (X, Y, 3) of bytes with its caption."""

    pixels: NDArray[np.uint8]
    caption: str


class Tracker(Protocol):
    """A service's run. Steps that come must not be before those that it has."""

    def scalars(self, values: Mapping[str, float], *, step: int) -> None: ...
    def images(self, name: str, pictures: Sequence[Picture], *, step: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a tracker's run begins or continues with. settings: the run's configuration by dotted name."""

    folder: Path
    run_id: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.absolute().name


class WandbTracker:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and the other variables of its client hold."""

    def __init__(self, wandb: Any, opening: Opening) -> None:
        # its client would copy what is printed, which log.txt has
        os.environ.setdefault("WANDB_CONSOLE", "off")
        os.environ.setdefault("WANDB_SILENT", "true")
        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or opening.name,
            id=opening.run_id,
            resume="allow",
            dir=str(opening.folder),
            config=dict(opening.settings),
        )

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values), step=step)

    def images(self, name: str, pictures: Sequence[Picture], *, step: int) -> None:
        images = [self._wandb.Image(each.pixels, caption=each.caption) for each in pictures]
        self._run.log({name: images}, step=step)

    def close(self) -> None:
        self._run.finish()


class TrackioTracker:
    """A run of Trackio, which keeps curves in a local database unless its own variables say otherwise."""

    def __init__(self, trackio: Any, opening: Opening) -> None:
        self._trackio = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or PROJECT,
            # Trackio knows a run by its name alone
            name=f"{opening.name}-{opening.run_id}",
            resume="allow",
            config=dict(opening.settings),
        )

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        self._trackio.log(dict(values), step=step)

    def images(self, name: str, pictures: Sequence[Picture], *, step: int) -> None:
        images = [self._trackio.Image(each.pixels, caption=each.caption) for each in pictures]
        self._trackio.log({f"{name}/{number}": image for number, image in enumerate(images)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


# Name in the configuration, and of the package and of the extra that installs it: how a run of it is opened.
SERVICES: dict[str, Callable[[Any, Opening], Tracker]] = {"wandb": WandbTracker, "trackio": TrackioTracker}


def open_trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[GuardedTracker]:
    """Begin or continue a run at each service of `names`; TensorBoard is none of them. For rank 0 only.

    The ids of the runs are kept in the folder, so that a resumed run continues the same ones. Raises ConfigError if a
    package is missing, or a service does not start.
    """
    return [_open(name, folder, settings) for name in names if name in SERVICES]


def _open(name: str, folder: Path, settings: Mapping[str, Any]) -> GuardedTracker:
    try:
        package = import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"trackers: {name} cannot be imported ({error}); install it by `pip install 'ds_dpo[{name}]'`, or leave it "
            "out of trackers"
        ) from error
    opening = Opening(folder=folder, run_id=_run_id(folder, name), settings=settings)
    try:
        return GuardedTracker(name, SERVICES[name](package, opening))
    except Exception as error:  # of whatever class the service's client has
        advice = "log in, set WANDB_MODE=offline," if name == "wandb" else "check its variables,"
        raise ConfigError(
            f"trackers: {name} does not start ({type(error).__name__}: {' '.join(str(error).split())[:200]}); {advice} "
            "or leave it out of trackers"
        ) from error


def _run_id(folder: Path, name: str) -> str:
    """Return the id of the folder's run at a service, kept from an earlier start or made now."""
    path = folder / IDS
    try:
        ids = parse_json(read_regular(path, max_bytes=MAX_IDS_BYTES)) if path.exists() else {}
        if not isinstance(ids.get(name), str):
            ids[name] = secrets.token_hex(4)
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(ids) + "\n", sync=True)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: cannot be used ({cut(str(error))}); remove it to begin new runs at the trackers"
        ) from error
    run_id: str = ids[name]
    return run_id


class GuardedTracker:
    """A tracker that never ends a run: one that fails says so once and gets nothing more.

    It leaves out steps that an earlier start, or a part of the run that was rolled back, has sent already.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name = name
        self._tracker: Tracker | None = tracker
        self._first_step = 0

    def continue_after(self, step: int) -> None:
        """Send only what comes after a step that was already sent."""
        self._first_step = max(self._first_step, step + 1)

    def scalars(self, values: Mapping[str, float], *, step: int) -> None:
        self._try(step, lambda tracker: tracker.scalars(values, step=step))

    def images(self, name: str, pictures: Sequence[Picture], *, step: int) -> None:
        self._try(step, lambda tracker: tracker.images(name, pictures, step=step))

    def close(self) -> None:
        self._try(self._first_step, lambda tracker: tracker.close())
        self._tracker = None

    def _try(self, step: int, send: Callable[[Tracker], None]) -> None:
        if self._tracker is None or step < self._first_step:
            return
        try:
            send(self._tracker)
        except Exception as error:  # of whatever class the service's client has
            self._tracker = None
            why = " ".join(str(error).split())[:200]
            warn(f"tracker {self._name} has failed and gets nothing more: {type(error).__name__}: {why}")
