"""What must hold of the hosts before a launch, each as a pure function of what they said."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence

from ds_dpo.errors import ConfigError
from ds_dpo.launch.hostfile import Host
from ds_dpo.launch.reach import Answer
from ds_dpo.launch.report import ALIKE, Report


def require_sound_hosts(answers: Sequence[Answer], *, token: str, output_dir: str, needs_gpus: bool) -> None:
    """Raise ConfigError naming each host and what is wrong with it; all of it at once.

    token: what every host must have read in output_dir. needs_gpus: a host must have a GPU for each of its slots.
    """
    problems = [
        f"{answer.host.name} (line {answer.host.line}): {answer.problem}" for answer in answers if answer.problem
    ]
    told = [(answer.host, answer.report) for answer in answers if answer.report is not None]
    for host, report in told:
        problems += [f"{host.name}: {problem}" for problem in _problems(host, report, token, output_dir, needs_gpus)]
    problems += differences([(host.name, report.versions) for host, report in told])
    if problems:
        raise ConfigError("\n  ".join(["the hosts are not ready:", *problems]))


def _problems(host: Host, report: Report, token: str, output_dir: str, needs_gpus: bool) -> Iterator[str]:
    if report.error is not None:
        yield report.error
    if report.token != token:
        yield f"does not see what this machine wrote into {output_dir}; output_dir must lie on a disk of all hosts"
    if report.listen_error is not None:
        yield f"the port that ranks meet at cannot be had ({report.listen_error}); give another --master_port"
    if needs_gpus and report.num_gpus is not None and report.num_gpus < host.slots:
        yield f"slots={host.slots}, but it has {report.num_gpus} GPUs"
    for name, found in report.versions.items():
        if found == "not installed":
            yield f"{name} is not installed in the Python that this machine uses"


def differences(told: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Name the hosts that differ from the first one in a version, in the code or in the configuration.

    told: each host's name and versions, by the names in ALIKE.
    """
    if not told:
        return []
    first_name, first = told[0]
    return [
        f"{host} has {name} {versions[name]}, {first_name} {first[name]}; all ranks must run the same"
        for host, versions in told[1:]
        for name in ALIKE
        if versions[name] != first[name]
    ]


def is_this_machine(name: str) -> bool:
    """Tell whether a host's name leads to an address of this machine: only those can be listened at."""
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
