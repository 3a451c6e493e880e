"""What a start has to agree with besides the configuration: the run's checkpoints, and the content of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ds_dpo.checkpoints.identity import RunIdentity, none_usable
from ds_dpo.config.run import RunConfig
from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import raised_everywhere, said_once
from ds_dpo.errors import CheckpointError, ModelError
from ds_dpo.models.contents import POLICY, ModelContents, read_contents
from ds_dpo.run_folder.folder import RunFolder
from ds_dpo.run_folder.resuming import Resume
from ds_dpo.storage.manifest import checkpoint_folders, read_manifest, step_of

NUM_DIGITS = 12  # of a hash, in messages


def require_own_checkpoint(checkpoints: Path, identity: RunIdentity, *, resume: Resume) -> None:
    """Raise CheckpointError if none of the checkpoints that a start may go on from belongs to its run.

    Only manifests are read, before models are. Whatever else is wrong with a checkpoint is found when it is loaded.
    """
    reasons: list[str] = []
    for folder in checkpoint_folders(checkpoints):
        if isinstance(resume, int) and step_of(folder) != resume:
            continue
        try:
            identity.require_own(folder, read_manifest(folder))
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return
    if reasons:
        raise none_usable(checkpoints, reasons)


def require_same_models(
    config: RunConfig, folder: RunFolder, place: RankEnvironment, *, with_encoders: bool
) -> ModelContents:
    """Return the contents of the run's models; every rank calls it, and the first of each host reads the files.

    Raises ModelError on all ranks, naming each component, if they are not those of the run, or not those of rank 0.
    """
    own: ModelContents | None = None
    is_new = not checkpoint_folders(folder.checkpoints)
    with raised_everywhere():
        if place.local_rank == 0:
            own = read_contents(config.model, with_encoders=with_encoders, with_policy=is_new)
            if place.rank == 0:
                _require_recorded(config, folder, own)
                if not is_new and POLICY in (saved := folder.saved_models("hashes")):
                    own = replace(own, hashes={**own.hashes, POLICY: saved[POLICY]})
    of_hosts = [found for found in gather_objects(own) if found is not None]
    first = of_hosts[0]
    for found in of_hosts:
        changed = changed_components(first.hashes, found.hashes)
        if changed:
            raise said_once(
                ModelError(
                    f"hosts have different files: {_listed(config, first, changed)}; give all hosts the same files"
                )
            )
    return first


def _require_recorded(config: RunConfig, folder: RunFolder, own: ModelContents) -> None:
    changed = changed_components(folder.saved_models("hashes"), own.hashes)
    if not changed:
        return
    raise ModelError(
        f"{folder.path} was trained with other models: {_listed(config, own, changed)}; "
        f"{_way_back(config, folder, own)}, or give another output_dir"
    )


def _way_back(config: RunConfig, folder: RunFolder, own: ModelContents) -> str:
    was, now = folder.saved_models("commits").get("model.pretrained"), own.commits.get("model.pretrained")
    if was is None or now is None or was == now:
        return "restore the files"
    branch = config.model.revision or "its default branch"
    return f"on the hub, {branch} moved from commit {was} to {now}: --model.revision {was} continues the run"


def changed_components(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the components that both know and that differ, each with both hashes."""
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def _listed(config: RunConfig, own: ModelContents, changed: Mapping[str, tuple[str, str]]) -> str:
    by_field: dict[str, list[str]] = {}
    for name, (old, new) in changed.items():
        words = f"{name} (SHA-256 {old[:NUM_DIGITS]} -> {new[:NUM_DIGITS]})"
        by_field.setdefault(own.fields[name], []).append(words)
    values = config.model.model_dump()
    return "; ".join(
        f"{field} {values[field.removeprefix('model.')]} has another {', '.join(words)}"
        for field, words in by_field.items()
    )
