"""What of the environment reaches the ranks of other hosts: a file that `deepspeed` reads, and never a secret in it.

DeepSpeed puts each of its lines on the command line of ssh, where every user of either machine can read it, and into
its log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ds_dpo.errors import ConfigError

NAMES = ("PATH", "LD_LIBRARY_PATH", "DS_ACCELERATOR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
PREFIXES = ("HF_", "NCCL_", "GLOO_", "TORCH_", "OMP_", "TRANSFORMERS_", "DS_DPO_", "CUDA_", "KMP_")
STAYS = ("CUDA_VISIBLE_DEVICES",)  # the launcher sets it on each host
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@")
USUAL_FILE = ".deepspeed_env"


def travelling_environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return what is to be set on each host, by name, and the names that stay here although they look wanted.

    Proxies count in small letters too. What looks like a secret stays, and what holds a line break, which DeepSpeed
    would take for two entries.
    """
    wanted = {name: value for name, value in environ.items() if _is_wanted(name)}
    kept = {name for name, value in wanted.items() if _is_secret(name, value) or "\n" in value}
    return {name: value for name, value in sorted(wanted.items()) if name not in kept}, sorted(kept)


def _is_wanted(name: str) -> bool:
    return name not in STAYS and (name.upper() in NAMES or name.startswith(PREFIXES))


def _is_secret(name: str, value: str) -> bool:
    return bool(SECRET.search(name) or PASSWORD_IN_URL.search(value))


def read_usual_file(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return the entries of the first .deepspeed_env among folders, which ours takes the place of; {} without one.

    Raises ConfigError naming the line that is not NAME=VALUE, and the entry that looks like a secret.
    """
    path = next((folder / USUAL_FILE for folder in folders if (folder / USUAL_FILE).is_file()), None)
    if path is None:
        return {}
    entries = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{path}, line {number}: {line!r} is not NAME=VALUE, which `deepspeed` cannot read")
        if _is_secret(name, value):
            raise ConfigError(
                f"{path}, line {number}: {name} looks like a secret, and `deepspeed` would put it on ssh's command "
                "line; log in on the hosts instead (`hf auth login`, once where they share HF_HOME)"
            )
        entries[name] = value
    return entries


def write_environment_file(path: Path, entries: Mapping[str, str]) -> None:
    """Write entries as `deepspeed` reads them from DS_ENV_FILE, for this user's eyes alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{name}={value}\n" for name, value in entries.items())
    os.replace(temporary, path)
