"""A failure of the hub's client in words, by the cause behind what the client raises last."""

import pytest
from huggingface_hub import errors

from ds_dpo.storage.hub_failures import hub_failure


def answered(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    """Return an error without the server's answer, whose class depends on the client's HTTP library."""
    return kind.__new__(kind, "no")


def behind(cause: BaseException) -> BaseException:
    """What snapshot_download raises if it has nothing in its cache, whatever the cause."""
    error = errors.LocalEntryNotFoundError("cannot find the snapshot on the disk")
    error.__cause__ = cause
    return error


FAILURES = {
    "gated": (behind(answered(errors.GatedRepoError)), "accept its terms"),
    "mistyped or private": (behind(answered(errors.RepositoryNotFoundError)), "check the spelling, or log in"),
    "no such branch": (answered(errors.RevisionNotFoundError), "no such revision"),
    "no such file": (answered(errors.RemoteEntryNotFoundError), "no such file"),
    "switched off": (behind(errors.OfflineModeIsEnabled("offline")), "HF_HUB_OFFLINE is set"),
    "no network": (behind(ConnectionError("refused")), "the hub cannot be reached"),
    "no name": (errors.HFValidationError("a/b/c"), "give owner/name"),
    "no cache folder": (PermissionError(13, "Permission denied", "/proc/none"), "/proc/none cannot be made or written"),
    "another": (RuntimeError("first\nsecond"), "RuntimeError: first second"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_what_happened_and_what_helps(kind: str) -> None:
    error, said = FAILURES[kind]
    assert said in hub_failure(error)
