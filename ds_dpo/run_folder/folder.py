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

from ds_dpo.config.identity import compare_identity, identity
from ds_dpo.config.load import config_from_yaml, config_to_yaml
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError
from ds_dpo.storage.replace import remove_partials, replace_file

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "datasets", "safetensors", "xformers", "ds_dpo")


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
    def stop_file(self) -> Path:
        return self.path / "STOP"

    def require_same_run(self, config: RunConfig, *, precision: str) -> list[str]:
        """Compare with the saved configuration. Returns the changes that are allowed, a line each; [] for a new folder.

        Raises ConfigError with old and new values if the saved run is another one.
        """
        if not self.config.exists():
            return []
        saved = config_from_yaml(self.config)
        settings = json.loads(self.deepspeed.read_text(encoding="utf-8"))
        changes = compare_identity(identity(saved, precision_of(settings)), identity(config, precision))
        if changes:
            listed = "\n  ".join(str(change) for change in changes)
            raise ConfigError(
                f"{self.path} holds another run, which differs in\n  {listed}\n"
                "set these back to continue that run, or give another output_dir"
            )
        old, new = flatten(saved.model_dump()), flatten(config.model_dump())
        return [
            f"changed since the last start: {name} {old.get(name)!r} -> {new[name]!r}"
            for name in new
            if old.get(name) != new[name]
        ]

    def write_start(
        self, config: RunConfig, settings: Mapping[str, Any], *, world_size: int, data: Mapping[str, int]
    ) -> None:
        """Save the configuration and environment of this start; each file is replaced as a whole.

        data: counts of the dataset by name, such as rows, ties and pairs. Raises ConfigError.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_partials(self.path)
            replace_file(self.deepspeed, json.dumps(settings, indent=2) + "\n", sync=True)
            starts = json.loads(self.environment.read_text(encoding="utf-8")) if self.environment.exists() else []
            starts.append({**describe_environment(world_size), "data": dict(data)})
            replace_file(self.environment, json.dumps(starts, indent=2) + "\n", sync=True)
            # written last: if this file exists, the others do too, even after a kill
            replace_file(self.config, config_to_yaml(config), sync=True)
        except OSError as error:
            raise ConfigError(f"output_dir {str(self.path)!r} cannot be written: {error.strerror}") from error


def precision_of(settings: Mapping[str, Any]) -> str:
    """Return fp32, bf16 or fp16, from complete DeepSpeed settings."""
    return next((name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled")), "fp32")


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
