"""Report about one host before a launch. ssh runs it there, with a request on its input; it prints a line of JSON.

    ssh HOST 'cd FOLDER && exec PYTHON -m ds_dpo.launch.report' < REQUEST

It takes a second, because it imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import socket
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ds_dpo.config.load import config_to_yaml, load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import DsDpoError
from ds_dpo.launch.shared_folder import read_token

ALIKE = ("python", "torch", "deepspeed", "diffusers", "transformers", "ds_dpo", "code", "config")
PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "ds_dpo")
GPU_DEVICE = re.compile(r"nvidia\d+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """program_arguments: those of train.py. token_file: the launcher's. listens: port at which the host must listen."""

    program_arguments: tuple[str, ...]
    token_file: str | None
    listens: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """versions: with the names in ALIKE. num_gpus: 0 without a device file, None if they do not say.

    token: the text of token_file. listen_error: why the host cannot listen at the port. error: why the configuration
    cannot be read.
    """

    hostname: str
    versions: dict[str, str]
    num_gpus: int | None
    token: str | None
    listen_error: str | None
    error: str | None


def report(request: Request) -> Report:
    """Return the report about this host."""
    try:
        config, error = config_fingerprint(load_config(request.program_arguments).config), None
    except DsDpoError as caught:
        config, error = "not readable", str(caught)
    return Report(
        hostname=platform.node(),
        versions=versions_here(config),
        num_gpus=num_gpus_here(Path("/dev")),
        token=read_token(request.token_file),
        listen_error=None if request.listens is None else listen_error(request.listens),
        error=error,
    )


def versions_here(config: str) -> dict[str, str]:
    """Return what must be the same on all hosts, with the names in ALIKE. config: the configuration's fingerprint."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "code": code_fingerprint(Path(__file__).resolve().parents[1]),
        "config": config,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def code_fingerprint(package: Path) -> str:
    """Return a hash of the package's Python files, because edited code keeps its version number."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def config_fingerprint(config: RunConfig) -> str:
    """Return a hash of all fields of a resolved configuration."""
    return hashlib.sha256(config_to_yaml(config).encode()).hexdigest()[:12]


def num_gpus_here(devices: Path) -> int | None:
    """Count NVIDIA's device files, which is faster than asking the driver; a rank tries its GPU later.

    None if the host has GPUs of another kind of file: AMD's (kfd), and NVIDIA's in Windows' Linux (dxg).
    """
    found = [path for path in devices.glob("nvidia*") if GPU_DEVICE.fullmatch(path.name)]
    if not found and any((devices / name).exists() for name in ("kfd", "dxg")):
        return None
    return len(found)


def listen_error(port: int) -> str | None:
    """Return why this host cannot listen at a port, None if it can."""
    with socket.socket() as probe:
        # with it, a port whose connections have just ended counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError as error:
            return os.strerror(error.errno or 0)
    return None


def read_request(text: str) -> Request:
    values: dict[str, Any] = json.loads(text)
    return Request(**{**values, "program_arguments": tuple(values["program_arguments"])})


if __name__ == "__main__":
    print(json.dumps(asdict(report(read_request(sys.stdin.read())))))
