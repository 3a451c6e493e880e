"""The data set of a run, as environment.json records it: a run resumes only on the pairs that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_dpo.config.identity import Change, compare_identity

# parts of a data set's fingerprint, see ds_dpo/data/source.py, in words
PARTS = {
    "content": "files, by names and sizes or by their text",
    "columns": "columns",
    "pair_ids": "ids of pairs",
    "pairs": "chosen pairs and their winners",
    "buckets": "aspect buckets",
}
# counts that decide the order; how others are counted may change with the version
COUNTS = ("rows", "ties", "pairs")


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What a start reads. counts: rows, pairs and so on. fingerprint: by part. commit: of the hub, None for others."""

    counts: Mapping[str, int]
    fingerprint: Mapping[str, str]
    commit: str | None = None

    def as_saved(self) -> dict[str, Any]:
        """Return what environment.json holds of the data set."""
        commit = {} if self.commit is None else {"data_commit": self.commit}
        return {"data": dict(self.counts), "data_fingerprint": dict(self.fingerprint), **commit}

    def changes_since(self, start: Mapping[str, Any]) -> list[Change]:
        """Return in what the data set differs from that of an earlier start; an earlier version recorded only counts.

        The order of pairs is a formula of their number, so another number of them gives other steps.
        """
        counts = _differences(start.get("data"), {name: self.counts[name] for name in COUNTS if name in self.counts})
        parts = _differences(start.get("data_fingerprint"), self.fingerprint)
        return counts + [Change(name=PARTS.get(part.name, part.name), old=part.old, new=part.new) for part in parts]


def _differences(saved: object, now: Mapping[str, Any]) -> list[Change]:
    """Return the differences in what both name."""
    if not isinstance(saved, Mapping):
        return []
    both = [name for name in now if name in saved]
    return compare_identity({name: saved[name] for name in both}, {name: now[name] for name in both})
