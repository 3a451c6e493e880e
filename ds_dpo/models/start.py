"""The weights that policy and reference start from: of the pipeline, of another denoiser, or of an earlier run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ds_dpo.config.models import ModelConfig
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import CheckpointError
from ds_dpo.storage.manifest import newest_valid_checkpoint
from ds_dpo.zero_shards.files import is_tag_folder
from ds_dpo.zero_shards.reader import ZeroCheckpoint, open_checkpoint


@dataclass(frozen=True)
class CheckpointWeights(Mapping[str, Tensor]):
    """The fp32 master weights of a checkpoint by parameter name; each is assembled on request."""

    checkpoint: ZeroCheckpoint

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint.parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.parameters)

    def __len__(self) -> int:
        return len(self.checkpoint.parameters)

    def num_bytes(self) -> int:
        """Return the size of all weights in fp32."""
        return 4 * sum(placement.numel for placement in self.checkpoint.parameters.values())


def pin_start(config: RunConfig) -> RunConfig:
    """Return the configuration with a run in model.denoiser_init replaced by that run's newest valid checkpoint.

    A resumed run then has the same start, even if the other run has trained on. File sizes are checked here, contents
    when they are read. Raises CheckpointError if the run has no valid checkpoint.
    """
    return _pinned(config, "denoiser_init")


def pin_policy_start(config: RunConfig, *, began_from: str | None) -> RunConfig:
    """Return the configuration with a run in model.policy_init replaced by one of its checkpoints.

    began_from: the model.policy_init that the run folder's configuration has. It stays if it is of the run that is
    asked for, so that a run resumes even if the other run has trained on, or is gone. Raises as pin_start does.
    """
    asked = config.model.policy_init
    if asked is None:
        return config
    if began_from is not None and Path(began_from).parent == Path(asked) / "checkpoints":
        return _with(config, "policy_init", began_from)
    return _pinned(config, "policy_init")


def _pinned(config: RunConfig, field: str) -> RunConfig:
    run = _folder_of(config.model, field)
    if run is None or not (run / "checkpoints").is_dir():
        return config
    newest, reasons = newest_valid_checkpoint(run / "checkpoints", checksums=False)
    if newest is None:
        why = f"; the newest: {reasons[0]}" if reasons else ""
        raise CheckpointError(f"model.{field} {run}: the run has no valid checkpoint{why}")
    return _with(config, field, str(newest))


def _with(config: RunConfig, field: str, value: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={field: value})})


def checkpoint_start(model: ModelConfig, *, field: str = "denoiser_init") -> CheckpointWeights | None:
    """Return the weights of model.denoiser_init, or of another field, if it is a checkpoint, else None.

    Raises CheckpointError if the checkpoint is incomplete; contents are verified when they are read.
    """
    folder = _folder_of(model, field)
    if folder is None or not is_tag_folder(folder):
        return None
    return CheckpointWeights(open_checkpoint(folder, verify=True))


def _folder_of(model: ModelConfig, field: str) -> Path | None:
    name = getattr(model, field)
    return Path(name) if name is not None and Path(name).is_dir() else None
