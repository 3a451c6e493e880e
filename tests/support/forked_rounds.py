"""Rounds of the miniature, killed on request; their programs are forks of one process, which imports everything once.

Usage: forked_rounds.py FOLDER. Runs FOLDER/whole at once, and FOLDER/killed with a kill at each of POINTS, after which
it is started again. Leaves FOLDER/killed.json with the points at which a kill came.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import torch

from ds_dpo.__main__ import run_command
from ds_dpo.feedback.rounds.program import prepare, run_rounds
from ds_dpo.feedback.rounds.reading import parse_rounds
from ds_dpo.process.process_tree import die_with_parent
from ds_dpo.process.quiet import quiet_libraries, quiet_output
from ds_dpo.storage.line_file import LineFile

PROGRAMS = ("evaluation.run.program", "export.consolidate", "feedback.pairs.program", "training.assembly")
# program, round, and when in it: at the Nth line that it records, once a checkpoint is there, or after its end
POINTS: tuple[tuple[str, int, int | str], ...] = (
    ("make-pairs", 1, 2),
    ("make-pairs", 1, "end"),
    ("train", 1, "checkpoint"),
    ("evaluate", 1, 3),
    ("evaluate", 2, "end"),
)
OPTIONS = {
    "deepspeed_config": "zero2_fp32_cpu",
    "max_train_steps": 3,
    "pairs_per_step": 2,
    "micro_batch_pairs": 2,
    "learning_rate": 1e-3,
    "schedule.warmup_steps": 0,
    "cadence.save_every_steps": 1,
    "cadence.sample_every_steps": "none",
}
DOCUMENT = {
    "rounds": 2,
    "images_per_prompt": 3,
    "scorers": ["reward"],
    "pairs": "all",
    "drawing": {"steps": 2, "guidance": 1, "scheduler": "ddim", "dtype": "fp32", "batch": 2},
}


def document(folder: Path, name: str) -> dict:
    cache = {"data.cache_dir": str(folder / "cache")}
    judged = {"prompts": [str(folder / "judged.txt")], "images_per_prompt": 1, "held_out": str(folder / "held.yaml")}
    return {
        **DOCUMENT,
        "output_dir": str(folder / name),
        "prompts": [str(folder / "drawn.txt")],
        # a few steps may make things worse
        "evaluation": {**judged, "least_fall": 9},
        "run": {"config": "miniature", "options": {**OPTIONS, **cache}},
    }


def forked(work: Callable[[], None]) -> int:
    """Return the exit status of a fork that does some work."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def call(command: Sequence[str], point: tuple[str, int, int | str] | None) -> int:
    """Run a program as a fork; at the point, kill it and this process."""
    name, *arguments = command[command.index("ds_dpo") + 1 :]
    rounds = [word for word in command if "round_" in word]
    number = max((int(word.split("round_")[1][:2]) for word in rounds), default=0)
    when = point[2] if point is not None and point[:2] == (name, number) else None

    def work() -> None:
        die_with_parent()
        torch.set_num_threads(1)
        if isinstance(when, int):
            die_at_line(when)
        run_command(name, arguments)

    if when == "checkpoint":
        run = Path(next(word for word in arguments if word.startswith("--output_dir=")).partition("=")[2])
        if os.fork() == 0:
            work()
            os._exit(0)
        while not (run / "checkpoints" / "step_00000001" / "manifest.json").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)
    status = forked(work)
    if when is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return status


def die_at_line(last: int) -> None:
    """Kill this process when it is about to record its Nth piece of lines, half of which is on the disk."""
    written, write = 0, LineFile.write

    def counted(self: LineFile, text: str) -> None:
        nonlocal written
        written += 1
        if written == last:
            write(self, text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, text)

    LineFile.write = counted  # type: ignore[method-assign]


def run(folder: Path, name: str, point: tuple[str, int, int | str] | None) -> int:
    """Run rounds in a fork; returns its exit status, -9 after a kill."""

    def work() -> None:
        prepared = prepare(parse_rounds(document(folder, name), source="rounds"), say=print)
        run_rounds(prepared, votes=[], say=print, call=lambda command: call(command, point))

    return forked(work)


def main() -> None:
    quiet_libraries()
    with quiet_output():
        for name in PROGRAMS:
            import_module(f"ds_dpo.{name}")
    folder = Path(sys.argv[1])
    (folder / "drawn.txt").write_text("a red circle on a white background\na blue square on a black background\n")
    (folder / "judged.txt").write_text("a green triangle on a white background\na red square on a black background\n")
    (folder / "held.yaml").write_text("scorer: reward\nname: faithful\nmeasure: faithful\n")
    assert run(folder, "whole", None) == 0
    killed = [point for point in POINTS if run(folder, "killed", point) == -signal.SIGKILL]
    assert run(folder, "killed", None) == 0
    (folder / "killed.json").write_text(json.dumps(killed))


if __name__ == "__main__":
    main()
