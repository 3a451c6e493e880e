"""What a failure of the Hugging Face hub's client means: mistyped, gated, not logged in, offline, or no room."""

from __future__ import annotations

# Classes of the hub client's errors, the most special first: what happened, and what helps.
FAILURES = {
    "GatedRepoError": "it is gated; accept its terms on its page and log in by `hf auth login` or HF_TOKEN",
    "RepositoryNotFoundError": "it does not exist, or it is private; check the spelling, or log in by `hf auth login`",
    "RevisionNotFoundError": "it has no such revision; give a branch, a tag or a commit of it",
    "RemoteEntryNotFoundError": "it has no such file; check the variant, and that it is a diffusers model",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and it is not in the cache; unset it, or download it first",
    "LocalEntryNotFoundError": (
        "it is not in the cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set); check the spelling and the "
        "network, or download it first where there is one"
    ),
    "HFValidationError": "this is not the name of a repository; give owner/name",
}


def hub_failure(error: BaseException) -> str:
    """Return what a failure of the hub's client means and what helps, for the end of a message.

    The client raises LocalEntryNotFoundError whatever the cause was, which is then the most special error behind it.
    """
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    names = {kind.__name__: one for one in reversed(chain) for kind in type(one).__mro__}
    for name, meaning in FAILURES.items():
        if name in names:
            return f"{meaning} ({name})"
    denied = next((one for one in chain if isinstance(one, OSError) and one.filename and one.errno), None)
    if denied is not None:
        return (
            f"{denied.filename} cannot be made or written ({denied.strerror}); set HF_HOME to a folder that this user "
            "can write"
        )
    return f"{type(chain[0]).__name__}: {' '.join(str(chain[0]).split())[:200]}"
