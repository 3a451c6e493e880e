"""The identity of a run: the fields that define it, and the differences between two runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ds_dpo.config.fields import FIELDS
from ds_dpo.config.names import RENAMED
from ds_dpo.config.optimization import DECAYING_SCHEDULES
from ds_dpo.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class Change:
    """An identity field with different values."""

    name: str
    old: object
    new: object

    def __str__(self) -> str:
        return f"{self.name}: {self.old} -> {self.new}"


def identity(config: RunConfig, precision: str) -> dict[str, object]:
    """Return the values that define this run, by dotted name, `precision` (fp32, bf16, fp16) included.

    schedule.decay_steps is the resolved number if the schedule decays. So a longer run with a constant schedule is the
    same run, and one with a linear schedule is another run unless decay_steps is set.
    """
    nested = config.model_dump(mode="json")
    flat: dict[str, object] = {}
    for path, spec in FIELDS.items():
        section, _, name = path.rpartition(".")
        holder = nested[section] if section else nested
        if spec.is_identity and name in holder:
            flat[path] = holder[name]
    if config.schedule.name in DECAYING_SCHEDULES:
        flat["schedule.decay_steps"] = config.schedule.decay_steps or config.max_train_steps
    flat["precision"] = precision
    return flat


def fingerprint(fields: Mapping[str, object]) -> str:
    """Return the SHA-256 of an identity, 64 hex digits, by which a checkpoint belongs to its run.

    A renamed field counts under its first name, so that a run goes on from the checkpoints of an earlier version.
    """
    first_names = {now: first for first, now in RENAMED.items()}
    named = {first_names.get(name, name): value for name, value in fields.items()}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def compare_identity(old: Mapping[str, object], new: Mapping[str, object]) -> list[Change]:
    """Return the fields in which two identities differ, in the order of the newer one."""
    names = [*new, *(name for name in old if name not in new)]
    return [
        Change(name=name, old=old.get(name, "(not set)"), new=new.get(name, "(not set)"))
        for name in names
        if old.get(name, "(not set)") != new.get(name, "(not set)")
    ]
