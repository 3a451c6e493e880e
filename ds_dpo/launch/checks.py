"""The checks of all hosts before a launch, as pure functions of the hosts' reports."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence

from ds_dpo.errors import ConfigError
from ds_dpo.launch.hostfile import Host
from ds_dpo.launch.reach import Answer
from ds_dpo.launch.report import ALIKE, Report


def require_sound_hosts(answers: Sequence[Answer], *, token: str, output_dir: str, needs_gpus: bool) -> None:
    """Raise one ConfigError that names each host and everything that is wrong with it.

    token: the text that every host must have read in output_dir. needs_gpus: each slot of a host needs a GPU.
    """
    problems = [
        f"{answer.host.name} (line {answer.host.line}): {answer.problem}" for answer in answers if answer.problem
    ]
    reports = [(answer.host, answer.report) for answer in answers if answer.report is not None]
    for host, report in reports:
        problems += [f"{host.name}: {problem}" for problem in _problems(host, report, token, output_dir, needs_gpus)]
    problems += differences([(host.name, report.versions) for host, report in reports])
    if problems:
        raise ConfigError("\n  ".join(["the hosts are not ready:", *problems]))


def _problems(host: Host, report: Report, token: str, output_dir: str, needs_gpus: bool) -> Iterator[str]:
    if report.error is not None:
        yield report.error
    if report.token != token:
        yield f"cannot read what this machine wrote into {output_dir}; output_dir must be on a disk shared by all hosts"
    if report.listen_error is not None:
        yield f"cannot listen at the port where ranks meet ({report.listen_error}); give another --master_port"
    if needs_gpus and report.num_gpus == 0:
        yield "it has no GPU (no /dev/nvidia0); check its driver, or set DS_ACCELERATOR=cpu to train on CPUs"
    elif needs_gpus and report.num_gpus is not None and report.num_gpus < host.slots:
        yield f"slots={host.slots}, but the host has {report.num_gpus} GPUs"
    for name, found in report.versions.items():
        if found == "not installed":
            yield f"{name} is not installed in the Python that this machine uses"


def differences(hosts: Sequence[tuple[str, Mapping[str, str]]], *, names: Sequence[str] = ALIKE) -> list[str]:
    """Return a line for each host that differs from the first one in a version, the code or the configuration.

    hosts: name and versions of each host; the versions have these names.
    """
    if not hosts:
        return []
    first_name, first = hosts[0]
    return [
        f"{host} has {name} {versions[name]}, {first_name} {first[name]}; all ranks must run the same"
        for host, versions in hosts[1:]
        for name in names
        if versions[name] != first[name]
    ]


def is_this_machine(name: str) -> bool:
    """Return whether a host's name resolves to an address of this machine, at which it can listen."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return any(_can_listen(str(address)) for address in addresses)


def _can_listen(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
