"""Ask every host of a launch for its report, all at once, over ssh as `deepspeed` does."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_dpo.launch.hostfile import Host
from ds_dpo.launch.report import Report, Request

CONNECT_SECONDS = 8
ANSWER_SECONDS = 20  # a cold file system reads a Python installation slowly


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A host's report, or the problem why there is none."""

    host: Host
    report: Report | None
    problem: str | None


def ask_hosts(hosts: Sequence[Host], requests: Sequence[Request], *, ssh_port: int | None) -> list[Answer]:
    """Return the hosts' answers, in order. Takes as long as the slowest, at most CONNECT + ANSWER seconds."""
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        return list(pool.map(lambda pair: _ask(*pair, ssh_port=ssh_port), zip(hosts, requests, strict=True)))


def ssh_command(host: str, *, ssh_port: int | None, folder: Path, python: str) -> list[str]:
    """Return the command that runs the report on a host; ssh must not ask for a password there."""
    port = [] if ssh_port is None else ["-p", str(ssh_port)]
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    # the report does not look for an accelerator: DeepSpeed's launcher does
    inside = f"cd {shlex.quote(str(folder))} && exec {shlex.quote(python)} -m ds_dpo.launch.report"
    # -- ends the options, whatever the host is called
    return ["ssh", *port, *options, "--", host, inside]


def _ask(host: Host, request: Request, *, ssh_port: int | None) -> Answer:
    # as `deepspeed` does: the same Python in the same folder
    command = ssh_command(host.name, ssh_port=ssh_port, folder=Path.cwd(), python=sys.executable)
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(request)),
            capture_output=True,
            text=True,
            timeout=CONNECT_SECONDS + ANSWER_SECONDS,
            env=dict(os.environ),
        )
    except FileNotFoundError:
        return Answer(host=host, report=None, problem="this machine has no ssh")
    except subprocess.TimeoutExpired:
        seconds = CONNECT_SECONDS + ANSWER_SECONDS
        return Answer(host=host, report=None, problem=f"no answer within {seconds} s")
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        return Answer(host=host, report=None, problem=f"status {done.returncode}: {said}")
    try:
        # a login script may print lines before the report
        return Answer(host=host, report=Report(**json.loads(done.stdout.strip().splitlines()[-1])), problem=None)
    except (ValueError, TypeError, IndexError):
        return Answer(host=host, report=None, problem=f"answered {done.stdout.strip()[-200:]!r} instead of a report")
