"""The part of the environment that reaches ranks on other hosts: a file that `deepspeed` reads, without secrets.

DeepSpeed puts each line of it on ssh's command line, which every user of either machine can read, and into its log.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ds_dpo.errors import ConfigError
from ds_dpo.storage.replace import replace_file

NAMES = ("PATH", "LD_LIBRARY_PATH", "DS_ACCELERATOR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
PREFIXES = ("HF_", "NCCL_", "GLOO_", "TORCH_", "OMP_", "TRANSFORMERS_", "DS_DPO_", "CUDA_", "KMP_")
STAYS = ("CUDA_VISIBLE_DEVICES",)  # the launcher sets it on each host
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@")
USUAL_FILE = ".deepspeed_env"


def travelling_environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the variables to set on each host, and the names of wanted variables that must stay on this machine.

    Proxies may have lower-case names. A variable stays if it looks like a secret, or if it holds a line break, which
    DeepSpeed would read as two entries.
    """
    wanted = {name: value for name, value in environ.items() if _is_wanted(name)}
    kept = {name for name, value in wanted.items() if _is_secret(name, value) or "\n" in value}
    return {name: value for name, value in sorted(wanted.items()) if name not in kept}, sorted(kept)


def _is_wanted(name: str) -> bool:
    return name not in STAYS and (name.upper() in NAMES or name.startswith(PREFIXES))


def _is_secret(name: str, value: str) -> bool:
    return bool(SECRET.search(name) or PASSWORD_IN_URL.search(value))


def read_usual_file(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return the entries of the first .deepspeed_env in the folders, {} without one. Our file replaces it.

    Raises ConfigError for a line that is not NAME=VALUE, and for an entry that looks like a secret.
    """
    path = next((folder / USUAL_FILE for folder in folders if (folder / USUAL_FILE).is_file()), None)
    if path is None:
        return {}
    entries = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{path}, line {number}: {line!r} must be NAME=VALUE")
        if _is_secret(name, value):
            raise ConfigError(
                f"{path}, line {number}: {name} looks like a secret, and `deepspeed` would put it on ssh's command "
                "line; log in on the hosts instead (`hf auth login`, once is enough if they share HF_HOME)"
            )
        entries[name] = value
    return entries


def write_environment_file(path: Path, entries: Mapping[str, str]) -> None:
    """Write entries as `deepspeed` reads them from DS_ENV_FILE; only this user can read the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{name}={value}\n" for name, value in entries.items())
    replace_file(path, content, sync=False, mode=0o600)
