"""The folder of a run: its fixed shape, the run's identity, and what each start was made with."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_dpo.config.documents import read_json
from ds_dpo.config.identity import compare_identity, identity, way_to_a_longer_run
from ds_dpo.config.load import config_from_yaml, config_to_yaml
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError, shown
from ds_dpo.precision import Precision
from ds_dpo.run_folder.data_set import DataSet
from ds_dpo.storage.manifest import checkpoint_folders
from ds_dpo.storage.replace import remove_partials, replace_file

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "datasets", "safetensors", "xformers", "ds_dpo")
RESTORE = "restore the file that the run was started with, or give another output_dir"
MOVE_AWAY = "move it away: it lists the starts of the run, and the next start writes a new one"


@dataclass(frozen=True)
class RunFolder:
    """Paths inside runs/NAME; the same for every run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def deepspeed(self) -> Path:
        return self.path / "deepspeed.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def held_out(self) -> Path:
        return self.path / "evaluation" / "held_out.jsonl"

    @property
    def validation(self) -> Path:
        return self.path / "evaluation" / "validation.jsonl"

    @property
    def stop_file(self) -> Path:
        return self.path / "STOP"

    def saved_config(self) -> RunConfig:
        """Read config.yaml. Raises ConfigError."""
        try:
            return config_from_yaml(self.config)
        except ConfigError as error:
            raise ConfigError(f"{error}; {RESTORE}") from None

    def saved_settings(self) -> dict[str, Any]:
        """Read the complete DeepSpeed dict of deepspeed.json. Raises ConfigError."""
        settings = read_json(self.deepspeed, dict, advice=RESTORE)
        for name in ("bf16", "fp16", "zero_optimization"):
            if not isinstance(settings.get(name, {}), dict):
                raise ConfigError(
                    f"{self.deepspeed}: {name} must contain names and values, not {shown(settings[name])}; {RESTORE}"
                )
        return settings

    def saved_starts(self) -> list[dict[str, Any]]:
        """Read what environment.json holds of each start, the oldest first; [] without the file. Raises ConfigError."""
        if not self.environment.exists():
            return []
        starts = read_json(self.environment, list, advice=MOVE_AWAY)
        for start in starts:
            if not isinstance(start, dict):
                raise ConfigError(
                    f"{self.environment}: a start must contain names and values, not {shown(start)}; {MOVE_AWAY}"
                )
        return starts

    def newest_start(self) -> dict[str, Any]:
        """Read what environment.json holds of the newest start; {} without one. Raises ConfigError."""
        starts = self.saved_starts()
        return starts[-1] if starts else {}

    def require_same_run(self, config: RunConfig, *, precision: str) -> list[str]:
        """Compare with the saved configuration. Returns the changes that are allowed, a line each; [] for a new folder.

        Raises ConfigError with old and new values if the saved run is another one, and if a saved file is damaged.
        """
        if not self.config.exists():
            return []
        self.saved_starts()  # a start could not be added to a torn file: refused here, before models are loaded
        saved = self.saved_config()
        old_fields, new_fields = identity(saved, precision_of(self.saved_settings())), identity(config, precision)
        accepted = self.accepted_changes(config)
        changes = [change for change in compare_identity(old_fields, new_fields) if change.name not in accepted]
        if changes:
            listed = "\n  ".join(str(change) for change in changes)
            raise ConfigError(
                f"{self.path} holds another run, which differs in\n  {listed}\n"
                f"set these back to continue that run, or give another output_dir{way_to_a_longer_run(changes, config)}"
            )
        old, new = flatten(saved.model_dump()), flatten(config.model_dump())
        return [
            f"changed since the last start: {name} {old.get(name)!r} -> {new[name]!r}"
            for name in new
            if old.get(name) != new[name]
        ]

    def require_same_data(self, config: RunConfig, data: DataSet) -> None:
        """Raise ConfigError, naming what differs, if the run's checkpoints were trained on another data set."""
        start = self.newest_start() if checkpoint_folders(self.checkpoints) else {}
        changes = data.changes_since(start)
        if not changes:
            return
        listed = "\n  ".join(map(str, changes))
        commit = start.get("data_commit")
        advice = "" if commit in (None, data.commit) else f" (data.revision {commit} names what it was trained on)"
        raise ConfigError(
            f"{self.path} was trained on another data set than data.dataset {config.data.dataset}, split "
            f"{config.data.split}, holds now:\n  {listed}\nrestore it{advice}, or give another output_dir"
        )

    def accepted_changes(self, config: RunConfig) -> list[str]:
        """Return the names of identity fields that a start may change without making another run.

        A revision that is the commit which the run got from the hub anyway names the same files. Raises ConfigError.
        """
        if not self.config.exists():
            return []
        commits = {
            "model.revision": (config.model.revision, self.saved_models("commits").get("model.pretrained")),
            "data.revision": (config.data.revision, self.newest_start().get("data_commit")),
        }
        return [name for name, (asked, recorded) in commits.items() if asked is not None and asked == recorded]

    def saved_models(self, kind: str) -> dict[str, str]:
        """Return what the starts recorded of the models, newer ones over older ones. kind: hashes or commits.

        Raises ConfigError.
        """
        found: dict[str, str] = {}
        for start in self.saved_starts() if self.config.exists() else ():
            models = start.get("models")
            named = models.get(kind) if isinstance(models, dict) else None
            found |= {name: str(value) for name, value in named.items()} if isinstance(named, dict) else {}
        return found

    def write_start(
        self,
        config: RunConfig,
        settings: Mapping[str, Any],
        *,
        world_size: int,
        data: Mapping[str, Any],
        device: str = "cpu",
        models: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Save the configuration and environment of this start; each file is replaced as a whole.

        data: of the data set, as DataSet.as_saved returns it. device: that of rank 0, in words.
        models: their hashes and commits, see saved_models. Raises ConfigError.
        """
        starts = self.saved_starts()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_partials(self.path)
            replace_file(self.deepspeed, json.dumps(settings, indent=2) + "\n", sync=True)
            start = {**describe_environment(world_size), "device": device, **data}
            starts = [*starts, start if models is None else {**start, "models": models}]
            replace_file(self.environment, json.dumps(starts, indent=2) + "\n", sync=True)
            # written last: if this file exists, the others do too, even after a kill
            replace_file(self.config, config_to_yaml(config), sync=True)
        except OSError as error:
            raise ConfigError(f"output_dir {str(self.path)!r} cannot be written: {error.strerror}") from error


def precision_of(settings: Mapping[str, Any]) -> Precision:
    """Return fp32, bf16 or fp16, from complete DeepSpeed settings."""
    halves: tuple[Precision, ...] = ("bf16", "fp16")
    return next((name for name in halves if settings.get(name, {}).get("enabled")), "fp32")


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections under dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{name}.")
        else:
            flat[prefix + name] = inner
    return flat


def describe_environment(world_size: int) -> dict[str, Any]:
    """Return versions, host and code of a start. No environment variable is recorded, because some hold secrets."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "world_size": world_size,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the running code, None if it is not a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
