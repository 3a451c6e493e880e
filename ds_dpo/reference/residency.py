"""The reference of a run: how each residency is built, and a check that its weights stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ds_dpo.distributed.collectives import gather_objects
from ds_dpo.distributed.together import said_once
from ds_dpo.engine.engine import share_weights
from ds_dpo.engine.settings import ResolvedDeepSpeed, reference_settings
from ds_dpo.errors import ReferenceChangedError
from ds_dpo.models.checksum import weights_checksum
from ds_dpo.models.denoiser.predict import Predict
from ds_dpo.models.reference import FrozenCopy, HeldReference, PolicyWithoutAdapter, assert_own_storage
from ds_dpo.reference.block_offload import BlockOffload


@dataclass(frozen=True, kw_only=True)
class Residency:
    """How a reference is built, in two steps: the ranks of a node load one by one, then share weights together.

    copy: makes the reference from a policy that has no engine yet, and its call, in a dtype, for a device. settle:
    called by all ranks together, before the policy gets its engine.
    """

    copy: Callable[[nn.Module, Predict, torch.dtype, torch.device], Any]
    settle: Callable[[Any, ResolvedDeepSpeed], HeldReference]


def _copy_to_device(policy: nn.Module, predict: Predict, dtype: torch.dtype, device: torch.device) -> FrozenCopy:
    return FrozenCopy(policy, predict=predict, dtype=dtype, device=device)


def _copy_to_host(policy: nn.Module, predict: Predict, dtype: torch.dtype, device: torch.device) -> FrozenCopy:
    """Copy straight to host memory: the device never holds the whole reference."""
    reference = FrozenCopy(policy, predict=predict, dtype=dtype, device="cpu")
    reference.forget_copies = BlockOffload(reference.module, device=device).forget_copies
    return reference


def _copy_nothing(
    policy: nn.Module, predict: Predict, dtype: torch.dtype, device: torch.device
) -> PolicyWithoutAdapter:
    return PolicyWithoutAdapter(policy, predict=predict)


def _leave(reference: HeldReference, resolved: ResolvedDeepSpeed) -> HeldReference:
    return reference


def _share(reference: FrozenCopy, resolved: ResolvedDeepSpeed) -> HeldReference:
    reference.module = share_weights(reference.module, settings=reference_settings(resolved.settings))
    return reference


# By the value of reference.residency; None: no weights are kept.
RESIDENCIES: dict[str, Residency | None] = {
    "replicated": Residency(copy=_copy_to_device, settle=_leave),
    "zero3": Residency(copy=_copy_to_device, settle=_share),
    "cpu": Residency(copy=_copy_to_host, settle=_leave),
    "adapter": Residency(copy=_copy_nothing, settle=_leave),
    "cached": None,
}


class ReferenceGuard(Protocol):
    """Finds whether something else than the run itself has changed the reference's weights."""

    def require_unchanged(self) -> None:
        """Raise ReferenceChangedError on all ranks if the weights of any rank have changed; every rank calls it."""
        ...


class ReferenceWatch:
    """Keeps a checksum of the reference's weights, to check later that training has not changed them."""

    def __init__(self, reference: HeldReference, *, policy: nn.Module) -> None:
        """Every rank calls it. policy: the module in the engine, which must share no memory with the reference."""
        if isinstance(reference, FrozenCopy):
            assert_own_storage(policy, reference)
        self._reference = reference
        self._expected = self._checksums()

    def accept(self) -> None:
        """Accept the present weights: they were replaced on purpose."""
        self._expected = self._checksums()

    def require_unchanged(self) -> None:
        """Raise ReferenceChangedError on all ranks if the weights of any rank have changed."""
        found = self._checksums()
        changed = [rank for rank, checksum in enumerate(self._expected) if found[rank] != checksum]
        if changed:
            ranks = ", ".join(map(str, changed))
            error = ReferenceChangedError(
                f"the reference's weights have changed while the policy was trained (rank {ranks}: checksum "
                f"{self._expected[changed[0]][:16]} before, {found[changed[0]][:16]} now): its memory was written to, "
                "so the objective compared with something else than the start; do not use this run's checkpoints"
            )
            raise said_once(error)

    def _checksums(self) -> list[str]:
        """Return the checksum of every rank's weights."""
        return gather_objects(weights_checksum(self._reference.weights()))
