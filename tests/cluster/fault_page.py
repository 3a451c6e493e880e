"""The results of the fault matrix: kept in a file, put together from several runs, and shown as a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fault_cases import GROUPS
from fault_moves import Case

Row = Mapping[str, Any]
INTRODUCTION = """\
# What happens when things fail: the fault matrix

`tests/cluster/fault_matrix.py`, started as root on two cores: the miniature in fp32 over two hosts of the bench
(tests/cluster/bench), one or two ranks each, every start by `scripts/launch.py`. A run suffers case after case, and
each start goes on from what the case before has left. A case passes where

- every process on every host is gone within the stated time after the last thing that was done to it,
- the exit status is the documented one (docs/faults.md), and not 0 unless the run was asked to stop and saved,
- the next start goes on from the newest checkpoint of which every byte is there, which the script finds out itself,
- nothing that was saved before, or that the launch says to have saved, is missing after it,
- and the curve (loss, learning rate, pairs seen, gradient norm, margin, accuracy, beta) is bit-equal to that of a run
  to which nothing happened.

What these hosts cannot show: the disk that they share is this machine's own, so that a lost network leaves it in reach.
"""


NOTES = "## Notes"


def read_results(path: Path) -> dict[str, Row]:
    """Return the last result of each case by name; {} where there is no file.

    One that was broken off, before a start could show what it had left, does not replace an earlier one.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results: dict[str, Row] = {}
    for row in map(json.loads, lines):
        is_broken_off = row["resumed"] is None and not row["seen"]
        if not is_broken_off or row["name"] not in results:
            results[row["name"]] = row
    return results


def add_result(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def summary(cases: Iterable[str], results: Mapping[str, Row]) -> dict[str, object]:
    """Return what the last line says, of the cases of the table that were played."""
    rows = [results[name] for name in cases if name in results]
    return {
        "cases": len(rows),
        "passed": sum(row["passed"] for row in rows),
        "orphans": sum(row["orphans"] for row in rows),
        "slowest_seconds": round(max((row["seconds"] or 0.0 for row in rows), default=0.0), 1),
        "commits": sorted({row["commit"] for row in rows}),
        "failed": [row["name"] for row in rows if not row["passed"]],
        "not_played": [name for name in cases if name not in results],
    }


def page(cases: Mapping[str, Case], results: Mapping[str, Row], *, notes: str = "\n") -> str:
    """Return docs/fault_matrix.md. notes: its last section, which people write."""
    rows = [results[name] for name in cases if name in results]
    total = summary(cases, results)
    commits = Counter(row["commit"] for row in rows).most_common()
    lines = [
        INTRODUCTION,
        f"{total['cases']} of {len(cases)} cases were played, {total['passed']} passed, "
        f"{total['orphans']} orphans; the slowest end took "
        f"{total['slowest_seconds']} s. Played on {' and '.join(sorted({row['date'] for row in rows}))} with "
        f"{', '.join(f'{commit} ({number} cases)' for commit, number in commits)}.",
        "",
    ]
    for group, make in GROUPS.items():
        done = [row for row in rows if row["group"] == group]
        if done:
            lines += [f"## {group}", "", (make.__doc__ or "").strip(), "", *table(done), ""]
    failed = [row for row in rows if not row["passed"]]
    if failed:
        lines += ["## What was seen where a case failed", ""]
        lines += [f"- {row['name']}: {reason(row)}" for row in failed]
        lines.append("")
    return "\n".join(lines) + f"\n{NOTES}{notes}"


def reason(row: Row) -> str:
    """Say why a case has not passed."""
    if row["seen"]:
        return str(row["seen"])
    if row["resumed"] is None:
        return "broken off before the next start"
    return f"the next start went on from step {row['resumed']}, expected {row['saved']}; see the notes, if any"


def table(rows: Sequence[Row]) -> list[str]:
    """Return the table of a group."""
    lines = [
        "| case | all gone after | stated | status | resumed from step | curve equal | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f} s"
        if row.get("ranks_within") and row["ranks_seconds"] is not None:  # it may have failed before
            seconds += f", ranks {row['ranks_seconds']:.1f} s"
        cells = [
            row["name"],
            seconds,
            f"{row['within']:g} s",
            "" if row["status"] is None else row["status"],
            "" if row["resumed"] is None else row["resumed"],
            {True: "yes", False: "no", None: ""}[row["is_curve_equal"]],
            "" if row["passed"] else "FAILED",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines
