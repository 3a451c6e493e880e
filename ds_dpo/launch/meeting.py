"""Before anything is loaded, all ranks meet and check that all have come, are alike, and see one run folder.

scripts/launch.py checks the same on the hosts before a launch. The ranks check it however they were started, so that a
missing host is named after seconds.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import DistError, TCPStore

from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import is_initialized
from ds_dpo.distributed.device import pick_device
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.errors import ConfigError, LaunchError, LostRankError, StopAskedError
from ds_dpo.launch.checks import differences
from ds_dpo.launch.report import ALIKE, config_fingerprint, versions_here
from ds_dpo.launch.shared_folder import read_token, token_in
from ds_dpo.process.launchers import hosts_of_ranks
from ds_dpo.process.say import Say
from ds_dpo.supervision.lease import LEASE_VARIABLE
from ds_dpo.supervision.stop import STOPPED, StopRequest

# here the hosts were already checked, or the program that starts ranks waits for them: nodes of a job may start slowly
PATIENT_STARTS = (LEASE_VARIABLE, "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID")
PATIENT_SECONDS = 600.0
USUAL_SECONDS = 15.0
LOOK_SECONDS = 0.1
DEVICE_ALIKE = ("accelerator", "nccl")  # what ranks compare of their devices
FIRST_SECONDS = 40.0  # more than rank 0 takes to find that a lock on another host has no holder
FAREWELL_SECONDS = 5.0  # until all ranks have read the verdict
ASKED_SECONDS = 15.0  # a rank that is asked to stop still waits for rank 0, which ends the meeting for all
STOP = "stop"  # the verdict if any rank is asked to stop


@dataclass(frozen=True, kw_only=True)
class Attendee:
    """What a rank reports about itself.

    versions: those of versions_here, and those of the device that must be alike. token: the text that it read in the
    run folder. device_problem: why it has no device. gpu_id: see PickedDevice.
    """

    hostname: str
    versions: dict[str, str]
    token: str | None
    device_problem: str | None = None
    gpu_id: str | None = None


@contextmanager
def meeting(
    config: RunConfig,
    place: RankEnvironment,
    environ: Mapping[str, str],
    *,
    stop: StopRequest,
    say: Say,
    first: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Let all ranks meet at MASTER_ADDR:MASTER_PORT. The store stays open for the body, which joins it.

    first: called on rank 0 before anything is written; its ConfigError ends all ranks.

    Raises LaunchError on every rank. It names the ranks that did not come, and each host that differs from the first
    one or does not see the run folder. Raises StopAskedError on every rank that has come if one of them is asked to
    stop.
    """
    own = _introduction(place, environ)
    if place.world_size == 1 or is_initialized():  # ranks of one process group have already met
        with raised_everywhere():
            if place.rank == 0:
                first()
        yield
        return
    seconds = config.supervision.meeting_seconds or usual_seconds(place, environ)
    is_asked = partial(stop.is_asked_since_start, look_for_file=place.rank == 0)
    say(f"waiting for all {place.world_size} ranks at {place.master_addr}:{place.master_port}")
    is_agents = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _open_store(place, seconds=seconds, is_agents=is_agents, is_asked=is_asked)
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    table = _Table(store, place, seconds=seconds, attempt=attempt, is_asked=is_asked)
    own.versions.update(versions_here(config_fingerprint(config)))
    if place.rank == 0:
        _lead(table, Path(config.output_dir), own, first)
    else:
        _attend(table, Path(config.output_dir), own)
    yield  # the table must live on: on rank 0 its store is the server that all ranks use afterwards


def _introduction(place: RankEnvironment, environ: Mapping[str, str]) -> Attendee:
    """Return what a rank says of itself and its device.

    A rank without a device goes to the meeting with its problem, so that the others do not wait for it. Raises
    ConfigError if it is the only rank.
    """
    own = Attendee(hostname=platform.node(), versions={}, token=None)
    try:
        picked = pick_device(place.local_rank, environ)
    except ConfigError as error:
        if place.world_size == 1:
            raise
        return replace(own, versions=dict.fromkeys(DEVICE_ALIKE, "none"), device_problem=str(error))
    return replace(own, versions=picked.alike(), gpu_id=picked.gpu_id)


def usual_seconds(place: RankEnvironment, environ: Mapping[str, str]) -> float:
    """Return how long ranks wait for each other if the configuration does not say.

    On one host the launcher notices a rank that ends, so that none can be missing.
    """
    is_one_host = place.local_world_size == place.world_size
    is_patient = is_one_host or any(name in environ for name in PATIENT_STARTS)
    return PATIENT_SECONDS if is_patient else USUAL_SECONDS


def _open_store(place: RankEnvironment, *, seconds: float, is_agents: bool, is_asked: Callable[[], bool]) -> TCPStore:
    """Open the store that torch.distributed will use as well. is_agents: torchrun's agent is its server.

    It is opened on a thread, because a client waits forever at a port that accepts a connection and never answers.
    """
    where = f"{place.master_addr}:{place.master_port}"
    is_server = place.rank == 0 and not is_agents
    opened: list[TCPStore | Exception] = []

    def open_it() -> None:
        try:
            store = TCPStore(
                place.master_addr,
                place.master_port,
                is_master=is_server,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except Exception as error:
            opened.append(error)
        else:
            opened.append(store)

    opener = threading.Thread(target=open_it, name="meeting", daemon=True)
    opener.start()
    _wait_longer_unless(is_asked, lambda: not opener.is_alive(), seconds=seconds + 1)
    result = opened[0] if opened else None
    if isinstance(result, TCPStore):
        return result
    if is_asked():
        raise StopAskedError(STOPPED)
    if is_server:
        raise LaunchError(
            f"rank 0 on {platform.node()} cannot listen at port {place.master_port} for the other ranks ({result}); "
            "give another --master_port"
        )
    why = "no rank 0 answers there" if result is None else str(result).partition("\n")[0]
    raise LaunchError(
        f"rank {place.rank} on {platform.node()} has not reached rank 0 at {where} within {seconds:g} s: {why}; "
        "MASTER_ADDR (--master_addr) must be an address of the first host, and its port must be free and not blocked"
    )


def _wait(condition: Callable[[], bool], *, seconds: float) -> bool:
    """Wait in short naps, between which signals are handled. Returns whether the condition came true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _wait_longer_unless(is_asked: Callable[[], bool], condition: Callable[[], bool], *, seconds: float) -> None:
    """Wait for a condition; once a stop is asked for, no longer than ASKED_SECONDS."""
    _wait(lambda: condition() or is_asked(), seconds=seconds)
    if is_asked():
        _wait(condition, seconds=min(seconds, ASKED_SECONDS))


class _Table:
    """Values that ranks leave for each other in the store, by name. is_asked: whether this rank was asked to stop."""

    def __init__(
        self, store: TCPStore, place: RankEnvironment, *, seconds: float, attempt: str, is_asked: Callable[[], bool]
    ) -> None:
        self.place, self.seconds, self._is_asked = place, seconds, is_asked
        self._store, self._prefix = store, f"ds_dpo/meeting/{attempt}"

    def put(self, name: str, value: object) -> None:
        self._store.set(f"{self._prefix}/{name}", json.dumps(value))

    def has(self, *names: str) -> bool:
        return bool(self._store.check([f"{self._prefix}/{name}" for name in names]))

    def take(self, name: str) -> Any:
        """Return a value that is already there."""
        return json.loads(self._store.get(f"{self._prefix}/{name}"))

    def wait(self, *names: str, seconds: float) -> bool:
        """Wait for values, and let rank 0 know of a request to stop. Returns whether they came in time."""
        return _wait(lambda: self.has(*names) or self._passes_on_request(), seconds=seconds)

    def wait_unless_asked(self, *names: str, seconds: float) -> bool:
        """Do rank 0's wait for values. Returns whether any rank was asked to stop meanwhile."""
        _wait(lambda: self.has(*names) or self._anyone_is_asked(), seconds=seconds)
        return self._anyone_is_asked()

    def _passes_on_request(self) -> bool:
        if self._is_asked():
            self.put("asked", None)
        return False

    def _anyone_is_asked(self) -> bool:
        return self._is_asked() or self.has("asked")


def _lead(table: _Table, output_dir: Path, own: Attendee, first: Callable[[], None]) -> None:
    """Do rank 0's part: invite the others, see who has come, and judge."""
    place = table.place
    others = range(1, place.world_size)
    try:
        table.put("first", None)  # it may take long, and the others wait for it
        first()
        with token_in(output_dir) as token:
            table.put("invitation", {"output_dir": str(output_dir.absolute()), "token": token.path.name})
            if table.wait_unless_asked(*map(_seat, others), seconds=table.seconds):
                _end_meeting(table, STOP, others)
                raise StopAskedError(STOPPED)
            others_here = {rank: Attendee(**table.take(_seat(rank))) for rank in _seated(table)}
            came = {0: replace(own, token=token.text), **others_here}
            problems = judge(came, place, seconds=table.seconds, token=token.text, output_dir=str(output_dir))
    except ConfigError as error:
        came, problems = dict.fromkeys(others, own), [f"rank 0 on {platform.node()}: {error}"]
        table.put("invitation", None)
    if problems:
        _end_meeting(table, problems, [rank for rank in came if rank])
        raise _refusal(problems)
    table.put("verdict", problems)


def _end_meeting(table: _Table, verdict: object, ranks: Iterable[int]) -> None:
    """Give the other ranks a verdict that ends them, and stay until they have read it: the store is in this process."""
    table.put("verdict", verdict)
    table.wait(*(f"heard/{rank}" for rank in ranks), seconds=FAREWELL_SECONDS)


def _attend(table: _Table, output_dir: Path, introduction: Attendee) -> None:
    """Do the part of every other rank."""
    place = table.place
    own = f"rank {place.rank} on {platform.node()}"
    where = f"rank 0 at {place.master_addr}:{place.master_port}"
    try:
        is_invited = table.wait("invitation", seconds=table.seconds)
        if not is_invited and table.has("first"):
            is_invited = table.wait("invitation", seconds=FIRST_SECONDS)
        if not is_invited:
            raise LaunchError(f"{own}: {where} did not invite the other ranks within {table.seconds:g} s")
        invitation = table.take("invitation")
        if invitation is not None:
            _sit_down(table, invitation, output_dir, introduction, own=own, where=where)
        # rank 0 began to wait no later than this rank
        if not table.wait("verdict", seconds=table.seconds + FAREWELL_SECONDS):
            raise LaunchError(f"{own}: {where} did not confirm within {table.seconds:g} s that all ranks have come")
        problems = table.take("verdict")
        table.put(f"heard/{place.rank}", None)
    except DistError as error:
        raise LostRankError(f"{own}: {where} has exited ({str(error).partition(chr(10))[0]})") from error
    if problems == STOP:
        raise StopAskedError(STOPPED)
    if problems:
        refusal = _refusal(problems)
        refusal.is_said_elsewhere = True
        raise refusal


def _sit_down(
    table: _Table, invitation: dict[str, str], output_dir: Path, introduction: Attendee, *, own: str, where: str
) -> None:
    """Leave this rank's report. Raises LaunchError if another run meets at that port."""
    folder = output_dir.absolute()
    if str(folder) != invitation["output_dir"]:
        raise LaunchError(
            f"{own} trains in output_dir {folder}, and {where} in {invitation['output_dir']}: give both the same "
            "output_dir, or, if that is another run, give this run another --master_port"
        )
    read = read_token(str(folder / invitation["token"]))
    table.put(_seat(table.place.rank), asdict(replace(introduction, token=read)))


def _seat(rank: int) -> str:
    return f"rank/{rank}"


def _seated(table: _Table) -> list[int]:
    return [rank for rank in range(1, table.place.world_size) if table.has(_seat(rank))]


def _refusal(problems: Sequence[str]) -> LaunchError:
    return LaunchError("\n  ".join(["the ranks cannot train together:", *problems]))


def judge(
    came: Mapping[int, Attendee], place: RankEnvironment, *, seconds: float, token: str, output_dir: str
) -> list[str]:
    """Return the problems in words, none if all ranks came, are alike and read the token.

    came: the ranks that came, rank 0 included.
    """
    problems = []
    missing = [rank for rank in range(place.world_size) if rank not in came]
    if missing:
        problems.append(_who_is_missing(missing, came, place, seconds=seconds))
    first = came[0].hostname
    distinct: list[tuple[str, dict[str, str]]] = []
    for _, attendee in sorted(came.items()):
        if (attendee.hostname, attendee.versions) not in distinct:
            distinct.append((attendee.hostname, attendee.versions))
    blind = sorted({attendee.hostname for attendee in came.values() if attendee.token != token})
    problems += [
        f"{name}: cannot read what {first} wrote into {output_dir}; output_dir must be on a disk shared by all hosts"
        for name in blind
    ]
    problems += _device_problems(came)
    # a rank without a device differs in its accelerator as well, which says nothing new
    compared = ALIKE if any(attendee.device_problem for attendee in came.values()) else (*ALIKE, *DEVICE_ALIKE)
    return problems + differences(distinct, names=compared)


def _device_problems(came: Mapping[int, Attendee]) -> list[str]:
    """Return a line for each host whose ranks have no device, and one for ranks that share a GPU."""
    without: dict[tuple[str, str], list[int]] = {}
    sharing: dict[tuple[str, str], list[int]] = {}
    for rank, attendee in sorted(came.items()):
        if attendee.device_problem is not None:
            without.setdefault((attendee.hostname, attendee.device_problem), []).append(rank)
        if attendee.gpu_id is not None:
            sharing.setdefault((attendee.hostname, attendee.gpu_id), []).append(rank)
    lines = [f"{host} (ranks {spans(ranks)}): {problem}" for (host, problem), ranks in without.items()]
    return lines + [
        f"{host}: ranks {spans(ranks)} have the same GPU ({gpu_id}), but each rank needs one of its own"
        for (host, gpu_id), ranks in sharing.items()
        if len(ranks) > 1
    ]


def _who_is_missing(
    missing: Sequence[int], came: Mapping[int, Attendee], place: RankEnvironment, *, seconds: float
) -> str:
    hosts = hosts_of_ranks(os.getpid())
    whose = "" if hosts is None else f" ({', '.join(dict.fromkeys(hosts[rank] for rank in missing))})"
    present: dict[str, list[int]] = {}
    for rank, attendee in sorted(came.items()):
        present.setdefault(attendee.hostname, []).append(rank)
    here = ", ".join(f"{spans(ranks)} ({host})" for host, ranks in present.items())
    return (
        f"of {place.world_size} ranks, {spans(missing)}{whose} did not come to {place.master_addr}:{place.master_port} "
        f"within {seconds:g} s; {here} did. Look above for messages of ssh or the scheduler about the missing host. If "
        "hosts only start slowly, raise supervision.meeting_seconds"
    )


def spans(ranks: Sequence[int]) -> str:
    """Return ascending ranks as text, such as "3" or "1, 8-15"."""
    groups: list[list[int]] = []
    for rank in ranks:
        if groups and rank == groups[-1][-1] + 1:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)
