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
    run = _folder_of(config.model)
    if run is None or not (run / "checkpoints").is_dir():
        return config
    newest, reasons = newest_valid_checkpoint(run / "checkpoints", checksums=False)
    if newest is None:
        why = f"; the newest: {reasons[0]}" if reasons else ""
        raise CheckpointError(f"model.denoiser_init {run}: the run has no valid checkpoint{why}")
    model = config.model.model_copy(update={"denoiser_init": str(newest)})
    return config.model_copy(update={"model": model})


def checkpoint_start(model: ModelConfig) -> CheckpointWeights | None:
    """Return the weights of model.denoiser_init if it is a checkpoint, else None.

    Raises CheckpointError if the checkpoint is incomplete; contents are verified when they are read.
    """
    folder = _folder_of(model)
    if folder is None or not is_tag_folder(folder):
        return None
    return CheckpointWeights(open_checkpoint(folder, verify=True))


def _folder_of(model: ModelConfig) -> Path | None:
    name = model.denoiser_init
    return Path(name) if name is not None and Path(name).is_dir() else None
