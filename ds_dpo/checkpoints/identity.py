"""What a checkpoint belongs to: a run, and the ranks and ZeRO stage that it is cut for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_dpo.config.identity import (
    Change,
    compare_identity,
    compare_saved_identity,
    fingerprint,
    fingerprints,
    identity,
)
from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import ResolvedDeepSpeed
from ds_dpo.errors import CheckpointError
from ds_dpo.storage.manifest import Manifest

CONFIG = "config"
NUM_DIGITS = 12  # of a fingerprint, in messages


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a checkpoint belongs to. world_size, stage: how its shards were cut.

    fingerprint: hash of config. config: the run's identity by dotted name. accepted: names in it that this start may
    change. contents: fingerprints of what the configuration only names, by kind (models ...) and name.
    """

    world_size: int
    stage: int
    precision: str
    fingerprint: str
    config: Mapping[str, Any] = field(default_factory=dict)
    accepted: Collection[str] = ()
    contents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def as_saved(self) -> dict[str, dict[str, Any]]:
        """Return what a manifest holds of the run besides the fingerprint."""
        return {CONFIG: dict(self.config), **{kind: dict(named) for kind, named in self.contents.items()}}

    def fingerprints(self) -> set[str]:
        """Return the fingerprint, and those that earlier versions gave to this run."""
        return {self.fingerprint, *fingerprints(self.config)}

    def require_own(self, folder: Path, found: Manifest) -> None:
        """Raise CheckpointError, naming what differs as far as it is known, if a checkpoint is another run's."""
        if found.precision != self.precision:
            raise CheckpointError(
                f"{folder} was saved in precision {found.precision}, but this start uses {self.precision}; continue in "
                f"{found.precision}"
            )
        changes = [*self._changes_of_config(folder, found), *self._changes_of_contents(found)]
        if changes:
            listed = "; ".join(map(str, changes))
            raise CheckpointError(f"{folder} belongs to another run, which differs in {listed} (there -> here)")

    def _changes_of_config(self, folder: Path, found: Manifest) -> list[Change]:
        saved = (found.run or {}).get(CONFIG)
        if not saved:
            if found.fingerprint in self.fingerprints():
                return []
        elif found.fingerprint == fingerprint(saved):
            changes = compare_saved_identity(saved, self.config)
            return [change for change in changes if change.name not in self.accepted]
        raise CheckpointError(
            f"{folder} belongs to another run: its fingerprint is {found.fingerprint[:NUM_DIGITS]!r}, and this run's "
            f"is {self.fingerprint[:NUM_DIGITS]!r}"
        )

    def _changes_of_contents(self, found: Manifest) -> list[Change]:
        """Compare what both name: another version, or a run with a cache, may name less."""
        changes: list[Change] = []
        for kind, own in self.contents.items():
            saved = (found.run or {}).get(kind, {})
            both = own.keys() & saved.keys()
            old, new = ({f"{kind}.{name}": values[name] for name in own if name in both} for values in (saved, own))
            changes += compare_identity(old, new)
        return changes


def identity_of(
    config: RunConfig,
    resolved: ResolvedDeepSpeed,
    *,
    accepted: Collection[str] = (),
    contents: Mapping[str, Mapping[str, str]] | None = None,
) -> RunIdentity:
    """Return what a run's checkpoints belong to. accepted, contents: see RunIdentity."""
    fields = identity(config, resolved.precision)
    return RunIdentity(
        world_size=resolved.world_size,
        stage=resolved.stage,
        precision=resolved.precision,
        fingerprint=fingerprint(fields),
        config=fields,
        accepted=accepted,
        contents=contents or {},
    )


def none_usable(checkpoints: Path, reasons: Sequence[str]) -> CheckpointError:
    """Return the error of a folder in which no checkpoint can be used. reasons: of each, the newest first."""
    return CheckpointError(f"no checkpoint in {checkpoints} can be used: " + "; ".join(reasons))
