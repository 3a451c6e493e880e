#!/usr/bin/env python
"""Let a run over two hosts suffer everything that ends runs, and see that nothing is lost.

    python tests/cluster/fault_matrix.py [--only kills hosts] [--setups two] [--cases WORDS] [--page]
    python tests/cluster/fault_matrix.py --list

As root; it brings up a bench of its own (tests/cluster/bench) and takes half a minute a case on two quiet cores. What
has passed with the same commit is not played again, so that groups may be played at different times, or at the same
time with --work of their own: all results are kept in --results, and the last line is one JSON object of all of them:
`cases`, `passed`, `orphans`, and more. --page writes docs/fault_matrix.md from them. Logs, and the run folders of cases
that failed, stay in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fault_cases import GROUPS, SETUPS, cases
from fault_chain import Chain, Place, Result
from fault_moves import Case
from fault_page import NOTES, add_result, page, read_results, summary
from fault_processes import HostProcesses
from fault_start import CaseFailure
from two_hosts import ROOT, Bench

PAGE = ROOT / "docs" / "fault_matrix.md"
OWN_MOUNTS = "FAULT_MATRIX_OWN_MOUNTS"
SMALL_DISK_MIB = 200


def main() -> None:
    """Play what is asked for; the exit status tells whether all of it has passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=list(GROUPS), choices=list(GROUPS), help="Groups of cases (no case if empty)."
    )
    parser.add_argument("--cases", nargs="+", help="Only cases whose name has one of these words.")
    parser.add_argument(
        "--setups", nargs="+", default=list(SETUPS), choices=list(SETUPS), help="Only cases of these runs."
    )
    parser.add_argument("--again", action="store_true", help="Also repeat cases that have passed with this commit.")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "fault_matrix", help="Folder of runs and logs.")
    parser.add_argument("--results", type=Path, help="File of results (results.jsonl in --work if unset).")
    parser.add_argument("--page", action="store_true", help=f"Write {PAGE.relative_to(ROOT)}.")
    parser.add_argument("--list", action="store_true", help="Print the cases and exit.")
    arguments = parser.parse_args()
    every = cases()
    asked = [case for case in every.values() if case.group in arguments.only and case.setup in arguments.setups]
    asked = [case for case in asked if has_word(case, arguments.cases)]
    if arguments.list:
        print("\n".join(f"{case.group:12} {case.name}" for case in asked))
        return
    work = arguments.work.resolve()
    results = (arguments.results or work / "results.jsonl").resolve()
    commit, done = describe_commit(), read_results(results)
    if not arguments.again:
        asked = [case for case in asked if not is_done(done.get(case.name), commit)]
    if asked:
        take_own_mounts()
        play(asked, work=work, results=results, commit=commit)
    found = read_results(results)
    if arguments.page:
        notes = PAGE.read_text(encoding="utf-8").partition(NOTES)[2] if PAGE.exists() else "\n"
        PAGE.write_text(page(every, found, notes=notes), encoding="utf-8")
    total = summary(every, found)
    print(json.dumps(total), flush=True)
    sys.exit(0 if not total["failed"] else 1)


def has_word(case: Case, words: Sequence[str] | None) -> bool:
    return words is None or any(word in case.name for word in words)


def is_done(row: object, commit: str) -> bool:
    return isinstance(row, dict) and row["passed"] and row["commit"] == commit


def describe_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--match="]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def take_own_mounts() -> None:
    """Go on in a mount namespace of one's own: the small disk that is mounted for cases goes with the last process."""
    if OWN_MOUNTS not in os.environ:
        command = ["unshare", "--mount", sys.executable, *sys.argv]
        os.execvpe(command[0], command, {**os.environ, OWN_MOUNTS: "1"})


def play(asked: Sequence[Case], *, work: Path, results: Path, commit: str) -> None:
    """Play cases in the order of the table, each setup's on a run of its own; what was seen goes into results."""
    work.mkdir(parents=True, exist_ok=True)
    small_disk = work / "small_disk"
    small_disk.mkdir(exist_ok=True)
    # before the bench starts: its hosts see it, too
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m", "small_disk", str(small_disk)]
    subprocess.run(mount, check=True)
    bench = Bench(work / "bench")
    place = Place(bench=bench, processes=HostProcesses(bench), folder=work, small_disk=small_disk)
    try:
        place.restart_bench()
        for setup in dict.fromkeys(case.setup for case in asked):
            play_chain([case for case in asked if case.setup == setup], setup, place, results, commit)
    finally:
        bench.stop()


def play_chain(asked: Sequence[Case], setup: str, place: Place, results: Path, commit: str) -> None:
    chain = Chain(setup, SETUPS[setup], place, report=lambda result: add_result(results, result.to_json()))
    try:
        chain.prepare()
    except CaseFailure as failure:
        sys.exit(f"{setup}: no run to begin with: {failure}")
    for case in asked:
        result = Result(
            name=case.name,
            group=case.group,
            setup=setup,
            commit=commit,
            date=datetime.now(UTC).date().isoformat(),
            within=case.within,
            ranks_within=case.ranks_within,
        )
        began = time.monotonic()
        chain.play(case, result)
        took = time.monotonic() - began
        said = result.seen or f"gone after {result.seconds:.1f} s, status {result.status}, to go on from {result.saved}"
        print(f"{datetime.now(UTC):%H:%M:%S} {case.group}: {case.name}: {said} ({took:.0f} s)", flush=True)
    chain.finish()


if __name__ == "__main__":
    main()
