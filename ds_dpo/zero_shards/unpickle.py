"""Open a file of torch.save without running any code that it may carry."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ds_dpo.errors import CheckpointError


class Attributes:
    """Stands for a class of DeepSpeed: takes the saved attributes and has no behaviour."""


class FragmentAddress(Attributes):
    """Where a rank's part of a parameter lies in its flat group, in elements."""

    numel: int
    start: int


# what DeepSpeed pickles beside tensors and plain containers; a ZeRO stage is an enumeration of integers
STAND_INS: list[tuple[Callable[..., Any], str]] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Attributes, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Attributes, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def load_shard(path: Path) -> dict[str, Any]:
    """Load a dictionary saved by torch.save; its tensors stay in the file, memory-mapped, until they are read.

    Only tensors, plain containers and the stand-ins above are built; DeepSpeed need not be installed.
    Raises CheckpointError for a missing, torn or foreign file, and for one that asks for any other class or function.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_globals(list(STAND_INS)):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, {_refusal(path, error)}; nothing of it was run") from error
    except Exception as error:  # a damaged file fails in whatever line first meets the damage
        raise CheckpointError(f"{path}: torn, damaged, or not a file of torch.save ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not the dictionary that DeepSpeed saves")
    return content


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    known = {name for _, name in STAND_INS}
    try:
        unknown = sorted(set(get_unsafe_globals_in_checkpoint(path)) - known)
    except Exception:  # the listing walks the same pickle, so what stopped the loading may stop it too
        unknown = []
    if unknown:
        return f"it asks for {', '.join(unknown)}, which no checkpoint needs"
    return f"its pickle is not plain data ({error})"
