"""The weights that policy and reference start from: the pipeline's own, another UNet's, or those of an earlier run."""

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
    """The fp32 master weights of a checkpoint by parameter name, each put together when it is asked for."""

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
        """Return the size of all in fp32."""
        return 4 * sum(placement.numel for placement in self.checkpoint.parameters.values())


def pin_start(config: RunConfig) -> RunConfig:
    """Return the configuration with a run as model.denoiser_init replaced by its newest whole checkpoint.

    So that a run that is resumed has the start that it had, whatever the other run did since. Sizes of files are
    compared, their contents as they are read. Raises CheckpointError if the run has no whole checkpoint.
    """
    run = _folder_of(config.model)
    if run is None or not (run / "checkpoints").is_dir():
        return config
    newest, reasons = newest_valid_checkpoint(run / "checkpoints", checksums=False)
    if newest is None:
        why = f"; the newest: {reasons[0]}" if reasons else ""
        raise CheckpointError(f"model.denoiser_init {run}: a run without a whole checkpoint{why}")
    model = config.model.model_copy(update={"denoiser_init": str(newest)})
    return config.model_copy(update={"model": model})


def checkpoint_start(model: ModelConfig) -> CheckpointWeights | None:
    """Return the weights of the checkpoint that model.denoiser_init is; None if it is none.

    Raises CheckpointError if the checkpoint is not whole; contents are verified as they are read.
    """
    folder = _folder_of(model)
    if folder is None or not is_tag_folder(folder):
        return None
    return CheckpointWeights(open_checkpoint(folder, verify=True))


def _folder_of(model: ModelConfig) -> Path | None:
    name = model.denoiser_init
    return Path(name) if name is not None and Path(name).is_dir() else None
