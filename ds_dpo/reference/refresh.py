"""A reference that follows the policy: every N steps it takes over the policy's weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ds_dpo.distributed.collectives import is_main
from ds_dpo.distributed.together import raised_everywhere
from ds_dpo.engine.engine import Engine
from ds_dpo.errors import CheckpointError
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.process.say import Say
from ds_dpo.reference.residency import ReferenceWatch
from ds_dpo.run_part import RunPart
from ds_dpo.storage.state_files import StateFile

REFERENCE_FILE = "reference.safetensors"


class ReferenceRefresh(RunPart):
    """Every N optimizer steps the reference takes the weights with which the policy computes, to the bit.

    Right afterwards both predict the same, as at the start of a run. The reference's weights are part of every
    checkpoint. Source: arXiv:2404.09656, the hard update.
    """

    name = "reference"

    def __init__(
        self,
        reference: FrozenCopy,
        *,
        engine: Engine,
        watch: ReferenceWatch,
        every_steps: int,
        say: Say,
    ) -> None:
        """reference: a whole copy on each rank. watch: must accept each intended change of the weights."""
        self._reference, self._engine, self._watch = reference, engine, watch
        self._every_steps, self._say = every_steps, say

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Take the policy's weights if they are due after this step. Returns no metrics."""
        if step % self._every_steps == 0:
            self._watch.require_unchanged()
            self._engine.copy_weights_to(self._reference.module)
            self._watch.accept()
            self._say(f"reference: from now on it is the policy of step {step}")
        return {}

    def files(self) -> list[StateFile]:
        """Return the reference's weights, on rank 0."""
        weights = self._reference.module.state_dict()
        return [StateFile(name=REFERENCE_FILE, state=weights, write=_write)] if is_main() else []

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Load the checkpoint's weights. Raises CheckpointError on all ranks if they do not fit."""
        with raised_everywhere():
            load_reference(self._reference.module, folder / REFERENCE_FILE)
        self._watch.accept()


def _write(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError if they cannot be written."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


@torch.no_grad()
def load_reference(module: nn.Module, path: Path) -> None:
    """Copy a file's tensors into a module, one at a time.

    Raises CheckpointError if their names, shapes or dtypes are not exactly the module's, or the file cannot be read.
    """
    own = module.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != own.keys():
                raise CheckpointError(f"{path}: its tensors are not those of this reference")
            for name, tensor in own.items():
                saved = file.get_tensor(name)
                if (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
                    raise CheckpointError(
                        f"{path}: {name} is {saved.dtype} {tuple(saved.shape)}, the reference's is {tensor.dtype} "
                        f"{tuple(tensor.shape)}"
                    )
                tensor.copy_(saved)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
