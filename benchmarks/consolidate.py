"""Compare this project's conversion of ZeRO shards with DeepSpeed's: time, memory, and the outputs bit for bit.

Usage: python benchmarks/consolidate.py [--stages 3 2] [--ranks 8] [--rounds 3] [--scale 1.0] [--folder /tmp/...]
       python benchmarks/consolidate.py --growth --scale 0.5      how the time grows with bytes and ranks, ours alone

For each stage a checkpoint of SDXL's UNet with seeded values is written in DeepSpeed's format (see zero_files.py for
what it leaves out), each converter runs in turn in its own process with the input in the page cache, once more
with the output synced to the disk, and the checkpoint is removed. Needs 26 GB of disk, and of memory what DeepSpeed's
takes: 16 GB. The last line is one JSON object, ours over theirs: the worst stage's median ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from zero_files import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
OURS = "ours"
THEIRS = "theirs"
SAMPLE_SECONDS = 0.01
MEGABYTE = 10**6
THEIR_PROGRAM = """
import sys, torch
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict
convert_zero_checkpoint_to_state_dict(sys.argv[1], sys.argv[2], dtype=torch.float16, safe_serialization=True)
"""


@dataclass(frozen=True)
class Cost:
    """Wall and processor seconds of a process, and its peaks of anonymous and of all resident memory in MB."""

    wall_seconds: float
    cpu_seconds: float
    anonymous_mb: float
    resident_mb: float


def command_of(converter: str, checkpoint: Path, out: Path) -> list[str]:
    """The program that converts as a user would, to fp16 safetensors."""
    if converter == OURS:
        return [sys.executable, str(ROOT / "scripts" / "consolidate.py"), str(checkpoint), str(out)]
    return [sys.executable, "-c", THEIR_PROGRAM, str(checkpoint), str(out)]


def measure(converter: str, checkpoint: Path, out: Path, *, sync: bool, num_threads: int | None) -> Cost:
    """Convert once into a folder that is not there yet; sync: the time includes that the files reach the disk.

    num_threads: of torch, for both converters alike; None leaves that to torch, as users do.
    """
    warm_up(checkpoint)
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", **threads}
    started = time.perf_counter()
    process = subprocess.Popen(
        command_of(converter, checkpoint, out),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peaks = {"RssAnon": 0, "VmHWM": 0}
    sampler = threading.Thread(target=sample_peaks, args=(process.pid, peaks))
    sampler.start()
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    sampler.join()
    if process.returncode != 0:
        raise SystemExit(f"{converter} failed:\n{said[-3000:]}")
    if sync:
        sync_files(out)
    return Cost(
        wall_seconds=time.perf_counter() - started,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        anonymous_mb=peaks["RssAnon"] * 1024 / MEGABYTE,
        resident_mb=peaks["VmHWM"] * 1024 / MEGABYTE,
    )


def warm_up(folder: Path) -> None:
    """Have the input in the page cache, and the disk at rest."""
    os.sync()
    for path in folder.rglob("*.pt"):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def sample_peaks(pid: int, peaks: dict[str, int]) -> None:
    """Raise the peaks, in KiB, to what /proc says of the process until it ends."""
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        found = {name: re.search(rf"{name}:\s+(\d+) kB", status) for name in peaks}
        if not all(found.values()):  # it has ended and waits for its status to be read
            return
        for name, match in found.items():
            peaks[name] = max(peaks[name], int(match[1]) if match else 0)
        time.sleep(SAMPLE_SECONDS)


def sync_files(folder: Path) -> None:
    """Wait until a folder's files are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def count_unequal(ours: Path, theirs: Path) -> int:
    """Tensors that one output lacks, or whose shape, dtype or bits differ."""
    mine, yours = tensor_files(ours), tensor_files(theirs)
    handles = {path: safe_open(path, framework="pt") for path in {*mine.values(), *yours.values()}}
    unequal = len(mine.keys() ^ yours.keys())
    for name in mine.keys() & yours.keys():
        a, b = handles[mine[name]].get_tensor(name), handles[yours[name]].get_tensor(name)
        unequal += a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(torch.int16), b.view(torch.int16))
    return unequal


def compare_stage(stage: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write a checkpoint, convert it with both in turn, and remove it."""
    checkpoint = folder / f"zero{stage}"
    num_elements = write_checkpoint(
        checkpoint, stage=stage, num_ranks=options.ranks, scale=options.scale, with_module=not options.no_module
    )
    need_memory(6 * num_elements)  # what DeepSpeed's converter takes beside the page cache
    costs: dict[str, list[Cost]] = {OURS: [], THEIRS: []}
    synced: dict[str, Cost] = {}
    unequal = 0
    for turn in range(options.rounds + 1):
        is_last = turn == options.rounds
        for converter in (OURS, THEIRS):
            need_memory(6 * num_elements)
            cost = measure(converter, checkpoint, folder / converter, sync=is_last, num_threads=options.threads)
            print(f"ZeRO-{stage} {describe(converter, cost)}{'  synced' if is_last else ''}", flush=True)
            if is_last:
                synced[converter] = cost
            else:
                costs[converter].append(cost)
        if turn == 0:
            unequal = count_unequal(folder / OURS, folder / THEIRS)
        for converter in (OURS, THEIRS):
            shutil.rmtree(folder / converter)
    shutil.rmtree(checkpoint)
    ours, theirs = (middle(costs[converter]) for converter in (OURS, THEIRS))
    return {
        "stage": stage,
        "ranks": options.ranks,
        "elements": num_elements,
        "wall_ratio": round(ours.wall_seconds / theirs.wall_seconds, 3),
        "cpu_ratio": round(ours.cpu_seconds / theirs.cpu_seconds, 3),
        "synced_wall_ratio": round(synced[OURS].wall_seconds / synced[THEIRS].wall_seconds, 3),
        "unequal_tensors": unequal,
        "ours": rounded(ours),
        "theirs": rounded(theirs),
        "ours_synced": rounded(synced[OURS]),
        "theirs_synced": rounded(synced[THEIRS]),
    }


def need_memory(num_bytes: int) -> None:
    """Stop rather than push other programs out of memory."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available = int(match[1]) * 1024 if match else 0
    if available < num_bytes:
        raise SystemExit(f"{available / 1e9:.1f} GB of memory available, DeepSpeed's needs {num_bytes / 1e9:.1f} GB")


def middle(costs: Sequence[Cost]) -> Cost:
    """Median of the times, highest of the peaks."""
    return Cost(
        wall_seconds=statistics.median(cost.wall_seconds for cost in costs),
        cpu_seconds=statistics.median(cost.cpu_seconds for cost in costs),
        anonymous_mb=max(cost.anonymous_mb for cost in costs),
        resident_mb=max(cost.resident_mb for cost in costs),
    )


def rounded(cost: Cost) -> Mapping[str, float]:
    """The cost as numbers that are worth printing."""
    return {name: round(value, 2) for name, value in asdict(cost).items()}


def describe(converter: str, cost: Cost) -> str:
    """A line of the table."""
    return (
        f"{converter:6}  wall {cost.wall_seconds:6.1f} s  cpu {cost.cpu_seconds:6.1f} s  "
        f"anonymous {cost.anonymous_mb:7.0f} MB  resident {cost.resident_mb:7.0f} MB"
    )


def grow(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Time of ours by size, at the ranks asked for, and by ranks, at the largest size; medians."""
    cases = [(options.ranks, options.scale * part) for part in (0.5, 0.75)]
    cases += [(ranks, options.scale) for ranks in sorted({1, 8, 64, options.ranks})]
    rows = []
    for stage in options.stages:
        for ranks, scale in cases:
            checkpoint = folder / "growth"
            num_elements = write_checkpoint(checkpoint, stage=stage, num_ranks=ranks, scale=scale)
            costs = []
            for _ in range(options.rounds):
                costs.append(measure(OURS, checkpoint, folder / OURS, sync=False, num_threads=options.threads))
                shutil.rmtree(folder / OURS)
            shutil.rmtree(checkpoint)
            cost = middle(costs)
            print(f"ZeRO-{stage} {ranks:2} ranks {num_elements / 1e6:6.0f} M  {describe(OURS, cost)}", flush=True)
            rows.append({"stage": stage, "ranks": ranks, "elements": num_elements, **rounded(cost)})
    return {"growth": rows}


def summarise(stages: Iterable[Mapping[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The worst of the stages, and the details."""
    details = list(stages)
    return {
        "wall_ratio": max(detail["wall_ratio"] for detail in details),
        "cpu_ratio": max(detail["cpu_ratio"] for detail in details),
        "anonymous_mb": max(detail["ours"]["anonymous_mb"] for detail in details),
        "bit_equal": all(detail["unequal_tensors"] == 0 for detail in details),
        "with_module": not options.no_module,
        "threads": options.threads or "default",
        "load_average": os.getloadavg()[1],
        "processors": os.cpu_count(),
        "stages": details,
    }


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=(2, 3), default=[3, 2], help="ZeRO stages.")
    parser.add_argument("--ranks", type=int, default=8, help="Number of ranks that saved.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds of each converter, besides the synced one.")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS for both (default: not set, as for users).")
    parser.add_argument("--scale", type=float, default=1.0, help="Factor of the UNet's widths.")
    parser.add_argument("--folder", type=Path, help="Folder for checkpoints and outputs (default: a temporary folder).")
    parser.add_argument("--no_module", action="store_true", help="Leave out ZeRO 2's 16-bit copy of the weights.")
    parser.add_argument("--growth", action="store_true", help="Measure only our converter, by bytes and ranks.")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, and end with the JSON object."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="consolidate-", dir=options.folder) as name:
        folder = Path(name)
        if options.growth:
            result = grow(folder, options)
        else:
            result = summarise([compare_stage(stage, folder, options) for stage in options.stages], options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
