"""The part of the environment that reaches ranks on other hosts: a file that `deepspeed` reads, without secrets.

DeepSpeed puts each line of it on ssh's command line, which every user of either machine can read, and into its log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ds_dpo.errors import ConfigError, cut
from ds_dpo.outside import read_regular
from ds_dpo.storage.replace import replace_file

NAMES = ("PATH", "LD_LIBRARY_PATH", "DS_ACCELERATOR", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
PREFIXES = (
    *("HF_", "TRANSFORMERS_", "DS_DPO_", "OMP_", "KMP_", "TORCH_", "PYTORCH_", "CUDA_", "CUBLAS_", "XFORMERS_"),
    *("NCCL_", "GLOO_", "UCX_", "FI_"),  # UCX and libfabric (EFA) carry NCCL's traffic on some networks
)
STAYS = ("CUDA_VISIBLE_DEVICES",)  # the launcher sets it on each host
# in the name of a variable, or of a parameter of an address
SECRET = re.compile(
    r"TOKEN|KEY|SECRET|PASS|PSK|CREDENTIAL|AUTH|BEARER|COOKIE|SESSION|SIGNATURE|PRIVATE|LOGIN"
    r"|(?:^|[_-])(?:SIG|SAS|SID|PAT|JWT|OTP|PIN|CRED|CREDS|ACCESS)\d*(?:[_-]|$)|PW\d*(?:[_-]|$)|PWD",
    re.IGNORECASE,
)
USER_IN_URL = re.compile(r"//[^/?#\s]*@")
USER_IN_PROXY = re.compile(r"(?:^|,)\s*[^/?#\s,]+@")  # a proxy may be stated without http://
USER = re.compile(r"(?:^|_)USER(?:NAME)?(?:_|$)", re.IGNORECASE)  # of a variable whose value may be user:password
PARAMETER_OF_URL = re.compile(r"[?&;#]([^=&;#\s]+)=")
SHORT_PARAMETERS = ("k", "code")
# a part of an address after a word for a secret, or of the form of one: a run of letters and digits, or a UUID
SECRET_IN_URL = re.compile(
    r"://[^/\s]+/(?:\S*/)?(?:(?:t|k|token|key|secret|auth|pass|pat|sig)/[^/?#\s]+"
    r"|[^/?#\s]*?(?:(?=[a-z]*\d)(?=\d*[a-z])[a-z\d]{16,}|[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12}))",
    re.IGNORECASE,
)
SECRET_ITSELF = re.compile(
    r"\b(?:hf|gh[a-z]|github_pat|glpat|npm|dckr_pat|pypi|sk|pk|rk|xox[a-z])[_-][A-Za-z0-9_-]{16,}"
    r"|\bA[KS]IA[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}|\beyJ[\w-]+\.eyJ[\w-]+\."
    r"|\b(?:Bearer|Basic)\s+\S{8,}|-----BEGIN ",
)
MAX_BYTES = 2**20
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
    is_proxy = name.upper().endswith("_PROXY")
    return bool(
        SECRET.search(name)
        or (USER.search(name) and ":" in value)
        or USER_IN_URL.search(value)
        or SECRET_IN_URL.search(value)
        or (is_proxy and USER_IN_PROXY.search(value))
        or any(
            SECRET.search(parameter) or parameter.lower() in SHORT_PARAMETERS
            for parameter in PARAMETER_OF_URL.findall(value)
        )
        or SECRET_ITSELF.search(value)
    )


def read_usual_file(folders: tuple[Path, ...]) -> dict[str, str]:
    """Return the entries of the first .deepspeed_env in the folders, {} without one. Our file replaces it.

    Raises ConfigError for a line that is not NAME=VALUE, and for an entry that looks like a secret.
    """
    path = next((folder / USUAL_FILE for folder in folders if os.path.isfile(folder / USUAL_FILE)), None)
    if path is None:
        return {}
    entries = {}
    try:
        lines = read_regular(path, max_bytes=MAX_BYTES).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({cut(str(error))})") from error
    for number, line in enumerate(lines, start=1):
        name, equals, value = line.partition("=")
        if not equals or not name.strip():
            # the line may be a secret
            raise ConfigError(f"{path}, line {number}: a line of {len(line)} characters must be NAME=VALUE")
        if _is_secret(name, value):
            raise ConfigError(
                f"{path}, line {number}: {cut(name)} looks like a secret, and `deepspeed` would put it on ssh's "
                "command line; log in on the hosts instead (`hf auth login`, once is enough if they share HF_HOME)"
            )
        entries[name] = value
    return entries


def write_environment_file(path: Path, entries: Mapping[str, str]) -> None:
    """Write entries as `deepspeed` reads them from DS_ENV_FILE; only this user can read the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{name}={value}\n" for name, value in entries.items())
    replace_file(path, content, sync=False, mode=0o600)
