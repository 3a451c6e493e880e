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
    401: "the hub does not take the token: make one with write access, then `hf auth login` or set HF_TOKEN",
    402: "the hub wants a payment for this account or its storage",
    403: "the token may not write there: name a repository of your own, or take a token with write access to it",
    404: "no such owner or repository, or the token may not see it",
    409: "the hub reports a conflict: something else is writing there; try again",
    412: "something else wrote there meanwhile; try again",
    413: "the hub finds the upload too large",
    429: "too many requests for now: wait, then try again",
}


def push_folder(folder: Path, repo_id: str, *, private: bool = False, say: Say = print) -> str:
    """Upload every file of a folder to a model repository, made if it is not there, and return its address.

    The token is HF_TOKEN's or that of `hf auth login`, the hub HF_ENDPOINT's. private: make the repository so;
    without it a new one is as the owner's account has it, and an existing one stays as it is.
    Raises ConfigError for a name that cannot be, no token, or a public repository where a private one is asked for,
    and ModelError for an empty folder and for what the hub or the network refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi, get_token

    _check_name(repo_id)
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise ModelError(f"{folder}: no file in it to upload to {repo_id}")
    token = get_token()
    if token is None:
        raise ConfigError(f"{repo_id}: no token for the hub; set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    num_bytes = sum(path.stat().st_size for path in files)
    say(f"uploading {len(files)} files, {num_bytes / 1e9:.3f} GB, to {api.endpoint}/{repo_id}")
    with _explained(repo_id, endpoint=api.endpoint, token=token):
        repository = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ConfigError(f"{repo_id}: exists and is public; name another repository, or make this one private")
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
        raise ConfigError(f"{repo_id!r} is no name of a repository ({error}); such as owner/name would fit") from error
    if "/" not in repo_id:
        raise ConfigError(f"{repo_id!r} lacks its owner; such as owner/{repo_id} would fit")


@contextlib.contextmanager
def _explained(repo_id: str, *, endpoint: str, token: str) -> Iterator[None]:
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except DsDpoError:
        raise
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing is uploaded; unset it") from error
    except ValueError as error:  # the hub's client, of the metadata in README.md
        raise ModelError(f"{repo_id}: refused: {error}".replace(token, "***")) from error
    except Exception as error:  # also those of whatever HTTP library the hub's client is built on
        reason = _refusal(error) or f"the upload to {endpoint} failed; try again where it can be reached ({error!r})"
        # a server may send back what it was sent
        raise ModelError(f"{repo_id}: {reason}".replace(token, "***")) from error


def _refusal(error: BaseException | None) -> str | None:
    """What the hub answered, and the cure; None where it did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__  # a file's upload is wrapped once more
    if error is None:
        return None
    status = error.response.status_code
    cure = CURES.get(status, "the hub failed: try again later" if status >= 500 else "the hub refuses it")
    said = f": {error.server_message}" if error.server_message else ""
    return f"{cure} (status {status}{said})"
