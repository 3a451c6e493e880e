"""Read a hostfile, more strictly than `deepspeed` does: the hosts of a launch and their numbers of ranks.

If the file is missing, DeepSpeed only prints a warning and trains on this machine. If all slots are 0 it runs nothing,
and it silently uses fewer hosts than were asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.outside import read_regular

MAX_BYTES = 16 * 2**20
MAX_SLOTS_DIGITS = 6
# of a name or address, with a user if need be; `deepspeed` puts it on the command lines of ssh, pdsh and a shell
HOST = re.compile(r"(?:\w[\w.-]*@)?[\w\[][\w.:%\[\]-]*", re.ASCII)
NOT_A_HOST = "is not the name or address of a host; it may have letters, digits and . _ - : but not begin with -"
LINE = re.compile(r"(?P<name>\S+)\s+slots=(?P<slots>\S+?)\s*(?:\s#.*)?")


@dataclass(frozen=True, kw_only=True)
class Host:
    """name: the one that ssh uses. slots: number of ranks. line: line of the hostfile, counted from 1."""

    name: str
    slots: int
    line: int


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a file, in its order. Raises ConfigError that names the file and the wrong line."""
    try:
        lines = read_regular(path, max_bytes=MAX_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(
            f"--hostfile {path} cannot be read ({reason}); `deepspeed` would silently train on this machine alone"
        ) from error
    hosts: list[Host] = []
    for number, text in enumerate(lines, start=1):
        if text.strip() and not text.lstrip().startswith("#"):
            hosts.append(_read_line(path, number, text.strip(), known=hosts))
    if not hosts:
        raise ConfigError(f"{path} names no host; add a line such as `gpu-node-0 slots=8`")
    return hosts


def _read_line(path: Path, number: int, text: str, *, known: Sequence[Host]) -> Host:
    match = LINE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{path}, line {number}: {shown(text)} is not of the form `gpu-node-0 slots=8`")
    if HOST.fullmatch(match["name"]) is None:
        raise ConfigError(f"{path}, line {number}: {shown(match['name'])} {NOT_A_HOST}")
    is_number = match["slots"].isdecimal() and len(match["slots"]) <= MAX_SLOTS_DIGITS
    if not is_number or int(match["slots"]) < 1:
        raise ConfigError(f"{path}, line {number}: slots={cut(match['slots'])} must be a number of at least 1")
    earlier = next((host for host in known if host.name == match["name"]), None)
    if earlier is not None:
        raise ConfigError(f"{path}, line {number}: {match['name']} is already in line {earlier.line}")
    return Host(name=match["name"], slots=int(match["slots"]), line=number)


def select_hosts(
    hosts: Sequence[Host],
    *,
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_accelerators: int | None = None,
) -> list[Host]:
    """Return the hosts and ranks that `deepspeed` would use with these options.

    include, exclude: NAME[:SLOT,SLOT...], several of them joined by @; only one of the two may be given.
    Raises ConfigError that names the option and what the hostfile has.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude cannot both be given; leave out one of them")
    if (include or exclude) and (num_nodes is not None or num_accelerators is not None):
        raise ConfigError("--num_nodes and --num_gpus cannot be combined with --include or --exclude")
    by_name = {host.name: host for host in hosts}
    if include:
        named = _read_selection("--include", include, by_name)
        return [replace(by_name[name], slots=len(slots)) for name, slots in named.items()]
    if exclude:
        left = _without(by_name, _read_selection("--exclude", exclude, by_name))
        if not left:
            raise ConfigError(f"--exclude {exclude} leaves no host")
        return left
    return _first(hosts, num_nodes, num_accelerators)


def _read_selection(option: str, text: str, by_name: dict[str, Host]) -> dict[str, set[int]]:
    """Return slots by host. Raises ConfigError for a host or slot that is not in the hostfile."""
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        name, colon, slots_text = part.partition(":")
        if name not in by_name:
            raise ConfigError(f"{option} {text}: host {name!r} is not in the hostfile, which has {', '.join(by_name)}")
        slots = slots_text.split(",") if colon else [str(slot) for slot in range(by_name[name].slots)]
        for slot in slots:
            if not slot.isdecimal() or int(slot) >= by_name[name].slots:
                raise ConfigError(f"{option} {text}: {name} has no slot {slot!r}, only 0 to {by_name[name].slots - 1}")
        named[name] = {int(slot) for slot in slots}
    return named


def _without(by_name: dict[str, Host], excluded: dict[str, set[int]]) -> list[Host]:
    left = (replace(host, slots=host.slots - len(excluded.get(name, ()))) for name, host in by_name.items())
    return [host for host in left if host.slots]


def _first(hosts: Sequence[Host], num_nodes: int | None, num_accelerators: int | None) -> list[Host]:
    if num_nodes is not None and not 1 <= num_nodes <= len(hosts):
        raise ConfigError(f"--num_nodes {num_nodes}: the hostfile has {len(hosts)} hosts")
    chosen = list(hosts[:num_nodes])
    if num_accelerators is None:
        return chosen
    for host in chosen:
        if not 1 <= num_accelerators <= host.slots:
            raise ConfigError(f"--num_gpus {num_accelerators}: {host.name} has {host.slots} slots")
    return [replace(host, slots=num_accelerators) for host in chosen]
