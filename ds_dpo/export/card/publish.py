"""Put an exported folder on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ds_dpo.errors import ConfigError, DsDpoError, ModelError
from ds_dpo.process.say import Say

COMMIT_MESSAGE = "Upload a model exported by ds_dpo"
CURES = {
    401: "the hub does not accept the token: make one with write access, then run `hf auth login` or set HF_TOKEN",
    402: "the hub asks for a payment for this account or its storage",
    403: "the token may not write there: give a repository of your own, or use a token with write access to it",
    404: "the owner or repository does not exist, or the token may not see it",
    409: "another upload is writing there; try again",
    412: "another upload wrote there meanwhile; try again",
    413: "the upload is too large for the hub",
    429: "too many requests: wait, then try again",
}


def push_folder(folder: Path, repo_id: str, *, private: bool = False, say: Say = print) -> str:
    """Upload every file of a folder to a model repository, made if it is not there, and return its address.

    The token comes from HF_TOKEN or `hf auth login`, the hub from HF_ENDPOINT. private: make the repository private;
    without it a new repository follows the owner's account, and an existing one is not changed.
    Raises ConfigError for an impossible name, a missing token, or a public repository with private, and ModelError for
    an empty folder and for errors of the hub or the network. The folder is not changed.
    """
    from huggingface_hub import HfApi, get_token

    _check_name(repo_id)
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise ModelError(f"{folder}: has no file to upload to {repo_id}")
    token = get_token()
    if token is None:
        raise ConfigError(f"{repo_id}: there is no token for the hub; set HF_TOKEN, or run `hf auth login`")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    num_bytes = sum(path.stat().st_size for path in files)
    say(f"uploading {len(files)} files, {num_bytes / 1e9:.3f} GB, to {api.endpoint}/{repo_id}")
    with _explained(repo_id, endpoint=api.endpoint, token=token):
        repository = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ConfigError(f"{repo_id}: exists and is public; give another repository, or make this one private")
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=COMMIT_MESSAGE)
    address = str(repository)
    say(f"uploaded to {address}")
    return address


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is not the name of a repository ({error}); give owner/name") from error
    if "/" not in repo_id:
        raise ConfigError(f"{repo_id!r} has no owner; give owner/{repo_id}")


@contextlib.contextmanager
def _explained(repo_id: str, *, endpoint: str, token: str) -> Iterator[None]:
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except DsDpoError:
        raise
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"{repo_id}: nothing is uploaded while HF_HUB_OFFLINE is set; unset it") from error
    except ValueError as error:  # from the hub's client, about the metadata in README.md
        raise ModelError(f"{repo_id}: refused: {error}".replace(token, "***")) from error
    except Exception as error:  # also errors of the HTTP library under the hub's client
        reason = _refusal(error) or f"the upload to {endpoint} failed; try again when it can be reached ({error!r})"
        # a server may return what it received
        raise ModelError(f"{repo_id}: {reason}".replace(token, "***")) from error


def _refusal(error: BaseException | None) -> str | None:
    """Return the hub's answer and its cure; None if it did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__  # errors of a file's upload are wrapped once more
    if error is None:
        return None
    status = error.response.status_code
    cure = CURES.get(status, "the hub failed: try again later" if status >= 500 else "the hub refuses the upload")
    said = f": {error.server_message}" if error.server_message else ""
    return f"{cure} (status {status}{said})"
