"""The folder of all rounds: its paths, what it was begun with, and the record of finished rounds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.config.documents import read_json
from ds_dpo.errors import ConfigError, shown
from ds_dpo.export.destination import RECORD_NAME as EXPORT_RECORD_NAME
from ds_dpo.feedback.pairs.names import PAIRS_NAME, RECORD_NAME
from ds_dpo.storage.manifest import newest_valid_checkpoint, step_of
from ds_dpo.storage.replace import replace_file

FORMAT = 1
PARTS = ("pairs", "scores", "side_effects", "over_base", "over_last")  # of a round in rounds.json
BASE = "base"
SETTINGS_NAME, ROUNDS_NAME, SUMMARY_NAME = "settings.json", "rounds.json", "summary.md"


@dataclass(frozen=True)
class RoundFolder:
    """What a round leaves, below the folder of all rounds. number: from 1."""

    path: Path
    number: int

    @property
    def pairs(self) -> Path:
        """The folder in which images are drawn, scored and made into pairs."""
        return self.path / "pairs"

    @property
    def pairs_file(self) -> Path:
        return self.pairs / PAIRS_NAME

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def model(self) -> Path:
        """The exported pipeline of the run."""
        return self.path / "model"

    @property
    def label(self) -> str:
        """The name of the round's model in the evaluation."""
        return label_of(self.number)

    def pairs_record(self) -> Mapping[str, Any] | None:
        """Return what pairs.json says of the pairs, which is written last; None before. Raises ConfigError."""
        path = self.pairs / RECORD_NAME
        return read_json(path, dict) if path.is_file() and self.pairs_file.is_file() else None

    def trained_steps(self) -> int:
        """Return the step of the run's newest whole checkpoint, 0 without one."""
        newest, _ = newest_valid_checkpoint(self.run / "checkpoints", checksums=False)
        return 0 if newest is None else step_of(newest) or 0

    def is_exported(self) -> bool:
        """Return whether the run's model is exported."""
        return (self.model / EXPORT_RECORD_NAME).is_file()


def label_of(number: int) -> str:
    """Return the name of a round's model in the evaluation; 0 is the first model."""
    return BASE if number == 0 else f"round_{number:02d}"


@dataclass(frozen=True)
class RoundsFolder:
    """The folder of all rounds."""

    path: Path

    @property
    def evaluation(self) -> Path:
        """The evaluation of the models of all rounds."""
        return self.path / "evaluation"

    def round(self, number: int) -> RoundFolder:
        """Return the folder of a round, from 1."""
        return RoundFolder(self.path / label_of(number), number)

    def require_same(self, settings: Mapping[str, Any]) -> None:
        """Compare with the settings that the folder was begun with, or write them.

        Raises ConfigError that names each field with its old and new value.
        """
        path = self.path / SETTINGS_NAME
        now = json.loads(json.dumps(settings))
        if not path.is_file():
            self._write(path, json.dumps(now, indent=1) + "\n")
            return
        old = read_json(path, dict)
        # a field that an earlier version did not know had its default
        changed = [name for name in now if name in old and old[name] != now[name]]
        changed += [name for name in old if name not in now]
        if changed:
            listed = "\n  ".join(f"{name}: {shown(old[name])} -> {shown(now.get(name))}" for name in changed)
            raise ConfigError(
                f"output_dir {self.path} holds other rounds, which differ in\n  {listed}\n"
                "set these back to go on, or give another output_dir"
            )

    def read_record(self) -> dict[str, Any] | None:
        """Return what rounds.json holds; None without it. Raises ConfigError for a file that is damaged."""
        path = self.path / ROUNDS_NAME
        if not path.is_file():
            return None
        record = read_json(path, dict)
        rounds = record.get("rounds")
        if record.get("format") != FORMAT or not isinstance(rounds, list) or not all(map(_is_round, rounds)):
            raise ConfigError(f"{path} is not the record of rounds; restore it, or give another output_dir")
        return record

    def write_record(self, record: Mapping[str, Any], summary: str) -> None:
        """Replace summary.md and rounds.json. Raises ConfigError if they cannot be written."""
        self._write(self.path / SUMMARY_NAME, summary)
        self._write(self.path / ROUNDS_NAME, json.dumps({"format": FORMAT, **record}, indent=1) + "\n")

    def _write(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text, sync=True)
        except OSError as error:
            raise ConfigError(f"output_dir {path.parent} cannot be written: {error.strerror}") from error


def _is_round(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("round"), int):
        return False
    fell = value.get("fell", 0)
    return (fell is None or isinstance(fell, str)) and all(isinstance(value.get(name), dict) for name in PARTS)
