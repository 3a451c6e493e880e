"""The table of the fault matrix: each case is one start of a run, what happens to it, and how it must end."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

from fault_moves import (
    Case,
    Cut,
    FillDisk,
    FreeDisk,
    Loading,
    Move,
    Saving,
    Says,
    Seconds,
    Setup,
    Signal,
    Steps,
    StopFile,
    SwitchOff,
)

SEED = 5
SAVE_EVERY = 3
COMMON = {
    "config": "miniature",
    "deepspeed_config": "zero2_fp32_cpu",
    "data.max_rows": 100,
    "batch.pairs_per_step": 4,
    "batch.micro_batch_pairs": 2,
    "schedule.warmup_steps": 2,
    "schedule.decay_steps": 1000,
    "cadence.log_every_steps": 1,
    "cadence.save_every_steps": SAVE_EVERY,
    "cadence.keep_checkpoints": 3,
    "cadence.sample_every_steps": "none",
}
# beta follows the gaps of earlier steps: a state that is neither a weight nor a moment, and shows in the curve
FOLLOWING_BETA = {"objective.target_gradient_factor": 0.3, "objective.gap_decay": 0.8}
SETUPS: dict[str, Setup] = {
    "two": Setup(options=COMMON, curve_of="two"),
    "zero3": Setup(options={**COMMON, "deepspeed_config": "zero3_fp32_cpu", **FOLLOWING_BETA}, curve_of="zero3"),
    "four": Setup(slots=2, options={**COMMON, "batch.micro_batch_pairs": 1}, curve_of="four"),
    "disk": Setup(options=COMMON, curve_of="two", is_on_small_disk=True),
}

# Stated times, in seconds, until no process is left on any host.
WITHIN_OF_DEATH = 30.0  # the promise, whatever of a launch dies
WITHIN_OF_SILENCE = 60.0  # for the sshd of a host that is cut off; the ranks have the time above, as ssh notices
WITHIN_OF_STOP = 60.0  # the step in progress, a checkpoint, and the libraries' leave-taking
HANG_SECONDS = 15.0
WITHIN_OF_HANG = HANG_SECONDS + 45.0  # then 5 s for all ranks' stacks, 15 s for DeepSpeed's launchers, and what is left
HANG_OPTIONS = {"supervision.hang_floor_seconds": HANG_SECONDS}
# so low that what waits for others in a collective, and is not a step, ends within the test
IMPATIENT = {"supervision.collective_timeout_minutes": 1.0}
WITHIN_OF_IMPATIENCE = 60.0 + WITHIN_OF_DEATH

AT_FAULT = (Says("fault point "),)
STATUS_DONE, STATUS_REFUSED, STATUS_HANG = 0, 2, 70


def cases() -> dict[str, Case]:
    """Return all cases by name, in the order in which they are played."""
    every = [case for group in GROUPS.values() for case in group()]
    return {case.name: case for case in every}


def kills() -> Iterator[Case]:
    """SIGKILL to each rank at a random time, more than twenty times: while loading, in steps, while saving."""
    draw = random.Random(SEED)
    plan = [
        *[("two", rank, phase) for rank in (0, 1) for phase in ("steps", "steps", "steps", "steps", "load", "save")],
        *[("zero3", rank, phase) for rank in (0, 1) for phase in ("steps", "steps", "save")],
        *[("four", rank, "steps") for rank in (0, 1, 2, 3)],
    ]
    for number, (setup, rank, phase) in enumerate(plan, start=1):
        ranks = SETUPS[setup].ranks
        yield Case(
            name=f"SIGKILL {number:02}: rank {rank} of {ranks}, {setup}, {phase}",
            group="kills",
            setup=setup,
            moves=(*random_moment(phase, draw), Signal(f"rank {rank}")),
        )


def random_moment(phase: str, draw: random.Random) -> tuple[Move, ...]:
    moments: dict[str, tuple[Move, ...]] = {
        "steps": (Steps(draw.randint(1, 2 * SAVE_EVERY), share=round(draw.random(), 2)),),
        "load": (Loading(round(draw.uniform(0.05, 0.9), 2)),),
        "save": (Steps(draw.randint(0, 2)), Saving()),
    }
    return moments[phase]


def points() -> Iterator[Case]:
    """SIGKILL at each named point of the save and load protocols."""
    both = ("save.begin", "save.copied", "save.write", "save.written", "save.hashed", "save.agreed")
    for name in (*both, "load.begin", "load.verified", "load.read"):
        for rank in (0, 1):
            # not at the first of a rank's files, where one can be half-written and another whole
            yield at_point(f"{name}@{rank}#2=kill" if name == "save.write" else f"{name}@{rank}=kill")
    yield at_point("step.begin@0#2=kill")
    yield at_point("step.begin@1#5=kill")
    yield at_point("step.backward@0#4=kill")
    yield at_point("step.backward@1=kill")
    # before save.manifest, which leaves a whole checkpoint without its name: none that could be damaged by it
    yield at_point("save.moved_old@0=kill", damage="a bit of the newest is another")
    yield at_point("save.manifest@0=kill")
    yield at_point("save.renamed@0=kill")
    yield at_point("save.latest@0=kill")
    yield at_point("save.pruned@0=kill")


def at_point(faults: str, **further: Any) -> Case:
    where = faults.removesuffix("=kill")
    return Case(name=f"killed at {where}", group="points", moves=AT_FAULT, faults=faults, **further)


def hosts() -> Iterator[Case]:
    """A host is switched off, or a process between launcher and ranks is killed."""
    training, early = Steps(4, share=0.5), Steps(1)
    ends: dict[str, tuple[Move, ...]] = {
        "launch.py killed": (training, Signal("launch.py")),
        "runner killed": (training, Signal("runner")),
        "node launcher of n1 killed": (training, Signal("node n1")),
        "node launcher of n2 killed": (training, Signal("node n2")),
        "pdsh killed": (training, Signal("pdsh")),
        "ssh to n1 killed": (training, Signal("ssh n1")),
        "ssh to n2 killed": (training, Signal("ssh n2")),
        "sshd of n2's session killed": (training, Signal("sshd n2")),
        "launch.py killed while ranks load": (Loading(0.4), Signal("launch.py")),
        "ssh to n2 killed while ranks load": (Loading(0.4), Signal("ssh n2")),
        "launch.py killed while saving": (early, Saving(), Signal("launch.py")),
        "n2 switched off": (training, SwitchOff("n2")),
        "n1, rank 0's host, switched off": (training, SwitchOff("n1")),
        "head, the launcher's host, switched off": (training, SwitchOff("head")),
        "n2 switched off while ranks load": (Loading(0.5), SwitchOff("n2")),
        "n1 switched off while saving": (early, Saving(), SwitchOff("n1")),
    }
    for name, moves in ends.items():
        yield Case(name=name, group="hosts", moves=moves, within=WITHIN_OF_DEATH)


def signals() -> Iterator[Case]:
    """The run is asked to stop: it saves and exits with status 0. Asked twice, it leaves at once."""
    term, usr1, interrupt = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
    asks: dict[str, tuple[Move, ...]] = {
        "SIGTERM to launch.py": (Steps(4, share=0.4), Signal("launch.py", term)),
        "SIGINT to launch.py": (Steps(2, share=0.7), Signal("launch.py", interrupt)),
        "SIGUSR1 to launch.py": (Steps(5), Signal("launch.py", usr1)),
        "SIGTERM to rank 0": (Steps(2), Signal("rank 0", term)),
        "SIGTERM to rank 1": (Steps(4), Signal("rank 1", term)),
        "SIGUSR1 to rank 1": (Steps(1), Signal("rank 1", usr1)),
        "STOP file": (Steps(4), StopFile()),
        "SIGTERM to launch.py while saving": (Steps(1), Saving(), Signal("launch.py", term)),
        "SIGTERM to launch.py while ranks load": (Loading(0.6), Signal("launch.py", term)),
    }
    for name, moves in asks.items():
        yield Case(
            name=f"{name}: saved and left",
            group="signals",
            moves=moves,
            statuses=(STATUS_DONE,),
            within=WITHIN_OF_STOP,
            must_say=("stopped (at step|as asked)",),
        )
    for number in (term, interrupt):
        # a rank that hangs keeps the others from following the first
        again = (*AT_FAULT, Signal("launch.py", number), Seconds(3), Signal("launch.py", number))
        yield Case(
            name=f"{number.name} to launch.py twice: left at once",
            group="signals",
            moves=again,
            faults="step.begin@1#5=hang",
            statuses=(128 + number,),
            within=WITHIN_OF_DEATH,
        )
    yield Case(
        name="SIGTERM to rank 1 twice: left at once",
        group="signals",
        moves=(*AT_FAULT, Signal("rank 1", term), Seconds(3), Signal("rank 1", term)),
        faults="step.begin@0#5=hang",
    )
    yield Case(
        name="SIGTERM to the node launcher of n2",
        group="signals",
        moves=(Steps(4), Signal("node n2", term)),
        within=WITHIN_OF_STOP,
    )


def disk() -> Iterator[Case]:
    """The disk refuses a save: training goes on, earlier checkpoints stay, and the next save works."""
    shouted = Says("SAVING FAILED")
    later = (shouted, Says(r"saved \S*step_\d+"))
    refusals = (
        "save.begin@0=enospc",
        "save.write@0#2=enospc",
        "save.write@1=edquot",
        "save.written@1=erofs",
        "save.manifest@0=eio",
        "save.renamed@0=enospc",
    )
    for faults in refusals:
        yield Case(
            name=f"{faults}: the next save is taken",
            group="disk",
            moves=(*later, Signal("rank 1")),
            faults=faults,
        )
    # nothing is saved on the way, so that the first save is the last
    last = {"cadence.save_every_steps": 1000}
    yield Case(
        name="the last save fails once: tried again",
        group="disk",
        moves=(Steps(2), StopFile()),
        faults="save.write@1=enospc",
        options=last,
        statuses=(STATUS_DONE,),
        within=WITHIN_OF_STOP,
        must_say=("SAVING FAILED",),
    )
    yield Case(
        name="the last save fails twice",
        group="disk",
        moves=(Steps(2), StopFile()),
        faults="save.begin@0=enospc,save.begin@0#2=enospc",
        options=last,
        statuses=(STATUS_REFUSED,),
        within=WITHIN_OF_STOP,
    )
    full = (Steps(1), FillDisk(), shouted, Steps(2))
    yield Case(name="disk really full, then a rank killed", group="disk", setup="disk", moves=(*full, Signal("rank 1")))
    yield Case(
        name="disk really full, then free again",
        group="disk",
        setup="disk",
        moves=(*full, FreeDisk(), Says(r"saved \S*step_\d+"), StopFile()),
        statuses=(STATUS_DONE,),
        within=WITHIN_OF_STOP,
    )
    yield Case(
        name="disk really full at the end",
        group="disk",
        setup="disk",
        moves=(*full, StopFile()),
        statuses=(STATUS_REFUSED,),
        within=WITHIN_OF_STOP,
    )


def checkpoints() -> Iterator[Case]:
    """Checkpoints are damaged: a start skips them, and refuses if none is left."""
    ends = (
        (Steps(4, share=0.3), Signal("rank 1")),
        (Steps(1), Signal("rank 0")),
        (Steps(2), Saving(), Signal("rank 1")),
        (Steps(5, share=0.8), Signal("rank 0")),
    )
    usable = [name for name, costs in DAMAGES.items() if costs is not None]
    for number, name in enumerate(usable):
        yield Case(name=f"damage: {name}", group="checkpoints", moves=ends[number % len(ends)], damage=name)
    for name in [name for name, costs in DAMAGES.items() if costs is None]:
        yield Case(
            name=f"damage: {name}",
            group="checkpoints",
            moves=(Says("error: "),),
            damage=name,
            is_refused=True,
            statuses=(STATUS_REFUSED,),
            must_say=("holds no checkpoint|no checkpoint in",),
        )


# How many of the newest checkpoints each damage costs; None: none is left to go on from. fault_run.py does the damage.
DAMAGES: dict[str, int | None] = {
    "a shard of rank 1 is missing in the newest": 1,
    "the newest's largest file is cut in half": 1,
    "a bit of the newest is another": 1,
    "the newest has no manifest": 1,
    "the newest's manifest is cut in half": 1,
    "the newest's shards of ranks 0 and 1 are swapped": 1,
    "a shard of the newest is of the one before": 1,
    "the two newest are damaged": 2,
    "latest is missing": 0,
    "latest names nothing": 0,
    "a torn later one without a manifest": 0,
    "all are damaged": None,
    "none is left, and latest is": None,
}


def network() -> Iterator[Case]:
    """A host does not answer, or a rank hangs."""
    cut = Cut("n2")
    is_silent: dict[str, Any] = {
        "group": "network",
        "within": WITHIN_OF_SILENCE,
        "ranks_within": WITHIN_OF_DEATH,
    }
    moments: dict[str, tuple[Move, ...]] = {
        "while training": (Steps(4, share=0.5),),
        "while saving": (Steps(1), Saving()),
        "while ranks load": (Loading(0.5),),
    }
    for name, moment in moments.items():
        yield Case(name=f"network of n2 cut {name}", moves=(*moment, cut), **is_silent)
    yield Case(
        name="network of n1, rank 0's host, cut while training", moves=(Steps(2, share=0.5), Cut("n1")), **is_silent
    )
    is_hang: dict[str, Any] = {
        "group": "network",
        "options": HANG_OPTIONS,
        "statuses": (STATUS_HANG,),
        "within": WITHIN_OF_HANG,
    }
    yield Case(name="rank 1 hangs in a step", moves=AT_FAULT, faults="step.begin@1#5=hang", **is_hang)
    yield Case(name="rank 0 hangs in a backward pass", moves=AT_FAULT, faults="step.backward@0#5=hang", **is_hang)
    # a process on another host that is stopped cannot leave before it is continued, as docs/faults.md says
    stopped = (Steps(4), Signal("rank 1", signal.SIGSTOP), Says("hang"), Signal("rank 1", signal.SIGCONT))
    yield Case(name="SIGSTOP to rank 1, and SIGCONT once it is missed", moves=stopped, **is_hang)
    waits: dict[str, Any] = {
        "group": "network",
        "options": {**HANG_OPTIONS, **IMPATIENT},
        "within": WITHIN_OF_IMPATIENCE,
    }
    yield Case(name="rank 1 hangs as it writes a checkpoint", moves=AT_FAULT, faults="save.write@1=hang", **waits)
    yield Case(name="rank 1 hangs as it loads a checkpoint", moves=AT_FAULT, faults="load.verified@1=hang", **waits)


GROUPS = {
    "kills": kills,
    "points": points,
    "hosts": hosts,
    "signals": signals,
    "disk": disk,
    "checkpoints": checkpoints,
    "network": network,
}
