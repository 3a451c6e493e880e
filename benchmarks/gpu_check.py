"""Try on one GPU what was never run on one: launches, exactness, speed, memory, checkpoints, hangs. Downloads nothing.

    python benchmarks/gpu_check.py --out gpu_check.jsonl
    python benchmarks/gpu_check.py --parts 3,4
    DS_ACCELERATOR=cpu python benchmarks/gpu_check.py --scale tiny

Needs a checkout, PYTHONPATH with what setup.py lists, and about 8 minutes of a GPU of 80 GB. Each part is a process of
its own with a time limit, at which it and its children are killed. Each prints one JSON line: part, name, status
(passed, failed, timed out), seconds, limit_seconds, failures, results. A result {"skipped": reason} was not tried. The
last line lists the parts by status; the exit status is 0 if all passed. docs/gpu_check.md says what each part answers.
--scale tiny does the same with small models, on a CPU too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_check_report import Report, Setup

TINY_FACTOR = 2.0  # a processor that others use too may take longer for a small model than a GPU for a large one


@dataclass(frozen=True, kw_only=True)
class Part:
    """A function of a module beside this one, named `check`. limit_seconds: of full scale."""

    name: str
    module: str
    limit_seconds: float


PARTS = {
    1: Part(name="runs", module="gpu_check_runs", limit_seconds=100),
    2: Part(name="drawing from a cache", module="gpu_check_cache", limit_seconds=40),
    3: Part(name="exactness and speed", module="gpu_check_step", limit_seconds=130),
    4: Part(name="reference on the host", module="gpu_check_offload", limit_seconds=50),
    5: Part(name="checkpoints", module="gpu_check_saving", limit_seconds=80),
    6: Part(name="optimizers", module="gpu_check_optimizers", limit_seconds=50),
    7: Part(name="hangs and devices", module="gpu_check_supervision", limit_seconds=80),
    8: Part(name="encoders and settings", module="gpu_check_vae", limit_seconds=40),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do the parts one after another; returns the exit status."""
    arguments = _parse(argv)
    folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    out = arguments.out.open("w", encoding="utf-8") if arguments.out else None
    by_status: dict[str, list[int]] = {"passed": [], "failed": [], "timed out": []}
    try:
        if _forks() and len(arguments.parts) > 1:
            _import_libraries()
        for number in arguments.parts:
            line = _do(number, arguments.scale, folder / str(number), limit=arguments.limit)
            by_status[str(line["status"])].append(number)
            _print(line, out)
        _print({"scale": arguments.scale, "on": _machine(), **by_status}, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if out is not None:
            out.close()
    return 0 if by_status["passed"] == arguments.parts else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_numbers, default=list(PARTS), metavar="N,...", help="Parts to do (all).")
    parser.add_argument("--scale", choices=["tiny", "full"], default="full", help="Sizes of the models (full).")
    parser.add_argument("--out", type=Path, metavar="FILE", help="Also write the lines to this file.")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="Time limit of each part instead of its own.")
    arguments = parser.parse_args(argv)
    if arguments.scale == "full" and _forks():
        parser.error("--scale full needs a GPU, and DS_ACCELERATOR=cpu is set; give --scale tiny")
    return arguments


def _numbers(text: str) -> list[int]:
    numbers = [int(word) for word in text.split(",")]
    unknown = [number for number in numbers if number not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]}; the parts are 1 to {max(PARTS)}")
    return numbers


def _forks() -> bool:
    """Whether parts are forked from this process, which spares imports; CUDA would not work in them."""
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def _import_libraries() -> None:
    from ds_dpo.process.quiet import quiet_libraries

    quiet_libraries()
    importlib.import_module("ds_dpo.training.assembly")


def _do(number: int, scale: str, folder: Path, *, limit: float | None) -> dict[str, object]:
    """Do a part in a process of its own; returns its line."""
    part = PARTS[number]
    folder.mkdir(parents=True)
    limit = limit or part.limit_seconds * (TINY_FACTOR if scale == "tiny" else 1)
    process = get_context("fork" if _forks() else "spawn").Process(
        target=_in_process, args=(part.module, scale, folder)
    )
    began = time.perf_counter()
    process.start()
    process.join(limit)
    seconds = time.perf_counter() - began
    is_late = process.is_alive()
    _kill_group(process.pid)  # what it started goes with it, also if it ended by itself
    process.join()
    found = Report.read(folder)
    failures = list(found["failures"])
    if is_late:
        failures.append(f"it was killed at its limit of {limit:g} s")
    elif process.exitcode != 0:
        failures.append(f"it ended with status {process.exitcode}: {_end_of_log(folder)}")
    return {
        "part": number,
        "name": part.name,
        "status": "timed out" if is_late else "failed" if failures else "passed",
        "seconds": round(seconds, 1),
        "limit_seconds": limit,
        "failures": failures,
        "results": found["results"],
    }


def _in_process(module: str, scale: str, folder: Path) -> None:
    """Run a part in this fresh process, as the leader of a group, with its output in a file; never returns."""
    os.setsid()
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        importlib.import_module(module).check(Setup.of(scale, folder), Report(folder))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the threads of discarded engines may abort an orderly end


def _kill_group(leader: int | None) -> None:
    try:
        os.killpg(leader or 0, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:  # only zombies are left of it
        pass


def _end_of_log(folder: Path) -> str:
    log = folder / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return " | ".join(lines[-3:])[-600:]


def _machine() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "deepspeed", "diffusers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _print(line: dict[str, object], out: TextIO | None) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        out.write(f"{text}\n")
        out.flush()


if __name__ == "__main__":
    sys.exit(main())
