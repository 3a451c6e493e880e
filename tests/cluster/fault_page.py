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

`tests/cluster/fault_matrix.py`, started as root on two cores, trains the miniature in fp32 over two hosts of the bench
(tests/cluster/bench), with one or two ranks each. Every start is by `scripts/launch.py`. A run goes through case
after case, and each start goes on from what the case before has left. A case passes if all of these hold:

- Every process on every host is gone within the stated time after the last event of the case.
- The exit status is the documented one (docs/faults.md). It is 0 only if the run was asked to stop and has saved.
- The next start goes on from the newest checkpoint of which every byte is there. The script finds that checkpoint
  independently.
- Nothing is missing that was saved before, or that the launch reports as saved.
- The curve (loss, learning rate, pairs seen, gradient norm, margin, accuracy, beta) is bit-equal to that of a run to
  which nothing happened.

These hosts share a disk of one machine, so a host that has lost its network still reaches it. On a real cluster it
would lose the disk too.
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
        f"{total['cases']} of {len(cases)} cases were played and {total['passed']} passed, with {total['orphans']} "
        f"processes left behind; the slowest end took {total['slowest_seconds']} s. They were played on "
        f"{' and '.join(sorted({row['date'] for row in rows}))} with "
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
